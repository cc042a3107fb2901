"""Settings of a run: how files are read strictly, every setting, the recipe language, and what a run is known by.

The names below are imported at their first use: families of settings (`qtrain.models`, `qtrain.data`, `qtrain.optim`)
need `qtrain.config.settings` alone, and the schema needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qtrain.config.identity import NOT_IN_HASH, config_hash, differences, hashed_keys, parse_saved
    from qtrain.config.schema import (
        CallbacksConfig,
        Config,
        DebugConfig,
        LoggerConfig,
        TokenizerConfig,
        TrainerConfig,
        check_key,
    )

__all__ = [
    "NOT_IN_HASH",
    "CallbacksConfig",
    "Config",
    "DebugConfig",
    "LoggerConfig",
    "TokenizerConfig",
    "TrainerConfig",
    "check_key",
    "config_hash",
    "differences",
    "hashed_keys",
    "parse_saved",
]
_OF_IDENTITY = ("NOT_IN_HASH", "config_hash", "differences", "hashed_keys", "parse_saved")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"qtrain.config.{'identity' if name in _OF_IDENTITY else 'schema'}"), name)
