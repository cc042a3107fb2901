"""What the benchmarks find on a machine, and what they lack there. Needs the standard library alone.

    python kernels/bench/packages.py    # exits with 1 and the name of what is missing, if anything is

Nothing is installed: a machine with a GPU often reaches no registry.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEEDED = ("torch", "triton", "qtrain_kernels", "qtrain.training.session", "qtrain.train")  # and what these import


def check() -> None:
    """Ends the process, naming the package, if what the benchmarks import is not there."""
    for module in NEEDED:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            others = ", ".join(missing()) or "nothing"
            sys.exit(
                f"the benchmarks need the package {error.name!r}, which {sys.executable} does not have; of the "
                f"dependencies in pyproject.toml it lacks: {others}. Install them, or put a folder that has them on "
                f"PYTHONPATH (for the project itself: {ROOT}:{ROOT / 'kernels'}), or use another interpreter: "
                f"make bench-gpu PYTHON=/path/to/python"
            )


def missing() -> list[str]:
    """The dependencies in pyproject.toml that this interpreter lacks, whether the benchmarks need them or not."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["train"], *extras["report"]]
    names = [re.split(r"[^\w.-]", line)[0] for line in lines]
    return [name for name in names if version(name) is None]


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def facts(device: str) -> dict[str, Callable[[], str]]:
    """Named facts of this machine; of the GPU too, where the device is one."""
    import torch

    found: dict[str, Callable[[], str]] = {
        "python": lambda: f"{platform.python_version()}, {sys.executable}",
        "torch": lambda: f"{torch.__version__}, CUDA {torch.version.cuda}",
        "triton": lambda: str(version("triton")),
        "missing packages": lambda: ", ".join(missing()) or "none",
        "C compiler, which Triton needs": lambda: str(
            shutil.which(os.environ.get("CC", "gcc")) or shutil.which("clang")
        ),
        "Python.h, which Triton needs": lambda: str((Path(sysconfig.get_path("include")) / "Python.h").is_file()),
        "cores": lambda: str(os.cpu_count()),
        "TRITON_CACHE_DIR": lambda: os.environ.get("TRITON_CACHE_DIR", "not set"),
    }
    if device != "cuda":
        return found
    properties = torch.cuda.get_device_properties(0)
    return found | {
        "device": lambda: properties.name,
        "compute capability": lambda: f"{properties.major}.{properties.minor}",
        "multiprocessors": lambda: str(properties.multi_processor_count),
        "memory": lambda: f"{properties.total_memory / 2**30:.1f} GiB",
        "L2": lambda: f"{properties.L2_cache_size / 2**20:.0f} MiB",
        "driver, largest clocks, power": clocks,
    }


def clocks() -> str:
    """By nvidia-smi. OSError where there is none."""
    asked = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    check()
