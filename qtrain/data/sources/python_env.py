from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path
from typing import Literal

from pydantic import model_validator

from qtrain.data.base import Names, Source, TextSettings
from qtrain.data.files import File, code_source
from qtrain.errors import UserError


class PythonEnv(TextSettings):
    """The code of installed distributions.

    packages: names of the distributions.
    """

    source: Literal["python_env"]
    packages: Names = ()

    @model_validator(mode="after")
    def _complete(self) -> PythonEnv:
        if not self.packages:
            raise ValueError("data.source=python_env needs data.packages, for example data.packages=[torch,numpy]")
        return self

    def open(self) -> tuple[Source, None]:
        installed = {_canonical(dist.metadata["Name"]): dist for dist in importlib.metadata.distributions()}
        missing = [name for name in self.packages if _canonical(name) not in installed]
        if missing:
            raise UserError(
                f"data.source=python_env reads packages that are not installed: {', '.join(missing)}; install them, or "
                "leave them out of data.packages"
            )
        found = []
        for name in sorted({_canonical(name) for name in self.packages}):
            for file in installed[name].files or ():
                if file.suffix == ".py" and ".." not in file.parts:
                    found.append(File(f"{name}/{file.as_posix()}", Path(str(file.locate()))))
        files = [file for file in sorted(found) if file.path.is_file()]
        if not files:
            named = ", ".join(self.packages)
            raise UserError(f"data.source=python_env found no .py files in {named}; use data=stdlib")
        return code_source(str(self), files), None


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
