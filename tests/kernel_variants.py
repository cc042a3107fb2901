"""Compiles every kernel variant that tests/test_triton.py launches, for compute capability 9.0; needs no GPU.

    python tests/kernel_variants.py                    # all of about 1200: 4 minutes, then a second each
    python tests/kernel_variants.py --seconds 280      # stops then, with exit status 2; the next run goes on

The tests run once in Triton's interpreter, where each launch is noted: kernel, kinds of arguments, warps. The notes
are kept in --variants, and are made anew where that file is missing; delete it after a change of kernels or tests. Then
each variant is launched under a driver that compiles and launches nothing (kernels/bench/fake_driver.py). What is
compiled lies in TRITON_CACHE_DIR, which serves a GPU of this kind under the same Triton.
"""

from __future__ import annotations

import argparse
import inspect
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
NOTES = "QTRAIN_KERNEL_VARIANTS"  # environment: where a pytest process with this file as its plugin notes the launches


class Pointer(NamedTuple):
    """A tensor as Triton specialises for it."""

    dtype: torch.dtype
    aligned: bool  # to 16 bytes


class Variant(NamedTuple):
    """One compiled kernel."""

    module: str
    kernel: str
    arguments: tuple[Any, ...]
    warps: int


def kind_of(argument: object, parameter: inspect.Parameter) -> object:
    """What Triton specialises for: 1, multiples of 16 and other integers; alignment; constants as they are."""
    if isinstance(argument, Tensor):
        return Pointer(argument.dtype, argument.data_ptr() % 16 == 0)
    if type(argument) is int and argument != 1 and "constexpr" not in str(parameter.annotation):
        return 16 if argument % 16 == 0 else 17
    return argument


def example_of(kind: object) -> object:
    """An argument of this kind."""
    if not isinstance(kind, Pointer):
        return kind
    whole = torch.zeros(64, dtype=kind.dtype)
    return whole[(-whole.data_ptr() // whole.itemsize) % (16 // whole.itemsize) + (not kind.aligned) :]


# ------------------------------------------------------------------------------- noting launches, in the interpreter


def pytest_configure(config: pytest.Config) -> None:
    """As a plugin: puts a note before each launch."""
    from qtrain_kernels import gpu

    noted: dict[Variant, None] = {}
    launch = gpu.launch

    def noting(kernel: Any, x: Tensor, tile: Any, *arguments: object, **size: Any) -> None:
        parameters = inspect.signature(kernel.fn).parameters.values()
        kinds = tuple(map(kind_of, (x, *arguments), parameters))
        noted[Variant(kernel.fn.__module__, kernel.fn.__name__, kinds, tile.warps)] = None
        launch(kernel, x, tile, *arguments, **size)

    gpu.launch = noting
    config.add_cleanup(lambda: Path(os.environ[NOTES]).write_bytes(pickle.dumps(list(noted))))


def record(path: Path) -> None:
    """Runs the tests in the interpreter. RuntimeError if one fails."""
    unfinished = path.with_suffix(".part")
    folders = (ROOT, ROOT / "kernels", ROOT / "tests")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", NOTES: str(unfinished)}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, folders))
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "kernel_variants"]
    done = subprocess.run([*tests, str(ROOT / "tests" / "test_triton.py")], cwd=ROOT, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"tests/test_triton.py failed in the interpreter (exit status {done.returncode})")
    unfinished.replace(path)


# ------------------------------------------------------------------------------------------------ compiling for a GPU


def compile_all(variants: list[Variant], seconds: float) -> tuple[int, list[str]]:
    """How many were compiled, all or as many as there was time for, and what failed, with its error."""
    import fake_driver

    from qtrain_kernels.gpu import UNFUSED

    fake_driver.install()
    end, failed = time.monotonic() + seconds, []
    for count, variant in enumerate(variants):
        if time.monotonic() > end:
            return count - len(failed), failed
        kernel = getattr(__import__(variant.module, fromlist=[variant.kernel]), variant.kernel)
        try:
            kernel[(1,)](*map(example_of, variant.arguments), num_warps=variant.warps, **UNFUSED)
        except Exception as error:  # whatever a compiler's front end raises
            failed.append(f"{variant.kernel}: {type(error).__name__}: {error}")
    return len(variants) - len(failed), failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", type=Path, default=ROOT / "build" / "kernel-variants.pickle")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of compiling")
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "kernels" / "bench"), str(ROOT / "tests")]
    if not options.variants.exists():
        options.variants.parent.mkdir(parents=True, exist_ok=True)
        record(options.variants)
    sys.modules["kernel_variants"] = sys.modules["__main__"]  # whose classes the notes name
    variants = pickle.loads(options.variants.read_bytes())
    import triton

    compiled, failed = compile_all(variants, options.seconds)
    print(*failed, sep="\n", end="\n" if failed else "")
    print(f"triton {triton.__version__}, sm_90: {compiled} of {len(variants)} variants compiled, {len(failed)} failed")
    return 1 if failed else 0 if compiled == len(variants) else 2


if __name__ == "__main__":
    sys.exit(main())
