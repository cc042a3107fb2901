"""One table: (operation, backend) -> function. Chosen once per device and said once; never fallen back from.

reference: eager torch, anywhere. compiled: the same functions through torch.compile; needs a C++ compiler on CPU and
Triton on CUDA. auto: compiled where it can work, else reference.
"""

from __future__ import annotations

import logging
import subprocess
import sysconfig
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

from qtrain_kernels import compiled, reference

log = logging.getLogger("qtrain")

TABLE: dict[tuple[str, str], Callable[..., tuple]] = {
    ("encode", "reference"): reference.encode,
    ("encode", "compiled"): compiled.encode,
    ("operand", "reference"): reference.operand,
    ("operand", "compiled"): compiled.operand,
}


def get(op: str, backend: str, device_type: str) -> Callable[..., tuple]:
    """The function of an operation. ValueError for an unknown backend, or for `compiled` where it cannot work."""
    return TABLE[op, resolve(backend, device_type)]


@cache
def resolve(backend: str, device_type: str) -> str:
    """auto -> the backend in force on a device ("cpu", "cuda"). ValueError as in `get`."""
    obstacle = _obstacle_to_compiling(device_type)
    if backend == "auto":
        chosen, why = ("reference", f": {obstacle}") if obstacle else ("compiled", "")
        log.info("quantisers on %s run on backend %s%s", device_type, chosen, why)
        return chosen
    if backend == "compiled" and obstacle:
        raise ValueError(f"backend 'compiled' cannot run on {device_type}: {obstacle}; or ask for backend 'reference'")
    if backend not in ("reference", "compiled"):
        raise ValueError(f"unknown backend {backend!r}; backends: auto, reference, compiled")
    return backend


def _obstacle_to_compiling(device_type: str) -> str | None:
    """Why torch.compile cannot work there, with the remedy; None if it can."""
    if device_type == "cuda":
        return None if find_spec("triton") else "triton is not installed; install it"
    if device_type != "cpu":
        return f"torch.compile of these functions is not tried on {device_type}"
    return _cpp_obstacle()


def _cpp_obstacle() -> str | None:
    """Tries what inductor will need: a C++ compiler, the C++ library, OpenMP, and Python's headers."""
    from torch._inductor import cpp_builder, exc

    try:
        compiler = cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError):
        return "no C++ compiler was found; install g++ or set CXX"
    source = "#include <Python.h>\n#include <omp.h>\n#include <vector>\n"
    include = f"-I{sysconfig.get_path('include')}"
    trial = subprocess.run(
        [compiler, "-std=c++17", "-fsyntax-only", include, "-x", "c++", "-"],
        input=source,
        capture_output=True,
        text=True,
        check=False,
    )
    if trial.returncode == 0:
        return None
    missing = trial.stderr.strip().splitlines()[0] if trial.stderr.strip() else "it failed"
    return f"the C++ compiler {compiler} lacks a header ({missing}); install the headers of C++, OpenMP and Python"
