"""What a run is known by: a hash of the settings that determine its result.

A run directory, a row of a results file and a trunk are found again by this hash. Three rules keep it true:
- A setting that cannot change the result is not in it: those of NOT_IN_HASH never, others where `_idle` says so.
- A setting is left out as long as it has the value of INTRODUCED, the one that runs had before the setting was there.
  INTRODUCED is frozen: who changes a default in code leaves it alone, and runs of the new default get a new name.
  A setting without an entry is always in the hash, so that a new class of settings needs none.
- A value that says the same as another is written in one way (`_normal`).

The text that a run reads is not in the hash: reading it takes time. `qtrain.data.prepare.same_text` compares it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qtrain.config.recipe import OF_THE_WHOLE_MODEL, LinearRecipe
from qtrain.config.schema import Config
from qtrain.config.settings import Strict, classes_of, is_mapping, parse, proportions

NOT_IN_HASH = (
    "name",  # stands beside the hash
    "run_root",
    "run_dir",
    "force",
    "dry_run",
    "results",
    "retry_failed",
    "backend",  # every backend equals the reference
    "model.init_from",  # a place; model.init_hash is what lies there
    "data.cache_dir",
    "data.num_workers",
    "data.prepare_workers",
    "trainer.device",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.sharding_groups",
    "trainer.all_gather",  # refused where it would change a bit
    "trainer.device_tflops",
    "trainer.device_gigabytes_per_second",
    "trainer.timeout_minutes",
    "trainer.checkpoint_activations",
    "trainer.share_trunk",
    "callbacks",  # how often a run validates is in trainer.early_stop, which counts it
    "logger",
    "debug.detect_anomaly",
    "recipe.source",
    "recipe.deviations",
)
# The value of each setting when it was introduced, or for those of the first version their default then, by the class
# that has it. NEVER change a value here, whatever becomes of the default in the class.
INTRODUCED: dict[str, dict[str, Any]] = {
    "Config": {"seed": 0, "gemm": "auto", "validation": {}, "tune": None},
    "TuneConfig": {"adapter": None, "scales": None, "rows": None, "teacher": None},
    "RowsConfig": {"fraction": 0.25, "refresh_samples": 4096},
    "ScalesConfig": {"bits": 4, "group": None, "moves": None},
    "MovesConfig": {"lr": 1e-2, "beta2": 0.95, "largest_change": 1e-2},
    "TeacherConfig": {"temperature": 1.0, "weight": 1.0},
    "AdapterConfig": {
        "rank": 16,
        "alpha": 32.0,
        "dropout": 0.0,
        "layers": (),
        "pack": False,
        "double_quantization": False,
        "init_from": None,
        "init_hash": None,
    },
    "ModelSettings": {
        "tie_embeddings": False,
        "vocab_size": None,
        "init_std": 0.02,
        "nominal_parameters": None,
        "init_hash": None,
    },
    "Transformer": {
        "n_kv_heads": None,
        "rope_theta": 10000.0,
        "norm_eps": 1e-5,
        "head_dim": None,
        "qkv_bias": False,
        "o_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "rope_scaling": None,
    },
    "Llama": {"family": "llama"},
    "DataSettings": {"document_mask": False},
    "Mixture": {"parts": {}, "weights": {}},
    "TextSettings": {"streaming": False, "max_tokens": None, "val_fraction": 0.05},
    "Stdlib": {},
    "PythonEnv": {"packages": ()},
    "NamedFiles": {"files": (), "val_files": ()},
    "TokenFiles": {"val_fraction": 0.05},
    "Text": {},
    "RowFiles": {"text_field": "text"},
    "Jsonl": {},
    "Chat": {},
    "Parquet": {},
    "HuggingFace": {"path": None, "subset": None, "split": "train", "val_split": None, "text_field": "text"},
    "TokenizerConfig": {"vocab_size": None, "path": None, "eos_token": None},
    "OptimizerSettings": {"weight_decay": 0.1},
    "AdamW": {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8},
    "AdamW8bit": {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "block_size": 256},
    "Schedule": {"warmup_fraction": 0.1, "warmup_steps": None, "start_factor": 0.01, "final_factor": 0.1},
    "Cosine": {},
    "WSD": {"decay_fraction": 0.2},
    "TrainerConfig": {
        "tokens": None,
        "tokens_per_parameter": None,
        "grad_clip": 1.0,
        "precision": "bf16-mixed",
        "compile": False,
        "chunked_loss": False,
        "on_divergence": "stop",
        "on_spike": "ignore",
        "early_stop": None,
    },
    "DebugConfig": {"max_steps": None, "overfit": False},
    "LinearRecipe": {
        "bits": None,
        "format": None,
        "skip": ("lm_head",),
        "overrides": {},
        "first_blocks": 0,
        "last_blocks": 0,
        "high_precision_after": None,
        "redraw": "step",
        "fprop": None,
        "dgrad": None,
        "wgrad": None,
    },
    "QuantSpec": {
        "format": None,
        "scale": None,
        "rounding": "nearest",
        "correction": None,
        "rotation": None,
        "signs": "none",
        "row_rotation": None,
        "sparsity": None,
        "estimator": "ste",
        "clip_scale": 1.0,
        "source": "master",
    },
}

# Settings of versions before that are gone, by class.
REMOVED = {"CallbacksConfig": {"sample_tokens", "sample_prompt"}}


def config_hash(config: Config) -> str:
    """Eight hex digits of the settings that determine the result."""
    text = json.dumps(hashed_keys(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def hashed_keys(config: Config) -> dict[str, Any]:
    """What is hashed, as plain nested data: the settings that determine the result, without those that have the value
    of INTRODUCED.

    ValueError for trainer.precision=auto, which is no result yet: `qtrain.plan.resolve_precision` comes first.
    """
    if config.trainer.precision == "auto":
        raise ValueError("trainer.precision=auto has no hash; resolve it first (qtrain.plan.resolve_precision)")
    return _tree(config, config, is_left_out=_has_introduced_value)


def differences(there: Config, here: Config) -> list[str]:
    """One "key was x, now y" for each setting that determines the result and differs."""
    was, now = (_tree(config, config, is_left_out=lambda *_: False) for config in (there, here))
    return list(_differences(was, now))


def parse_saved(tree: Mapping[str, Any]) -> Config:
    """The settings of a run as its config.yaml has them. A setting that its version did not know yet gets the value of
    INTRODUCED. A setting that only other members of a family have is left out: in the first versions all members had
    all settings, without effect. So are those of REMOVED. UserError as `parse`."""
    tree = _completed(Config, tree)
    trainer = tree.get("trainer")
    if isinstance(trainer, dict) and isinstance(kept := trainer.get("checkpoint_activations"), bool):
        trainer["checkpoint_activations"] = "full" if kept else "none"  # what it was called before there was selective
    return parse(Config, tree)


def introduced(kind: type) -> dict[str, Any]:
    """INTRODUCED of a class of settings, with that of the classes that it inherits from."""
    return {key: value for each in reversed(kind.__mro__) for key, value in INTRODUCED.get(each.__name__, {}).items()}


# ------------------------------------------------------------------------------------------------- the tree


def _tree(config: Config, settings: Strict, is_left_out: Callable[[Strict, str, Any], bool], at: str = "") -> dict:
    """Settings as plain data, without those that cannot change the result and those that `is_left_out`. `at`: their
    place in config, with a dot after it."""
    normal, idle = _normal(config), _idle(config)
    found = {}
    for name in type(settings).model_fields:
        key, value = f"{at}{name}", getattr(settings, name)
        if key in NOT_IN_HASH or key in idle:
            continue
        value = normal[key](value) if key in normal else value
        if is_left_out(settings, name, value):
            continue
        if key == "recipe.overrides":  # the first pattern that matches holds: their order counts
            found[name] = [[pattern, _override(config, other, is_left_out)] for pattern, other in value.items()]
        elif isinstance(value, Strict):
            found[name] = _tree(config, value, is_left_out, f"{key}.")
        elif is_mapping(type(settings), name):  # of sources: what is said of the settings of `data` is said of them too
            found[name] = {other: _tree(config, each, is_left_out, "data.") for other, each in value.items()}
        else:
            found[name] = list(value) if isinstance(value, tuple) else value
    return found


def _override(config: Config, recipe: LinearRecipe, is_left_out: Callable[[Strict, str, Any], bool]) -> dict:
    """A recipe for some layers. What belongs to a whole model has no effect in it."""
    tree = _tree(config, recipe, is_left_out, "recipe.")
    return {"name": recipe.name} | {key: value for key, value in tree.items() if key not in OF_THE_WHOLE_MODEL}


def _has_introduced_value(settings: Strict, name: str, value: Any) -> bool:
    frozen = introduced(type(settings))
    return name in frozen and value == frozen[name]


def _differences(there: Any, here: Any, path: str = "") -> Iterator[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted(there.keys() | here.keys()):
            yield from _differences(there.get(key), here.get(key), f"{path}.{key}" if path else key)
    elif there != here:
        yield f"{path} was {there!r}, now {here!r}"


def _completed(kind: type[Strict], tree: Mapping[str, Any]) -> dict[str, Any]:
    """A saved tree with the settings that it lacks."""
    found = introduced(kind) | dict(tree)
    for name in found.keys() & kind.model_fields.keys():
        value = found[name]
        if is_mapping(kind, name) and isinstance(value, Mapping):
            found[name] = {other: _completed_at(kind, name, each) for other, each in value.items()}
        else:
            found[name] = _completed_at(kind, name, value)
    return found


def _completed_at(kind: type[Strict], name: str, value: Any) -> Any:
    """A value that a setting may have, completed where it is settings."""
    classes = classes_of(kind, name, value)
    if not isinstance(value, Mapping) or len(classes) != 1:
        return value
    others = {key for each in classes_of(kind, name) for key in each.model_fields}
    idle = others - set(classes[0].model_fields) | REMOVED.get(classes[0].__name__, set())
    return _completed(classes[0], {key: each for key, each in value.items() if key not in idle})


# ------------------------------------------------------------------------------------------------- what changes nothing


def _idle(config: Config) -> set[str]:
    """The settings that have no effect beside the others of this config."""
    tokenizer = config.tokenizer
    idle = set()
    if not _redraws(config):
        idle.add("recipe.redraw")
    if config.scheduler.warmup_steps is not None:
        idle.add("scheduler.warmup_fraction")
    if tokenizer.kind != "bpe":
        idle.add("tokenizer.vocab_size")
    if tokenizer.kind != "huggingface":
        idle |= {"tokenizer.path", "tokenizer.eos_token"}
    return idle


def _redraws(config: Config) -> bool:
    """Whether recipe.redraw matters: the recipe draws for its weights, and a step has several micro-batches, of any
    device."""
    trainer = config.trainer
    return config.recipe.redraws and trainer.batch_tokens > trainer.micro_batch_size * config.model.seq_len


def _normal(config: Config) -> dict[str, Callable[[Any], Any]]:
    """By key: a function that writes a value in the way in which all values of the same meaning are written."""
    normal: dict[str, Callable[[Any], Any]] = {
        "data.files": lambda files: tuple(map(_place, files)),
        "data.val_files": lambda files: tuple(map(_place, files)),
        "data.path": lambda path: _place(path) if path and os.path.isdir(_expanded(path)) else path,  # noqa: PTH112
        "data.weights": proportions,
        "tokenizer.path": lambda path: _place(path) if path and os.path.exists(_expanded(path)) else path,  # noqa: PTH110
    }
    every = config.callbacks.val_every_steps
    if every is not None:  # else a part of the budget
        normal["trainer.early_stop"] = lambda count: count and f"{count} validations, each after {every} steps"
    if not config.data.reads_to_the_budget:  # else the budget says how much text is read
        batch = config.trainer.batch_tokens
        normal["trainer.tokens"] = lambda tokens: tokens and max(batch, tokens // batch * batch)
    return normal


def _place(path: str) -> str:
    """A path or glob: relative to the working directory if it is below it, else absolute."""
    full = os.path.normpath(os.path.join(Path.cwd(), _expanded(path)))  # noqa: PTH118 (Path keeps ..)
    return os.path.relpath(full) if Path(full).is_relative_to(Path.cwd()) else full


def _expanded(path: str) -> str:
    """With ~ replaced. Unlike those of pathlib, functions of os.path raise nothing for a user that is not there or a
    name that is too long."""
    return os.path.expanduser(path)  # noqa: PTH111
