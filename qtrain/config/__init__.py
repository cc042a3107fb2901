"""Settings of a run: how files are read strictly, every setting, the recipe language, and what a run is known by."""

from qtrain.config.identity import NOT_IN_HASH, config_hash, differences, hashed_keys, parse_saved
from qtrain.config.schema import (
    CallbacksConfig,
    Config,
    DataConfig,
    DebugConfig,
    LoggerConfig,
    ModelConfig,
    TokenizerConfig,
    TrainerConfig,
    check_key,
)

__all__ = [
    "NOT_IN_HASH",
    "CallbacksConfig",
    "Config",
    "DataConfig",
    "DebugConfig",
    "LoggerConfig",
    "ModelConfig",
    "TokenizerConfig",
    "TrainerConfig",
    "check_key",
    "config_hash",
    "differences",
    "hashed_keys",
    "parse_saved",
]
