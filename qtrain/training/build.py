"""The model of a run, and the device it trains on."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

from qtrain.config import Config
from qtrain.data.tokenizer import Tokenizer, load_kept
from qtrain.errors import UserError
from qtrain.models import hf
from qtrain.models.decoder import Decoder
from qtrain.plan import computes_in_high_precision, make_plan
from qtrain.quant import (
    QuantLinear,
    Report,
    check_quantized_gather,
    convert,
    pack,
    quant_linears,
    set_high_precision,
)
from qtrain.quant.adapter import adapters, reserve_beside
from qtrain.runs.directory import RunDirectory
from qtrain.training import tune
from qtrain.training.checkpoint import (
    compare,
    holds_codes,
    newest,
    refuse_earlier_format,
    restore,
    shapes,
    tensors_of,
    values_of,
    whole_number,
)
from qtrain.training.initialize import DEFERRED, DeferredWeights
from qtrain_kernels.cpu import compiler


def pick_device(config: Config) -> torch.device:
    """The device to train on; a dry run needs but one of several. UserError when the one asked for is not there, or
    cannot do what is asked."""
    asked, count = config.trainer.device, config.trainer.devices
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "cuda" and found == 0:
        raise UserError(f"trainer.device=cuda: torch {torch.__version__} finds no CUDA device; use trainer.device=cpu")
    device = "cuda" if asked != "cpu" and found else "cpu"
    if device == "cuda" and count > found and not config.dry_run:
        raise UserError(f"trainer.devices={count}: this machine has {found} CUDA devices; use trainer.devices={found}")
    if device == "cuda" and config.data.document_mask and config.trainer.precision == "32-true":
        raise UserError(
            "data.document_mask=true on CUDA is torch's attention of variable lengths, which has no float32, and "
            "trainer.precision is 32-true; set trainer.precision=bf16-mixed or data.document_mask=false"
        )
    if device == "cpu" and config.trainer.compile:
        try:
            compiler()
        except RuntimeError as error:
            raise UserError(f"trainer.compile=true: {error}, or leave trainer.compile at false") from None
    return torch.device(device)


def build_model(config: Config, vocab_size: int, *, pretrained: bool = False) -> Decoder:
    """The model as it stands before step 0, a function of the settings alone: the global random state is left as it
    was, the weights depend on config.seed. pretrained: read those of model.init_from, and the adapter of
    tune.adapter.init_from, where the settings name one; else it has their structure alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = _converted(config, vocab_size)
        if pretrained and config.model.init_from:
            hf.load(model, config.model.init_from)
        tune.apply(model, config)
        adapter = config.tune and config.tune.adapter
        if pretrained and adapter and adapter.init_from:
            tune.load_adapter(model, config, adapter.init_from)
        return model


def build_teacher(config: Config, vocab_size: int, device: torch.device) -> Decoder | None:
    """The pretrained model that tune.teacher distils from, frozen, in the compute dtype, on a device; None where there
    is none."""
    if config.tune is None or config.tune.teacher is None:
        return None
    with torch.random.fork_rng(devices=[]):
        teacher = Decoder(config.model, vocab_size)
    assert config.model.init_from is not None, "check_tune requires it"
    hf.load(teacher, config.model.init_from)
    dtype = torch.bfloat16 if config.trainer.precision == "bf16-mixed" else torch.float32
    return teacher.requires_grad_(False).eval().to(device, dtype)


def build_without_weights(config: Config, vocab_size: int) -> Decoder:
    """`build_model`, whose matrices have no memory yet: `parallel.shard` gives each rank its part of them, so that no
    process ever holds the whole model."""
    with DeferredWeights(config.seed) as deferred:
        model = _converted(config, vocab_size)
    model.__dict__[DEFERRED] = deferred
    return model


def _converted(config: Config, vocab_size: int) -> Decoder:
    model = Decoder(config.model, vocab_size)
    convert(model, config.recipe, seed=config.seed, backend=config.backend, gemm=config.gemm)
    return model


def check_model(config: Config) -> Report:
    """What the recipe will convert, found out on shapes alone, before any data is prepared. UserError for a width that
    the recipe's blocks do not divide, and for weights that trainer.all_gather=quantized cannot gather."""
    with torch.device("meta"):
        model = Decoder(config.model, vocab_size=1)
    report = convert(model, config.recipe, seed=config.seed, backend=config.backend, gemm=config.gemm)
    if config.trainer.chunked_loss and isinstance(model.lm_head, QuantLinear):
        raise UserError(
            f"trainer.chunked_loss=true takes the head's product by chunks, and recipe {config.recipe.name} quantises "
            "lm_head as a whole; add lm_head to recipe.skip, or set trainer.chunked_loss=false"
        )
    if config.recipe.high_precision_after == 0 and any(layer.numerics.learns for layer in quant_linears(model)):
        raise UserError(
            f"recipe {config.recipe.name} learns scales in quantised steps, and recipe.high_precision_after=0 leaves "
            "none; raise it, or set recipe=bf16"
        )
    if config.trainer.all_gather == "quantized":
        check_quantized_gather(model, config.trainer.shards)
    tune.check_tune(config)
    with torch.device("meta"):
        tune.apply(model, config)
    if config.trainer.chunked_loss and "lm_head" in adapters(model):
        raise UserError(
            "trainer.chunked_loss=true takes the head's product by chunks, without the adapter that "
            "tune.adapter.layers puts beside lm_head; leave lm_head out there, or set trainer.chunked_loss=false"
        )
    return report


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a run directory. UserError when it holds no run, or one of a version that kept no tokenizer."""
    directory = RunDirectory(Path(path).expanduser())
    return load_kept(directory.read_config().tokenizer, directory.tokenizer)


def load_run(path: str | Path, step: int | None = None) -> nn.Module:
    """The model of a run directory, converted as it was trained, with the weights of its newest good checkpoint, or of
    the newest up to and with `step`, in eval mode on the CPU. UserError when the directory holds no run or no such
    checkpoint."""
    directory = RunDirectory(Path(path).expanduser())
    config = directory.read_config()
    found = newest(directory.checkpoints, math.inf if step is None else step)
    if found is None:
        refuse_earlier_format(directory.checkpoints)
        raise UserError(
            f"{directory.path} has no checkpoint " + ("yet" if step is None else f"of step {step} or before")
        )
    step, folder = found
    vocab_size = whole_number(folder, values_of(folder), "vocab_size")
    with torch.device("meta"):  # settings may ask for any size: the memory is taken for what the checkpoint holds
        compare(folder, tensors_of(_as_saved(folder, config, vocab_size)))
    model = _as_saved(folder, config, vocab_size)
    restore(folder, model)
    plan = make_plan(config, vocab_size=vocab_size)
    set_high_precision(model, computes_in_high_precision(config, plan, step - 1))  # as in its last step
    return model.eval()


def _as_saved(folder: Path, config: Config, vocab_size: int) -> Decoder:
    """A model for the tensors of a checkpoint: packed where that holds codes, which a run that tunes says itself."""
    model = build_model(config, vocab_size)
    if config.tune is None and holds_codes(folder):
        pack(model)
        reserve_beside(model, shapes(folder))
    return model
