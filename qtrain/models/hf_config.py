"""The settings of Hugging Face checkpoints of the Llama family. Importing it imports no torch.

Llama 2 and 3, Mistral, Qwen2, Qwen2.5, Qwen3 (dense) and SmolLM are one model here with different settings. What a
checkpoint asks for beyond them is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, BaseModel, Field, StrictInt, ValidationError, field_validator

from qtrain.errors import UserError, first_line, visible

CONTEXT = 2048  # seq_len where none is asked for: a checkpoint's own would be up to 131,072 tokens a sample
EDGE = 1 << 20  # bytes of each end of a weight file that its hash reads

# model_type -> which linear layers have a bias by itself, and whether queries and keys have a norm
_KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}


def find(name: str) -> Path:
    """The folder of a checkpoint: a local one, or that of a name on the hub, downloaded. UserError for neither."""
    folder, shown = Path(os.path.expanduser(name)), visible(name)  # noqa: PTH111  a name may be none of a path
    if not name:
        raise UserError("model=hf:FOLDER needs the folder or name of a checkpoint, after the colon")
    if os.path.isdir(folder):  # noqa: PTH112
        return folder
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or os.path.isfile(folder):  # noqa: PTH113
        raise UserError(f"no checkpoint in {shown}: it is no folder; give the one that holds config.json")
    import huggingface_hub

    try:
        patterns = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*"]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # network, hub, permission and cache errors share no base class
        raise UserError(
            f"no checkpoint {shown}: it is no local folder, and the Hugging Face hub did not give it "
            f"({first_line(error)}); "
            "give a folder with config.json and safetensors files, or fill HF_HOME where there is a network"
        ) from error


def settings_of(name: str, seq_len: int | None = None) -> dict[str, Any]:
    """The model settings of a checkpoint, with init_from and init_hash. seq_len: the tokens at once that are asked for;
    None for the least of the checkpoint's and CONTEXT. UserError for a folder that holds none, and for an architecture
    that is not of the Llama family or asks for what it does not have."""
    folder = find(name)
    path = folder / "config.json"
    try:
        settings = _settings(_Config.model_validate(read_json(path)), path, seq_len)
    except ValidationError as error:
        first = error.errors()[0]
        said = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise UserError(f"{path} is damaged ({said}); save the model again with save_pretrained") from None
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name if Path(name).expanduser().is_dir() else name)
    return {"family": "llama", "name": slug, **settings, "init_from": name, "init_hash": _hash(folder)}


class _Rope(BaseModel):
    """rope_parameters of transformers 5, or rope_scaling of 4, which calls rope_type "type" in old files."""

    rope_type: str = Field("default", validation_alias=AliasChoices("rope_type", "type"))
    rope_theta: float | None = None
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None


class _Config(BaseModel):
    """What the code reads of a config.json, under transformers' names and with its defaults."""

    model_type: str
    hidden_size: StrictInt
    num_hidden_layers: StrictInt
    num_attention_heads: StrictInt
    num_key_value_heads: StrictInt | None = None
    head_dim: StrictInt | None = None
    intermediate_size: StrictInt
    max_position_embeddings: StrictInt
    vocab_size: StrictInt
    tie_word_embeddings: bool = False
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope: _Rope = Field(
        default_factory=lambda: _Rope.model_validate({}),
        validation_alias=AliasChoices("rope_parameters", "rope_scaling"),
    )
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"
    sliding_window: int | None = None
    use_sliding_window: bool | None = None
    partial_rotary_factor: float = 1.0
    quantization_config: dict[str, Any] | None = None

    @field_validator("rope", mode="before")
    @classmethod
    def _none_is_default(cls, rope: Any) -> Any:
        return rope or {}


def _settings(config: _Config, path: Path, seq_len: int | None) -> dict[str, Any]:
    seq_len = seq_len or min(config.max_position_embeddings, CONTEXT)
    if config.model_type not in _KINDS:
        raise UserError(
            f"{path}: model_type {config.model_type!r} is not of the Llama family; model=hf: reads "
            f"{', '.join(_KINDS)}. qtrain.convert quantises any transformers model in a training loop of your own"
        )
    if (unsupported := _unsupported(config, seq_len)) is not None:
        raise UserError(f"{path}: {unsupported}")
    heads, width = config.num_attention_heads, config.head_dim
    return {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": heads,
        "n_kv_heads": None if config.num_key_value_heads == heads else config.num_key_value_heads,
        "head_dim": None if width and width * heads == config.hidden_size else width,
        "ffn_dim": config.intermediate_size,
        "seq_len": seq_len,
        "vocab_size": config.vocab_size,
        "tie_embeddings": config.tie_word_embeddings,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.rope_theta or config.rope_theta,
        "rope_scaling": _rope_scaling(config.rope),
        "qkv_bias": config.attention_bias,
        "o_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        **_KINDS[config.model_type],
    }


def _unsupported(config: _Config, seq_len: int) -> str | None:
    """What changes the computation of seq_len tokens and has no setting here."""
    has_window = config.model_type == "mistral" if config.use_sliding_window is None else config.use_sliding_window
    window = config.sliding_window if has_window else None
    if config.hidden_act != "silu":
        return f"hidden_act {config.hidden_act!r} is not supported; the Llama family's is silu"
    if config.quantization_config:
        method = config.quantization_config.get("quant_method")
        return f"the weights are quantised ({method}); give the checkpoint that they were made from"
    if window is not None and window < seq_len:
        return (
            f"attention in a sliding window of {window} tokens is not supported, and model.seq_len is {seq_len}; set "
            f"it to at most {window}"
        )
    if config.partial_rotary_factor != 1:
        return f"partial_rotary_factor {config.partial_rotary_factor} is not supported; all of a head is rotated"
    if config.rope.rope_type not in ("default", "llama3"):
        return f"rope_type {config.rope.rope_type!r} is not supported; there are: default, llama3"
    return None


def _rope_scaling(rope: _Rope) -> dict[str, Any] | None:
    """Checked where the model's settings are."""
    if rope.rope_type == "default":
        return None
    factors = rope.model_dump(include={"factor", "low_freq_factor", "high_freq_factor"})
    return factors | {"original_seq_len": rope.original_max_position_embeddings}


def _hash(folder: Path) -> str:
    """Hex digits that change with the settings and weights: of config.json, and of each weight file's name, size and
    first and last MiB, its header among them. Reading all of a large checkpoint at each start would take minutes."""
    total = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        total.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            total.update(file.read(EDGE))
            file.seek(max(0, path.stat().st_size - EDGE))
            total.update(file.read(EDGE))
    return total.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} holds no {path.name}: it is no Hugging Face checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path} ({first_line(error)}); download it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no settings; download it again")
    return found
