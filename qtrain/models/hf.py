"""Reading and writing the weights of Hugging Face checkpoints, and their names.

A checkpoint is a folder with config.json (`qtrain.models.hf_config`) and safetensors files, one or several with an
index.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from qtrain.errors import UserError, first_line
from qtrain.models.base import Transformer
from qtrain.models.decoder import Decoder
from qtrain.models.hf_config import find, read_json
from qtrain.runs.files import write_synced

SHARD_BYTES = 5 * 10**9

_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_NAMES = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "lm_head": "lm_head",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    **{f"attention.{x}": f"self_attn.{x}_proj" for x in "qkvo"},
    **{f"mlp.{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
}


def their_name(name: str) -> str | None:
    """layers.0.attention.q.weight -> model.layers.0.self_attn.q_proj.weight; None for what no checkpoint has."""
    layer = re.match(r"layers\.(\d+)\.", name)
    place, _, kind = name[layer.end() if layer else 0 :].rpartition(".")
    if place not in _NAMES or kind not in ("weight", "bias"):
        return None
    return (f"model.layers.{layer[1]}." if layer else "") + f"{_NAMES[place]}.{kind}"


def config_of(model: Transformer, vocab_size: int, eos_id: int) -> dict[str, Any]:
    """config.json of a model, as transformers reads it; the weights are bfloat16. UserError for settings that no class
    of transformers has together."""
    kind = "qwen3" if model.qk_norm else "qwen2" if model.qkv_bias and not model.o_bias else "llama"
    if (kind == "qwen2" and model.mlp_bias) or (kind == "qwen3" and (model.qkv_bias != model.o_bias or model.mlp_bias)):
        raise UserError(
            f"no class of transformers has qk_norm={model.qk_norm}, qkv_bias={model.qkv_bias}, o_bias={model.o_bias} "
            f"and mlp_bias={model.mlp_bias} together: this model cannot be exported"
        )
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if (scaling := model.rope_scaling) is not None:
        rope |= scaling.model_dump(exclude={"original_seq_len"})
        rope |= {"rope_type": "llama3", "original_max_position_embeddings": scaling.original_seq_len}
    biases = {} if kind == "qwen2" else {"attention_bias": model.o_bias}
    return {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "hidden_size": model.dim,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_width,
        "intermediate_size": model.ffn_dim,
        "max_position_embeddings": model.seq_len,
        "vocab_size": vocab_size,
        "tie_word_embeddings": model.tie_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,  # of transformers 4; 5 reads rope_parameters
        "rope_parameters": rope,
        **({"rope_scaling": {key: rope[key] for key in rope if key != "rope_theta"}} if model.rope_scaling else {}),
        **biases,
        **({"mlp_bias": model.mlp_bias} if kind == "llama" else {}),
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "torch_dtype": "bfloat16",
    }


def load(model: Decoder, name: str) -> None:
    """Read a checkpoint's weights into a model, in place, in the model's dtype; of a sharded model each rank reads its
    own part. UserError naming the first tensor that is missing, too many, or of another shape."""
    folder = find(name)
    # A recipe's learned scales are no checkpoint's; a tied lm_head is embed.
    parameters = {theirs: value for own, value in model.named_parameters() if (theirs := their_name(own)) is not None}
    with _tensors(folder) as files, torch.no_grad():
        _compare(folder, files, parameters)
        for theirs, parameter in parameters.items():
            parameter.copy_(_like(parameter, files[theirs].get_tensor(theirs)))


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole value, sharded as a parameter is. All ranks have read the same, so none sends it."""
    if not isinstance(parameter, DTensor):
        return value
    value = value.to(parameter.device, parameter.dtype)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _compare(folder: Path, files: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> None:
    # Older checkpoints keep the rotary frequencies, and some a copy of tied embeddings.
    found = {name for name in files if not name.endswith("rotary_emb.inv_freq")}
    if "lm_head.weight" not in wanted:
        found.discard("lm_head.weight")
    if missing := sorted(wanted.keys() - found):
        raise UserError(
            f"{folder} lacks {missing[0]} and {len(missing) - 1} more tensors of a model with its settings; download "
            "it again, or leave the sizes of model= to the checkpoint"
        )
    if extra := sorted(found - wanted.keys()):
        raise UserError(
            f"{folder} holds {extra[0]} and {len(extra) - 1} more tensors for which a model with its settings has no "
            "use; leave the sizes of model= to the checkpoint"
        )
    for name, parameter in wanted.items():
        if (there := tuple(files[name].get_slice(name).get_shape())) != (here := tuple(parameter.shape)):
            raise UserError(
                f"{folder}: {name} is {there}, and the settings ask for {here}; leave the sizes of model= to the "
                "checkpoint"
            )


@contextmanager
def _tensors(folder: Path) -> Iterator[dict[str, Any]]:
    """The open file of each of a checkpoint's tensors. UserError for files that are missing or damaged."""
    names = _files(folder)
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(safetensors.safe_open(folder / name, framework="pt")) for name in names]
            yield {name: file for file in files for name in file.keys()}  # noqa: SIM118  no mapping
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot read the weights in {folder}: {first_line(error)}; download them again") from None


