"""One table: (backend, device) -> the module that has its operations. Chosen once per device and said once; never
fallen back from.

Operations: rotate, unrotate, tensor_scale, encode, operand, as reference.py defines them.
reference: eager torch, anywhere. compiled: code made for each plan, by a C++ compiler on CPU, by torch.compile on CUDA.
auto: compiled where it can work, else reference.
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from qtrain_kernels import cpu, graphs, reference

log = logging.getLogger("qtrain")

COMPILED: dict[str, ModuleType] = {"cpu": cpu, "cuda": graphs}


def get(op: str, backend: str, device_type: str) -> Callable[..., Any]:
    """The function of an operation. ValueError for an unknown backend, or for `compiled` where it cannot work."""
    chosen = resolve(backend, device_type)
    return getattr(COMPILED[device_type] if chosen == "compiled" else reference, op)


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
    """Why nothing can be compiled there, with the remedy; None if it can."""
    if device_type == "cuda":
        return None if find_spec("triton") else "triton is not installed; install it"
    if device_type != "cpu":
        return f"nothing is compiled for {device_type}"
    return _cpp_obstacle()


def _cpp_obstacle() -> str | None:
    """Tries what cpu.py will ask of the compiler."""
    try:
        compiler = cpu.compiler()
    except RuntimeError as error:
        return str(error)
    source = "#include <omp.h>\n#include <cstring>\nint main() { return omp_get_max_threads() > 0 ? 0 : 1; }\n"
    command = [compiler, *cpu.flags(), "-x", "c++", "-", "-o", "/dev/null"]
    trial = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    if trial.returncode == 0:
        return None
    missing = trial.stderr.strip().splitlines()[0] if trial.stderr.strip() else "it failed"
    return f"the C++ compiler {compiler} cannot build ({missing}); install the headers of C++ and OpenMP"
