"""A run as one GGUF file, as llama.cpp reads it: the codes of its quantised layers in blocks of ggml's types.

| type | weights |
|---|---|
| TQ2_0, TQ1_0 | -1, 0 and 1, in blocks of 256 |
| MXFP4 | E2M1 in blocks of 32 under powers of two |
| NVFP4 | E2M1 in blocks of 16 under E4M3, four of them in a block of 64 |
| Q4_0 | whole numbers from -8 to 7, in blocks of 32 under float16 |
| Q8_0 | whole numbers up to 127, in blocks of 32 under float16 |
| BF16, F16 | codes and block scales multiplied, where that is exact |

Scales of ggml's blocks are float16, which holds no float32 or bfloat16 scale. A scale of the whole matrix goes beside
it instead, as `<name>.scale`, by which llama.cpp multiplies the product; the blocks' own scales are then 1. A float16
scale of more than 32 elements is written for each 32 of them. A scale of each row, float32 and bfloat16 scales of
blocks, rotations and zero points have no place and are refused: Q4_1 keeps the smallest value of a block in float16,
which rounds it. Layers that no recipe quantises, and embeddings, are BF16, vectors
float32. Source: gguf 0.19, its quants and constants; llama.cpp's loading of `.scale` tensors.
"""

# N out features, K in features

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from qtrain.data.tokenizer import tokenizer_files
from qtrain.errors import UserError, first_line, need
from qtrain.export.trained import (
    Codes,
    Exported,
    Refused,
    TrainedRun,
    e2m1_bits,
    e8m0_bits,
    has_line_scale,
    integer_grid,
    new_folder,
    open_run,
)
from qtrain.models import hf
from qtrain.models.base import Transformer
from qtrain.models.gguf import ROPE_FACTORS, interleaved, interleaved_heads, names, scale_name
from qtrain.quant.functional import Numerics
from qtrain.quant.packed import unsettled
from qtrain.runs.files import write_synced
from qtrain_kernels.formats import E4M3, ELEMENTS
from qtrain_kernels.plans import Plan

if TYPE_CHECKING:
    from gguf import GGUFWriter

Kind = Literal["TQ2_0", "TQ1_0", "MXFP4", "NVFP4", "Q4_0", "Q8_0", "BF16", "F16"]
KINDS: tuple[Kind, ...] = get_args(Kind)  # of those that hold a recipe the first is taken
BLOCKS: dict[Kind, int] = {
    "TQ2_0": 256, "TQ1_0": 256, "MXFP4": 32, "NVFP4": 64, "Q4_0": 32, "Q8_0": 32, "BF16": 1, "F16": 1,
}  # fmt: skip
INTEGERS: dict[str, int] = {"Q4_0": 4, "Q8_0": 8}  # bits
E2M1 = ELEMENTS["e2m1"].levels()
# The pre-tokenizers that have a name in llama.cpp: by the regular expression that splits the text.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE = {_WORDS % "{1,3}": "llama-bpe", _WORDS % "": "qwen2"}


def export(run: Path, out: Path, kind: Kind | None = None) -> Exported:
    """Write the newest good checkpoint of a run directory into the new folder `out`, as model.gguf, with the tokenizer
    beside it, by which `qtrain evaluate` reads a text. kind: of the quantised layers; None takes for each the first of
    KINDS that holds it. One tensor at a time is in memory, and what gguf spools (256 MiB). UserError when no type, or
    not this one, holds what the recipe trains, with the reason; for a tokenizer that llama.cpp has no name for; then
    nothing is written."""
    need("gguf", "an export to GGUF")
    trained = open_run(run)
    if kind is not None and not trained.layers:
        raise UserError(
            f"{run}: recipe {trained.config.recipe.name} quantises nothing; its weights go out as BF16, without kind"
        )
    kinds: dict[str, Kind] = trained.held_by("GGUF", lambda layer: kind_of(layer.numerics, layer.in_features, kind))
    vocabulary = _vocabulary(trained)
    with new_folder(out) as partial:
        weight_bytes, spent = _write(partial / "model.gguf", trained, kinds, vocabulary)
        for name, text in tokenizer_files(trained.tokenizer).items():
            write_synced(partial / name, text)
    elements = sum(layer.in_features * layer.out_features for layer in trained.layers.values())
    activations = {
        str(layer.numerics.fprop.left) for layer in trained.layers.values() if layer.numerics.fprop.left.plan
    }
    notes = [
        f"GGUF does not say how the inputs are quantised ({each}): llama.cpp rounds them in its own way"
        for each in sorted(activations)
    ]
    if any(has_line_scale(layer.numerics) for layer in trained.layers.values()):
        notes.append(
            "scales of whole matrices are in tensors named .scale: llama.cpp reads them; transformers does not"
        )
    return Exported(
        out,
        trained.step,
        trained.parameters,
        weight_bytes,
        trained.recipe,
        8 * spent / elements if elements else 16.0,
        Counter(kinds.values()) if kinds else None,
        tuple(notes),
    )


