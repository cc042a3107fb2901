"""Float32 products stay float32 where torch may take fewer bits. What a product saw is read while it runs; on the
processors that have no short float32 product its value would not tell."""

from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import qtrain
from qtrain_kernels.precision import matmul

SETTINGS = torch.backends.mkldnn.matmul


@pytest.fixture(autouse=True)
def medium() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


class Allowed(TorchDispatchMode):
    """What each matrix product was allowed to do, by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[torch.dtype, str]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            self.found.add((args[0].dtype, SETTINGS.fp32_precision))
        return func(*args, **(kwargs or {}))


def test_the_setting_is_there_and_comes_back() -> None:
    x = torch.randn(8, 8)
    assert SETTINGS.fp32_precision == "bf16"
    with Allowed() as plain:
        _ = x @ x
    with Allowed() as ours:
        matmul(x, x)
        matmul(x.bfloat16(), x.bfloat16())
    assert plain.found == {(torch.float32, "bf16")}
    assert ours.found == {(torch.float32, "ieee"), (torch.bfloat16, "bf16")}
    assert SETTINGS.fp32_precision == "bf16"
    with pytest.raises(RuntimeError):
        matmul(x, torch.ones(3, 3))
    assert SETTINGS.fp32_precision == "bf16"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_changes_no_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(8, 8).to(dtype)
    with torch.autocast("cpu", torch.float16):
        assert (x @ x).dtype == torch.float16
        assert matmul(x, x).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rotations_and_float32_operands_are_exact(dtype: torch.dtype) -> None:
    """Forward and backward of a layer that is rotated over all of 48 = 4 * 12 features, in bfloat16 and in float32."""
    layer = torch.nn.Sequential(torch.nn.Linear(48, 64))
    qtrain.convert(layer, "halo_1", backend="reference")
    qtrain.set_step(layer, 0)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16), Allowed() as allowed:
        layer(torch.randn(64, 48)).sum().backward()
    assert (torch.float32, "ieee") in allowed.found
    assert (torch.float32, "bf16") not in allowed.found
