"""What runs where, chosen once per device and said once; never fallen back from.

One table: (backend, device) -> the module that has its operations.

Operations: rotate, unrotate, tensor_scale, encode, operand, fake_quantize, pack, unpack, join, split, as reference.py
defines them.
reference: eager torch, anywhere. compiled: code made for each plan, by a C++ compiler on CPU, by torch.compile on CUDA.
triton: fused kernels on CUDA. auto: compiled where it can work, else reference.

GEMMs: auto multiplies integer codes as INT8, exactly, on the devices that have it, and all else as float, which is
values in the compute dtype. fp8 multiplies values of few bits as FP8 besides, whose sums some devices take in fewer
bits. fp4, on FP4 units, has no kernel yet.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from qtrain_kernels import cpu, gpu, graphs, reference

log = logging.getLogger("qtrain")

GEMMS = ("auto", "float", "fp8", "fp8_fast", "fp4")
FP8_GEMMS = ("fp8", "fp8_fast")  # fast: sums as Hopper's FP8 units keep them, without promotion to float32
EIGHT_BIT_DEVICES = ("cpu", "cuda")
BACKENDS = ("auto", "reference", "compiled", "triton")


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


def resolve_gemm(gemm: str, held: str, device_type: str) -> str:
    """How a product is taken on a device, int8 | fp8 | float, whose operands fit `held`, one of these. ValueError for
    an unknown gemm, or one that the device lacks."""
    if gemm not in GEMMS:
        raise ValueError(f"unknown gemm {gemm!r}; gemms: {', '.join(GEMMS)}")
    if gemm == "fp4":
        raise ValueError(
            "gemm 'fp4' needs FP4 units (sm_100), for which there is no kernel yet; ask for 'auto' or 'fp8'"
        )
    eight_bit = device_type in EIGHT_BIT_DEVICES
    if gemm in FP8_GEMMS and (not eight_bit or (device_type == "cuda" and torch.cuda.get_device_capability() < (8, 9))):
        raise ValueError(f"gemm {gemm!r} cannot run on {device_type}: it has no FP8 product; ask for gemm 'auto'")
    if gemm == "float" or not eight_bit or (held == "fp8" and gemm not in FP8_GEMMS):
        return "float"
    return held


def _obstacle_to_compiling(device_type: str) -> str | None:
    """Why nothing can be compiled there, with the remedy; None if it can."""
    if device_type == "cuda":
        return None if find_spec("triton") else "triton is not installed; install it"
    if device_type != "cpu":
        return f"nothing is compiled for {device_type}"
    return _cpp_obstacle()


def _cpp_obstacle() -> str | None:
    """Tries the compiler on the least of what cpu.py will ask of it."""
    try:
        cpu.rotate(torch.zeros(1, 2, 1, device="cpu"), reference.Rotation(2))
    except RuntimeError as error:
        return str(error)
    return None
