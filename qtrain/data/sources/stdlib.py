from __future__ import annotations

import os
import sysconfig
from pathlib import Path
from typing import Literal

from qtrain.data.base import Source, TextSettings
from qtrain.data.files import File, code_source
from qtrain.errors import UserError

# Folders of the standard library that are not code to learn from, and a file that differs with the build machine.
NOT_STDLIB = {"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "__pycache__"}
BUILD_DEPENDENT = "_sysconfigdata"


class Stdlib(TextSettings):
    """The code of Python's own standard library."""

    source: Literal["stdlib"]

    def open(self) -> tuple[Source, None]:
        root = Path(sysconfig.get_paths()["stdlib"])
        found = []
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if name not in NOT_STDLIB]
            code = (name for name in names if name.endswith(".py") and not name.startswith(BUILD_DEPENDENT))
            found += [File((path := Path(folder, name)).relative_to(root).as_posix(), path) for name in code]
        if not found:
            raise UserError(f"data.source=stdlib found no .py files under {root}; use data=text with files of your own")
        return code_source(str(self), sorted(found)), None