# ------------------------------------------------------------------------------------------------ which type holds what


def kind_of(numerics: Numerics, in_features: int | None = None, wanted: Kind | None = None) -> Kind:
    """The type of the layers of a recipe; in_features: of one of them, None for any that divides into blocks. Refused,
    with the reason, where none, or not the one that is wanted, holds every code and scale."""
    reason = unsettled(numerics) or _unsayable(numerics)
    if reason is not None:
        raise Refused(reason)
    plan = numerics.fprop.right.plan
    assert plan is not None
    reasons = {each: _lacks(plan, numerics.fprop.right.tile[1], each, in_features) for each in KINDS}
    fitting: list[Kind] = [each for each in KINDS if reasons[each] is None and wanted in (None, each)]
    if not fitting:
        raise Refused("; ".join(f"{each} {reasons[each]}" for each in KINDS if wanted in (None, each)))
    return fitting[0]


def _unsayable(numerics: Numerics) -> str | None:
    """What no type has a place for."""
    quantizer = numerics.fprop.right
    plan = quantizer.plan
    assert plan is not None
    if plan.element.table is not None:
        return f"no type has the codes of {quantizer.spec.format}, which are those of a table"
    if plan.element.zero_point:
        return "it has zero points, and Q4_1 has a block's smallest value in float16, which rounds zero point * scale"
    if quantizer.rotates:
        return f"its weights are rotated ({quantizer.spec.rotation}), and llama.cpp would not rotate the inputs"
    if has_line_scale(numerics) and not plan.whole:
        return "it has a float32 scale for each row, and the format one for the whole matrix"
    if plan.block is not None and plan.scale_kind in ("float32", "bfloat16"):
        return f"it has {plan.scale_kind} scales of blocks, and those of the format are float16"
    return None


def _lacks(plan: Plan, size: int, kind: Kind, in_features: int | None) -> str | None:
    """Why a type cannot hold codes and block scales; size: elements along a row that share one."""
    if in_features is not None and in_features % BLOCKS[kind]:
        return f"has blocks of {BLOCKS[kind]}, which do not divide rows of {in_features}"
    element = plan.element
    if kind in ("TQ2_0", "TQ1_0"):
        return None if plan.block is None and element.levels() == (-1.0, 0.0, 1.0) else "holds -1, 0 and 1 alone"
    if kind == "MXFP4":
        whole = plan.block is None or (plan.scale_kind, size) == ("e8m0", 32)
        return None if element.levels() == E2M1 and whole else "holds E2M1 in blocks of 32 under powers of two"
    if kind == "NVFP4":
        fits = (element.levels(), plan.scale_element, size) == (E2M1, E4M3, 16)
        return None if fits else "holds E2M1 in blocks of 16 under E4M3"
    if kind in INTEGERS:
        fits = plan.block is None or (plan.scale_kind == "float16" and size % BLOCKS[kind] == 0)
        bits = INTEGERS[kind]
        whole = fits and integer_grid(element)[1] <= bits
        numbers = f"whole numbers of {bits} bits"
        return None if whole else f"holds {numbers} under one scale, or float16 scales of multiples of {BLOCKS[kind]}"
    if kind == "BF16":
        return None if plan.exact_in_bfloat16 else "has 8 significant bits"
    # Powers of two of blocks reach beyond its exponents.
    return None if plan.block is None and max(element.levels()) <= 65504 else "has 5 bits of exponent"


# --------------------------------------------------------------------------------------------------------------- blocks