def _files(folder: Path) -> list[str]:
    """The weight files of a checkpoint. UserError for one that is missing."""
    index = folder / "model.safetensors.index.json"
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if not index.is_file() and found == ["model.safetensors"]:
        return found
    if not index.is_file():
        there = ", ".join(found) or "no safetensors files"
        raise UserError(
            f"{folder} holds {there} and no model.safetensors.index.json; save the model again with "
            "save_pretrained(safe_serialization=True)"
        )
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not {*map(type, where.values())} <= {str}:
        raise UserError(f"{index} has no weight_map; download it again")
    named = {*where.values()}
    if missing := sorted(named - {*found}):
        raise UserError(f"{folder} lacks {missing[0]}, which {index.name} names; download it again")
    return sorted(named)


def save(folder: Path, config: Mapping[str, Any], shapes: Mapping[str, Any], read: Callable[[str], Tensor]) -> int:
    """Write a checkpoint of bfloat16 weights into an empty folder, as `write` does. shapes: of the tensors, by their
    names in a qtrain state dict; read: gives one."""
    own = {theirs: name for name in shapes if (theirs := their_name(name)) is not None}
    return write(folder, config, ((theirs, read(name).to(torch.bfloat16)) for theirs, name in own.items()))


def write(folder: Path, config: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> int:
    """Write a checkpoint into an empty folder: config.json, and the weights by their names there, in files of at most
    SHARD_BYTES. One tensor at a time is in memory. The bytes of the weights. UserError where the disk is full."""
    shards: list[dict[str, Path]] = []  # name -> the file that holds this tensor alone
    in_all = in_shard = 0
    try:
        for number, (name, tensor) in enumerate(tensors):
            if not shards or in_shard + tensor.nbytes > SHARD_BYTES:
                shards.append({})
                in_shard = 0
            alone = shards[-1][name] = folder / f"{number}.part"
            safetensors.torch.save_file({name: tensor.contiguous()}, alone)
            in_shard += tensor.nbytes
            in_all += tensor.nbytes
        files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
        if len(shards) == 1:
            files = ["model.safetensors"]
        for file, shard in zip(files, shards, strict=True):
            _join([*shard.values()], folder / file)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot write {folder}: {first_line(error)}") from error
    if len(shards) > 1:
        where = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": in_all}, "weight_map": where}
        write_synced(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    write_synced(folder / "config.json", json.dumps(config, indent=2) + "\n")
    return in_all


def _join(parts: Sequence[Path], path: Path) -> None:
    """Make one safetensors file of files of one tensor each, which are removed. The format is eight bytes that say how
    long the header is, the header as JSON, and the tensors; the package writes a file only from memory."""
    found = []
    for part in parts:
        with part.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            ((name, tensor),) = json.loads(file.read(length)).items()
        begin, end = tensor["data_offsets"]
        found.append((end - begin, name, tensor, part))
    # Wide elements first, as the package orders them: each tensor then begins at a multiple of its element's size.
    found.sort(key=lambda each: (-each[0] / max(1, math.prod(each[2]["shape"])), each[1]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for size, name, tensor, _ in found:
        header[name] = tensor | {"data_offsets": [begin, begin + size]}
        begin += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for size, _, _, part in found:
            with part.open("rb") as source:
                source.seek(-size, os.SEEK_END)
                shutil.copyfileobj(source, file, 1 << 20)
            part.unlink()
        file.flush()
        os.fsync(file.fileno())
