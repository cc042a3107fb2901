"""What runs where, chosen once per device and said once.

Backends, whose modules have the operations that reference.py defines (random_signs, rotate, unrotate, quantize,
fake_quantize, pack, unpack, join, split). FUSED: whether they also quantise into other layouts than `Layout.held`
(writes), along both dims at once (quantize_both), and what is packed (requantizes), and multiply by scales what leaves
a rotation:
- reference: eager torch, on any device.
- compiled: C++ that is made for each plan, on CPU.
- triton: fused kernels, on CUDA.
- auto: compiled on CPU and triton on CUDA where these can work, else reference. A plan or a rotation that a backend
  has no kernel for is the reference's under auto, and refused under its name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import torch

from qtrain_kernels import cpu, gpu, reference
from qtrain_kernels.plans import Plan, Rotation

if TYPE_CHECKING:
    from qtrain_kernels.qtensor import Layout

log = logging.getLogger("qtrain")

BACKENDS = ("auto", "reference", "compiled", "triton")
MODULES = {"reference": reference, "compiled": cpu, "triton": gpu}
FASTEST = {"cpu": "compiled", "cuda": "triton"}  # of each device


def module(
    backend: str, device_type: str, plan: Plan | None = None, rotation: Rotation | None = None, lines: int = 1
) -> Any:
    """Of a backend on a device; plan, rotation: what it will be given; lines: that share a block scale. ValueError for
    an unknown backend, or for one that cannot work there."""
    chosen = resolve(backend, device_type)
    if backend == "auto" and chosen != "reference" and _lacks_kernel(chosen, plan, rotation and rotation.size, lines):
        chosen = "reference"
    return MODULES[chosen]


def get(
    op: str, backend: str, device_type: str, plan: Plan | None = None, rotation: Rotation | None = None
) -> Callable[..., Any]:
    """The function of an operation; see `module`."""
    return getattr(module(backend, device_type, plan, rotation), op)


@lru_cache(4096)
def few_rows(backend: str, device_type: str, layout: Layout) -> Any:
    """The module whose `FewRows` multiplies few rows, up to its `most`, by a weight of this layout in its bits. None
    where products are of the dequantised weight: on the reference, and where `lacks` of the backend's module names a
    reason."""
    from qtrain_kernels import few_rows, gpu_few_rows  # which need this module

    found = {"compiled": few_rows, "triton": gpu_few_rows}.get(resolve(backend, device_type))
    return None if found is None or found.lacks(layout) else found


@cache
def resolve(backend: str, device_type: str) -> str:
    """auto -> the backend in force on a device ("cpu", "cuda"). ValueError as in `get`."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; backends: {', '.join(BACKENDS)}")
    if backend == "auto":
        fastest = FASTEST.get(device_type, "reference")
        reason = obstacle(fastest, device_type)
        chosen, why = ("reference", f": {reason}") if reason else (fastest, "")
        log.info("quantisers on %s run on backend %s%s", device_type, chosen, why)
        return chosen
    reason = obstacle(backend, device_type)
    if reason:
        raise ValueError(f"backend {backend!r} cannot run on {device_type}: {reason}; or ask for backend 'reference'")
    return backend


@cache
def _lacks_kernel(chosen: str, plan: Plan | None, size: int | None, lines: int) -> bool:
    """Whether a backend has no kernel for a plan, whose blocks hold so many lines, or a rotation of this size; said
    once."""
    if chosen == "triton":
        reason = gpu.missing_kernel(plan, size, lines)
    else:
        reason = None if plan is None else MODULES[chosen].KNOWS.lacks(plan)
    if reason:
        log.info("backend auto takes the reference: %s", reason)
    return reason is not None


def obstacle(backend: str, device_type: str) -> str | None:
    """Why a backend cannot work on a device, with the remedy; None if it can."""
    if backend == "triton":
        return gpu.obstacle(device_type)
    if backend == "compiled":
        return _cpp_obstacle() if device_type == "cpu" else f"its C++ is for the CPU; on {device_type} ask for 'auto'"
    return None


def _cpp_obstacle() -> str | None:
    """Tries the compiler on the least of what cpu.py will ask of it."""
    try:
        cpu.rotate(torch.zeros(1, 2, 1, device="cpu"), Rotation(2))
    except RuntimeError as error:
        return str(error)
    return None
