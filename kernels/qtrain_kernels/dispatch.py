"""One table: (backend, device) -> the module that has its operations. Chosen once per device and said once; never
fallen back from.

Operations: rotate, unrotate, tensor_scale, encode, operand, fake_quantize, as reference.py defines them.
reference: eager torch, anywhere. compiled: code made for each plan, by a C++ compiler on CPU, by torch.compile on CUDA.
triton: fused kernels on CUDA. auto: compiled where it can work, else reference.
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

from qtrain_kernels import cpu, gpu, graphs, reference

log = logging.getLogger("qtrain")

BACKENDS = ("auto", "reference", "compiled", "triton")


@cache
def get(op: str, backend: str, device_type: str) -> Callable[..., Any]:
    """The function of an operation. ValueError for an unknown backend, or for one that cannot work there."""
    compiled = cpu if device_type == "cpu" else graphs
    modules = {"reference": reference, "compiled": compiled, "triton": gpu}
    return getattr(modules[resolve(backend, device_type)], op)


@cache
def resolve(backend: str, device_type: str) -> str:
    """auto -> the backend in force on a device ("cpu", "cuda"). ValueError as in `get`."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; backends: {', '.join(BACKENDS)}")
    if backend == "auto":
        obstacle = _obstacle_to_compiling(device_type)
        chosen, why = ("reference", f": {obstacle}") if obstacle else ("compiled", "")
        log.info("quantisers on %s run on backend %s%s", device_type, chosen, why)
        return chosen
    obstacles = {"compiled": _obstacle_to_compiling, "triton": gpu.obstacle}
    obstacle = obstacles[backend](device_type) if backend in obstacles else None
    if obstacle:
        raise ValueError(f"backend {backend!r} cannot run on {device_type}: {obstacle}; or ask for backend 'reference'")
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
