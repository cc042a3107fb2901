"""A GGUF file as `qtrain export --to gguf` writes it: the names and the order of its tensors, and the way back to a
model in float32.

A weight is what its blocks stand for, times the `<name>.scale` beside it. Keys and tensors that are not read here would
make another model of it (experts, a sliding window, other rotary positions), so a file that has any is refused. Source:
gguf 0.19, its reader, quants and tensor names.
"""

# H heads, d head dim

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qtrain.config.settings import parse
from qtrain.errors import UserError, first_line, need
from qtrain.models import hf
from qtrain.models.decoder import Decoder
from qtrain.models.families.llama import Llama

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

ROPE_FACTORS = "rope_freqs.weight"
ARCHITECTURES = ("llama", "qwen2", "qwen3")
_SETTINGS = {
    "dim": "embedding_length",
    "n_layers": "block_count",
    "seq_len": "context_length",
    "n_heads": "attention.head_count",
    "n_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "ffn_dim": "feed_forward_length",
    "rope_theta": "rope.freq_base",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "vocab_size": "vocab_size",
}
_HEAD_DIM = ("attention.value_length", "rope.dimension_count")  # as key_length, in every model here
_BY_TENSOR = {
    "qkv_bias": "blk.0.attn_q.bias",
    "o_bias": "blk.0.attn_output.bias",
    "mlp_bias": "blk.0.ffn_gate.bias",
    "qk_norm": "blk.0.attn_q_norm.weight",
}


def names(architecture: str, n_layers: int) -> Callable[[str], str]:
    """layers.0.attention.q.weight -> blk.0.attn_q.weight, of the tensors that other programs have a name for."""
    from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES
    from gguf.tensor_mapping import get_tensor_name_map

    arch = next(each for each in MODEL_ARCH if MODEL_ARCH_NAMES[each] == architecture)
    there = get_tensor_name_map(arch, n_layers)

    def name_of(own: str) -> str:
        theirs = hf.their_name(own)
        assert theirs is not None
        found = there.get_name(theirs, try_suffixes=(".weight", ".bias"))
        assert found is not None
        return found

    return name_of


def scale_name(there: str) -> str:
    """blk.0.attn_q.weight -> blk.0.attn_q.scale; of a bias a name that no tensor has."""
    return there.removesuffix(".weight") + ".scale"


def interleaved_heads(architecture: str, model: Any, own: str) -> int | None:
    """H of a tensor whose rows llama.cpp's rotary embedding takes in another order than a Hugging Face checkpoint:
    queries and keys of Llama. None for all others."""
    heads = {"q": model.n_heads, "k": model.kv_heads}.get(own.split(".")[-2])
    return heads if architecture == "llama" else None


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys, (H * d, ..), with the pairs of the rotary embedding side by side; in a checkpoint they
    are half a head apart."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def apart(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `interleaved`."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def load(path: Path) -> Decoder:
    """The model of a file, in float32. UserError for a file that is damaged, or of a model that is none here."""
    need("gguf", "a model.gguf")
    reader = _opened(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    architecture, settings = _settings(path, reader, tensors)
    assert settings.vocab_size is not None  # it is one of the keys
    model = Decoder(settings, settings.vocab_size)
    name_of = names(architecture, settings.n_layers)
    parameters = {name_of(own): (own, parameter) for own, parameter in model.named_parameters()}
    wanted = {there: tuple(parameter.shape) for there, (_, parameter) in parameters.items()}
    _compare(path, tensors, wanted | ({ROPE_FACTORS: (settings.head_width // 2,)} if ROPE_FACTORS in tensors else {}))
    with torch.no_grad():
        for there, (own, parameter) in parameters.items():
            value = _value(path, tensors, there)
            heads = interleaved_heads(architecture, settings, own)
            parameter.copy_(torch.from_numpy(value if heads is None else apart(value, heads)))
        if ROPE_FACTORS in tensors:
            factors = torch.from_numpy(_value(path, tensors, ROPE_FACTORS))
            first = settings.rope_theta ** -(torch.arange(len(factors)) / len(factors)) / factors
            angles = torch.outer(torch.arange(settings.seq_len), first)
            model.get_buffer("cos").copy_(angles.cos())
            model.get_buffer("sin").copy_(angles.sin())
    return model


def _opened(path: Path) -> GGUFReader:
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except (OSError, ValueError, LookupError, ArithmeticError) as error:  # what the package raises of bytes it misreads
        raise UserError(
            f"cannot read {path} ({first_line(error)}): it is cut short or damaged; copy it again, or export the run "
            "again (qtrain export --to gguf)"
        ) from None


def _settings(path: Path, reader: GGUFReader, tensors: Mapping[str, ReaderTensor]) -> tuple[str, Llama]:
    """(architecture, settings of the model)."""
    found = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    architecture = found.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{path} is of architecture {architecture!r}; qtrain reads {', '.join(ARCHITECTURES)}, as its export "
            "writes them: evaluate this one with llama.cpp"
        )
    keys = {name.removeprefix(f"{architecture}."): value for name, value in found.items() if "GGUF." not in name}
    keys = {name: value for name, value in keys.items() if not name.startswith("general.")}
    known = {*_SETTINGS.values(), *_HEAD_DIM}
    if odd := sorted(keys.keys() ^ known):
        raise UserError(
            f"{path} {'lacks' if odd[0] in known else 'has'} the key {architecture}.{odd[0]}, other than a file that "
            "qtrain export --to gguf wrote: export the run again, or evaluate this one with llama.cpp"
        )
    if odd := [key for key in _HEAD_DIM if keys[key] != keys["attention.key_length"]]:
        raise UserError(
            f"{path} has {odd[0]} {keys[odd[0]]} and attention.key_length {keys['attention.key_length']}; models here "
            "have one width of heads, all of which is rotated: evaluate this one with llama.cpp"
        )
    by_tensor = {name: tensor in tensors for name, tensor in _BY_TENSOR.items()}
    sizes = {name: keys[key] for name, key in _SETTINGS.items()}
    said = {"name": path.parent.name, "tie_embeddings": "output.weight" not in tensors, **by_tensor, **sizes}
    return architecture, parse(Llama, said)


def _compare(path: Path, tensors: Mapping[str, ReaderTensor], wanted: Mapping[str, tuple[int, ...]]) -> None:
    scales = {scale_name(name): (1,) for name in wanted if scale_name(name) in tensors}
    found = {name: tuple(reversed(tensor.shape.tolist())) for name, tensor in tensors.items()}
    if odd := sorted(name for name, _ in found.items() ^ {**wanted, **scales}.items()):
        raise UserError(
            f"{path}: {odd[0]} is {found.get(odd[0], 'missing')}, and a model with its settings has "
            f"{wanted.get(odd[0], 'none')}; export the run again (qtrain export --to gguf)"
        )


def _value(path: Path, tensors: Mapping[str, ReaderTensor], name: str) -> np.ndarray:
    """float32, a copy of what is in the file."""
    from gguf import dequantize

    tensor, scale = tensors[name], tensors.get(scale_name(name))
    try:
        value = np.array(dequantize(tensor.data, tensor.tensor_type), np.float32)
    except NotImplementedError as error:
        raise UserError(f"{path}: {name}: {first_line(error)}; evaluate it with llama.cpp") from None
    return value if scale is None else value * np.float32(scale.data.item())
