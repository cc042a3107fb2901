"""Triton's interpreter, where it computes otherwise than a GPU: its fused multiply-add rounds twice, and its casts to
FP8 do not round to the nearest."""

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def fma(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x * y + z rounded once, float32. The product is exact in float64. Their sum is rounded to odd there, which leaves
    the rounding to float32 what it would be of the exact sum."""
    product, z = x.double() * y.double(), z.double()
    total = product + z
    rest = total - product
    error = (product - (total - rest)) + (z - rest)
    even = (total.view(torch.int64) & 1) == 0
    odd = total.nextafter(error * torch.inf)
    return torch.where(even & error.isfinite() & (error != 0), odd, total).float()


def install() -> None:
    """Mends the interpreter of this process."""
    cast = InterpreterBuilder.create_fp_to_fp

    def create_fma(self: object, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        found = fma(*(torch.tensor(each.data) for each in (x, y, z)))
        return TensorHandle(found.numpy(), z.dtype.scalar)

    def create_fp_to_fp(
        self: InterpreterBuilder, src: TensorHandle, dst_type: tl.dtype, rounding_mode: object
    ) -> TensorHandle:
        kinds = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
        if dst_type.scalar not in kinds or src.dtype.scalar != tl.float32:
            return cast(self, src, dst_type, rounding_mode)
        found = torch.tensor(src.data).to(kinds[dst_type.scalar])
        return TensorHandle(found.view(torch.uint8).numpy(), dst_type.scalar)

    InterpreterBuilder.create_fma = create_fma
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
