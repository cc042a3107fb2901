"""What every test shares: no network, no display, no GPU assumed, and memory that nobody wrote to reads as NaN."""

import os

# Before any import that reads them.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "offline", "MPLBACKEND": "Agg"}

import qtrain_kernels  # noqa: F401  before torch: it sets how long torch's threads spin

# isort: split

import multiprocessing
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.utils._device import _device_constructors

from qtrain.config import schema
from qtrain.data.base import DataSettings
from qtrain.quant.quantizer import QuantizedTensor
from qtrain_kernels.plans import Plan
from qtrain_kernels.qtensor import Layout, QTensor, Side

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_device_constructors()  # `with torch.device("meta")` remembers torch.empty as it is now, not the poisoned one


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch finds none"))


class Module(pytest.Module):
    """A test module. Where GPU tests are asked for, one that needs a package which is not there is skipped, with the
    package's name, instead of ending the run: a GPU machine often lacks what only other tests need."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        try:
            return super().collect()
        except self.CollectError as error:
            missing = error.__cause__
            ours = ("qtrain", "qtrain_kernels")
            if isinstance(missing, ModuleNotFoundError) and (missing.name or "").partition(".")[0] not in ours:
                pytest.skip(f"needs {missing.name}, which is not installed", allow_module_level=True)
            raise


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if parent.config.getoption("markexpr") != "gpu":
        return None  # pytest's own, to which a missing package is an error
    return Module.from_parent(parent, path=module_path)


@pytest.fixture(params=["cpu" if INTERPRETED else pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where Triton's kernels run: on CUDA, or in Triton's interpreter, which takes CPU tensors."""
    return request.param


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and torch.empty_like give NaN: a value that is read before it is written shows in the result."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def empty(*args: object, **kwargs: object) -> Tensor:
            x = allocate(*args, **kwargs)
            if (
                x.is_floating_point() and not torch.compiler.is_compiling() and type(x) is Tensor
            ):  # no tracer's stand-in
                with torch.no_grad():
                    x.fill_(float("nan"))
            return x

        return empty

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


def write_corpus(folder: Path, words: Sequence[str], documents: int) -> Path:
    """A folder of text files, of 200 words each that are drawn from a few."""
    draw = random.Random(0)
    for number in range(documents):
        (folder / f"{number}.txt").write_text(" ".join(draw.choice(words) for _ in range(200)))
    return folder


def be_a_command(shown: Path) -> None:
    """In a process forked from a server: what a command of its own would find. Its output goes to the file `shown`."""
    output = os.open(shown, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.chdir(Path(__file__).parents[1])
    # A command's data workers are forked from it, and end with it; a process of a forkserver asks that server for them.
    multiprocessing.set_start_method(None, force=True)
    torch.set_num_threads(1)


def passed_in_the_interpreter(path: str, *options: str) -> tuple[int, str]:
    """The tests of a file in a process of their own, whose kernels Triton interprets: how many passed, and what was
    shown. None has passed where one failed."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "--show-capture=no",
        path,
        *options,
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    count = re.search(r"(\d+) passed", done.stdout)
    return int(count[1]) if count and done.returncode == 0 else 0, done.stdout[-5000:] + done.stderr[-2000:]


def quantized(module: Any, x: Tensor, plan: Plan, dim: int = -1, **rest: Any) -> QuantizedTensor:
    """x (M, N) as codes and scales, by a backend's module; rest: rotation, key, learned."""
    layout = Layout(plan, (x.shape[0], x.shape[1]), dim, blocks=plan.block is not None)
    codes, blocks, scale, mask, *zeros = module.quantize(x, Side(layout, **rest))
    return QuantizedTensor.of(QTensor(codes, blocks, scale, mask, layout, *zeros), "reference")


def data_settings(**options: object) -> DataSettings:
    """Settings of the source that the options name."""
    return TypeAdapter(schema.DataSettings).validate_python(options)
