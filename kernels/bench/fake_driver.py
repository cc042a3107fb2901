"""A Triton driver for a machine without a GPU: it compiles every kernel for Hopper (sm_90) and launches none.

    import fake_driver
    fake_driver.install()        # before the first launch, in a process without TRITON_INTERPRET=1
    ...                          # backend "triton" now takes CPU tensors
    print(fake_driver.compiled)  # how many variants of each kernel were compiled, or found in Triton's cache
    print(fake_driver.launches)  # how often each kernel would have run

A launch goes the whole way through Triton's JIT (binding, specialisation, front end, PTX, ptxas, the limits of an H100)
except for the launch itself. So a kernel that does not compile fails here as it fails on a GPU, and compiled kernels
land in TRITON_CACHE_DIR. What a kernel should have written is uninitialised memory: no value can be judged here.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

TARGET = GPUTarget("cuda", 90, 32)
DEVICE = "no device (compiled for sm_90)"
H100 = {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}
MAX_THREADS = 1024

compiled: Counter[str] = Counter()
launches: Counter[str] = Counter()


class Utils:
    """What Triton asks for to load a compiled kernel. Nothing is loaded, but the variants are counted."""

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """(module, function, registers, spilled bytes, most threads of a block)."""
        compiled[name] += 1
        return 1, 1, 0, 0, MAX_THREADS

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return H100


class Launcher:
    """Counts the launches of one compiled kernel."""

    def __init__(self, source: Any, metadata: Any):
        self.name: str = metadata.name

    def __call__(self, *arguments: object) -> None:
        launches[self.name] += 1


class Driver:
    """Triton's driver interface, with TARGET as the device."""

    utils = Utils()
    launcher_cls = Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def is_active(self) -> bool:
        return True


def install() -> None:
    """Makes this Triton's driver, and lets backend "triton" take CPU tensors. RuntimeError in Triton's interpreter,
    which compiles nothing."""
    from qtrain_kernels import gpu

    if gpu.obstacle("cpu") is None and not is_active():
        raise RuntimeError("Triton's interpreter is on, and compiles nothing; unset TRITON_INTERPRET")
    driver.set_active(Driver())  # pyright: ignore[reportArgumentType]
    gpu.obstacle = lambda device_type: None


def is_active() -> bool:
    """Whether this process compiles kernels and launches none."""
    return isinstance(driver._active, Driver)
