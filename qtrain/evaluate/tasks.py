"""What can be asked of task files of lm-evaluation-harness before it is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qtrain.errors import UserError, need


def check_task_files(files: Sequence[str | Path], asked_by: str) -> None:
    """UserError for a file that does not exist, and where the extra `eval` is not installed. asked_by: the option or
    setting that names the files."""
    for file in files:
        if not Path(file).is_file():
            raise UserError(
                f"{asked_by}: no such task file: {file}; name a YAML file in lm-evaluation-harness's format"
            )
    need("lm_eval", asked_by)