def blocks_of(weight: Codes, kind: Kind) -> tuple[np.ndarray, float]:
    """(rows of bytes of the type, (N, bytes), and the float32 by which they are to be multiplied). Other than those of
    BF16 and F16, which are float32 values still."""
    line = 1.0 if weight.line_scale is None else weight.line_scale.item()
    codes, scales = weight.codes, weight.row_scales()
    if kind in ("BF16", "F16"):
        size = 1 if scales is None else codes.shape[1] // scales.shape[1]
        return (codes if scales is None else codes * scales.repeat_interleave(size, 1)).numpy(), line
    if kind in ("TQ2_0", "TQ1_0"):
        from gguf import GGMLQuantizationType, quants

        return quants.quantize(codes.numpy(), GGMLQuantizationType[kind]), line  # whose scale is the largest code, 1
    if kind in INTEGERS:
        assert weight.layout.plan is not None
        unit, _ = integer_grid(weight.layout.plan.element)
        return _of_integers(weight.integers(), scales, kind), line * unit
    nibbles = e2m1_bits(codes).numpy()
    if kind == "MXFP4":
        exponents = torch.ones(1) if scales is None else scales
        head = e8m0_bits(exponents).expand(codes.shape[0], codes.shape[1] // 32).numpy()[..., None]
        return _headed(head, _halves(nibbles, 32), 16), line
    assert scales is not None
    head = scales.to(torch.float8_e4m3fn).view(torch.uint8).view(codes.shape[0], -1, 4).numpy()
    return _headed(head, _halves(nibbles, 16), 32), line


def _of_integers(codes: Tensor, scales: Tensor | None, kind: str) -> np.ndarray:
    """codes: (N, K) int8; scales: float32 that float16 holds, (N, K / size); None for 1."""
    blocks = codes.shape[1] // 32
    heads = torch.ones(1, 1) if scales is None else scales.repeat_interleave(blocks // scales.shape[1], 1)
    head = heads.to(torch.float16).numpy()[..., None].view(np.uint8)
    if kind == "Q4_0":
        return _headed(head, _halves((codes + 8).numpy().view(np.uint8), 32), 16)
    return _headed(head, codes.numpy().view(np.uint8), 32)


def _halves(nibbles: np.ndarray, size: int) -> np.ndarray:
    """Of each `size` codes the second half in the high four bits of the first: (N, K / 2)."""
    pairs = nibbles.reshape(nibbles.shape[0], -1, 2, size // 2)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(nibbles.shape[0], -1)


def _headed(head: np.ndarray, rest: np.ndarray, size: int) -> np.ndarray:
    """head (.., h) bytes before each `size` bytes of rest (N, ..): (N, blocks * (h + size))."""
    body = rest.reshape(rest.shape[0], -1, size)
    head = np.broadcast_to(head, (*body.shape[:2], head.shape[-1]))
    return np.concatenate([head, body], axis=-1).reshape(rest.shape[0], -1)


# ------------------------------------------------------------------------------------------------------------ the file


def _write(path: Path, trained: TrainedRun, kinds: dict[str, Kind], vocabulary: dict[str, Any]) -> tuple[int, int]:
    """(bytes of all weights, those of the quantised layers), with their scales."""
    from gguf import GGMLQuantizationType, GGUFWriter

    model = trained.model
    architecture = hf.config_of(model, trained.vocab_size, trained.tokenizer.eos_id)["model_type"]
    name_of = names(architecture, model.n_layers)
    writer = GGUFWriter(path, architecture, use_temp_file=True)
    _about(writer, trained, vocabulary)
    bytes_of_all = bytes_of_codes = 0
    try:
        for name, values, kind, scale in _tensors(trained, kinds):
            there = name_of(name)
            heads = interleaved_heads(architecture, model, name)
            if heads is not None:
                values = interleaved(values, heads)
            values = np.ascontiguousarray(values)
            writer.add_tensor(there, values, raw_dtype=GGMLQuantizationType[kind])
            spent = values.nbytes
            if scale != 1.0:
                writer.add_tensor(scale_name(there), np.array([scale], np.float32))
                spent += 4
            bytes_of_all += spent
            bytes_of_codes += spent if name.removesuffix(".weight") in kinds else 0
        if model.rope_scaling is not None:
            writer.add_tensor(ROPE_FACTORS, rope_factors(model))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    except OSError as error:
        raise UserError(f"cannot write {path.parent}: {first_line(error)}") from error
    return bytes_of_all, bytes_of_codes


def _tensors(trained: TrainedRun, kinds: dict[str, Kind]) -> Iterator[tuple[str, np.ndarray, str, float]]:
    """(our name, rows of what is stored, its type, the scale beside it) of each tensor."""
    from gguf import GGMLQuantizationType, quants

    for name, size in trained.sizes.items():
        layer = trained.layers.get(name.removesuffix(".weight"))
        if layer is None:
            values = trained.weight(name).bfloat16().float().numpy()
            kind, scale = "F32" if len(size) == 1 else "BF16", 1.0
        else:
            kind = kinds[layer.name]
            values, scale = blocks_of(trained.codes(layer), kind)
        if kind in ("F32", "BF16", "F16"):
            values = quants.quantize(values, GGMLQuantizationType[kind])
        yield name, values, kind, scale


def _about(writer: GGUFWriter, trained: TrainedRun, vocabulary: dict[str, Any]) -> None:
    """What a reader must know of the model and the tokenizer."""
    model = trained.model
    writer.add_name(trained.path.resolve().name)
    writer.add_block_count(model.n_layers)
    writer.add_context_length(model.seq_len)
    writer.add_embedding_length(model.dim)
    writer.add_feed_forward_length(model.ffn_dim)
    writer.add_head_count(model.n_heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_key_length(model.head_width)
    writer.add_value_length(model.head_width)
    writer.add_rope_dimension_count(model.head_width)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    writer.add_vocab_size(trained.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary["pre"])
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["types"])
    writer.add_token_merges(vocabulary["merges"])
    writer.add_eos_token_id(trained.tokenizer.eos_id)
    writer.add_add_bos_token(False)


def rope_factors(model: Transformer) -> np.ndarray:
    """(head / 2,) float32: by what the rotary frequencies are divided (Llama 3.1)."""
    scaling, width = model.rope_scaling, model.head_width
    assert scaling is not None
    frequencies = model.rope_theta ** -(np.arange(0, width, 2) / width)
    turns = scaling.original_seq_len * frequencies / (2 * np.pi)  # of a pair, over the original length
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return (1.0 / (kept + (1.0 - kept) / scaling.factor)).astype(np.float32)


def _vocabulary(trained: TrainedRun) -> dict[str, Any]:
    """Of a byte-level BPE tokenizer, whose rules llama.cpp knows by name. UserError for any other."""
    from gguf import TokenType

    found = json.loads(tokenizer_files(trained.tokenizer)["tokenizer.json"])
    pre = _pre_tokenizer(found)
    if found["model"].get("type") != "BPE" or pre is None:
        raise UserError(
            f"{trained.path}: llama.cpp has no name for its tokenizer; GGUF takes byte-level BPE that splits words as "
            "GPT-2, Llama 3 or Qwen2 do"
        )
    special = {token["id"]: token["content"] for token in found["added_tokens"]}
    by_id = {number: token for token, number in found["model"]["vocab"].items()} | special
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in found["model"]["merges"]]
    end = by_id[trained.tokenizer.eos_id]
    merges = merges or [f"{end} {end}"]  # llama.cpp wants one; this one joins symbols that no text is split into
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(trained.vocab_size)]
    kinds = [
        TokenType.CONTROL if number in special else TokenType.NORMAL if number in by_id else TokenType.UNUSED
        for number in range(trained.vocab_size)
    ]
    return {"pre": pre, "tokens": tokens, "types": kinds, "merges": merges}


def _pre_tokenizer(found: dict[str, Any]) -> str | None:
    """llama.cpp's name of how a tokenizer.json splits a text before its merges."""
    rule, model = found.get("pre_tokenizer") or {}, found["model"]
    parts = rule.get("pretokenizers", [rule])
    if [part.get("type") for part in parts] == ["ByteLevel"] and not parts[0]["add_prefix_space"]:
        return "gpt-2" if parts[0]["use_regex"] or not model["merges"] else None
    if [part.get("type") for part in parts] == ["Split", "ByteLevel"] and not parts[1]["use_regex"]:
        return PRE.get(parts[0]["pattern"].get("Regex"))
    return None
