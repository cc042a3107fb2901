"""What can be evaluated: the model and tokenizer of a run, of one of its checkpoints, of a Hugging Face folder, or of a
GGUF file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.config import Config, TokenizerConfig
from qtrain.config.settings import parse
from qtrain.data.tokenizer import Tokenizer, load_pretrained
from qtrain.errors import UserError, need
from qtrain.models import gguf, hf
from qtrain.models.decoder import Decoder
from qtrain.models.families.llama import Llama
from qtrain.models.hf_config import CONTEXT, read_json, settings_of
from qtrain.runs.directory import RunDirectory
from qtrain.training.build import load_run, load_tokenizer
from qtrain.training.checkpoint import newest

_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Target:
    """A model in eval mode on its device: tokens (B, T) int64, T at most seq_len, -> logits (B, T, V).

    tokenizer_config: by which a text is read with this tokenizer. config: of its run, and step: of its checkpoint; None
    where it is of no run. precision: as trainer.precision.
    """

    name: str
    model: nn.Module
    tokenizer: Tokenizer
    tokenizer_config: TokenizerConfig
    vocab_size: int
    seq_len: int
    device: torch.device
    precision: str
    config: Config | None = None
    step: int | None = None


def load(path: str | Path) -> Target:
    """A run directory (its newest good checkpoint), the folder of one of its checkpoints, or a folder or hub name of a
    Hugging Face checkpoint. A Hugging Face folder whose weights are codes (`qtrain export --to compressed-tensors`) is
    computed by transformers, the format's own reader. A folder with a model.gguf (`--to gguf`) is computed in float32,
    its inputs as they are.

    UserError for what is none of these, and for a tokenizer with tokens beyond the vocabulary.
    """
    folder = Path(path).expanduser()
    step = _STEP.fullmatch(folder.name)
    if step is not None and (folder.parent.parent / "config.yaml").is_file():
        return _of_run(folder.parent.parent, int(step[1]))
    if (folder / "config.yaml").is_file():
        return _of_run(folder, None)
    if (folder / "model.gguf").is_file():
        return _checked(_of_gguf(folder))
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} holds neither a run (config.yaml) nor a Hugging Face checkpoint (config.json); name a run "
            "directory, one of its checkpoints/step-*, or a folder with config.json or model.gguf"
        )
    if folder.is_dir() and read_json(folder / "config.json").get("quantization_config"):
        return _checked(_of_codes(folder))
    return _checked(_of_checkpoint(str(path).removeprefix("hf:")))


def _of_run(path: Path, step: int | None) -> Target:
    directory = RunDirectory(path)
    config = directory.read_config()
    model = load_run(path, step)
    assert isinstance(model, Decoder)
    found = newest(directory.checkpoints, torch.inf if step is None else step)
    if found is None or step not in (None, found[0]):
        raise UserError(f"{directory.checkpoints} holds no good checkpoint of step {step}")
    device = _device(config.trainer.device)
    kept = config.tokenizer if config.tokenizer.kind == "bytes" else _named(str(directory.tokenizer))
    return Target(
        str(path), model.to(device), load_tokenizer(path), kept, model.vocab_size, config.model.seq_len, device,
        config.trainer.precision, config, found[0],
    )  # fmt: skip


def _of_checkpoint(name: str) -> Target:
    settings = parse(Llama, settings_of(name))
    vocab_size = settings.vocab_size
    assert vocab_size is not None  # a checkpoint says it
    model = Decoder(settings, vocab_size)
    hf.load(model, name)
    device, named = _device("auto"), _named(name)
    return Target(
        name, model.eval().to(device), load_pretrained(named), named, vocab_size, settings.seq_len, device, "32-true"
    )


def _of_codes(folder: Path) -> Target:
    need("transformers", "a checkpoint of codes")
    import transformers

    said = read_json(folder / "config.json")
    method = said["quantization_config"].get("quant_method")
    if method != "compressed-tensors":
        raise UserError(
            f"{folder} holds codes in {method!r}, which nothing here reads on this device; evaluate the run that it "
            "was exported from, or export it --to compressed-tensors"
        )
    need("compressed_tensors", "a checkpoint of codes in compressed-tensors")
    groups = said["quantization_config"].get("config_groups", {}).values()
    if any(not (group.get("weights") or {}).get("symmetric", True) for group in groups):
        raise UserError(
            f"{folder} holds zero points, which transformers does not load from packed codes; evaluate the run that it "
            "was exported from"
        )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    theirs(torch.zeros(1, 1, dtype=torch.long))  # the package unpacks in the first forward
    if transform := said["quantization_config"].get("transform_config"):
        from compressed_tensors.transform import TransformConfig, apply_transform_config

        apply_transform_config(theirs, TransformConfig.model_validate(transform))
    device, named, config = _device("auto"), _named(str(folder)), theirs.config
    return Target(
        str(folder), _Logits(theirs).to(device), load_pretrained(named), named, config.vocab_size,
        min(config.max_position_embeddings, CONTEXT), device, "32-true",
    )  # fmt: skip


def _of_gguf(folder: Path) -> Target:
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{folder} holds a model.gguf and no tokenizer.json, by which a text is read; export the run again, or "
            "copy tokenizer.json and tokenizer_config.json of the model beside it"
        )
    model, device, named = gguf.load(folder / "model.gguf"), _device("auto"), _named(str(folder))
    return Target(
        str(folder), model.eval().to(device), load_pretrained(named), named, model.vocab_size, model.config.seq_len,
        device, "32-true",
    )  # fmt: skip


class _Logits(nn.Module):
    """A model of transformers with the interface of ours."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).logits


def _named(place: str) -> TokenizerConfig:
    return TokenizerConfig(kind="huggingface", vocab_size=None, path=place)


def _checked(target: Target) -> Target:
    if target.tokenizer.vocab_size > target.vocab_size:
        raise UserError(
            f"the tokenizer of {target.name} has {target.tokenizer.vocab_size} tokens, and its model a vocabulary of "
            f"{target.vocab_size}; they are of different models: save the model's own tokenizer beside it"
        )
    return target


def _device(asked: str) -> torch.device:
    return torch.device("cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu")
