"""What every test shares: no network, no display, no GPU assumed, and memory that nobody wrote to reads as NaN."""

import os

# Before any import that reads them.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "offline", "MPLBACKEND": "Agg"}

import qtrain_kernels  # noqa: F401  before torch: it sets how long torch's threads spin

# isort: split

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors

_device_constructors()  # `with torch.device("meta")` remembers torch.empty as it is now, not the poisoned one


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch finds none"))


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
