"""Triton's interpreter, where it computes otherwise than a GPU: its fused multiply-add rounds twice, its casts to FP8
do not round to the nearest, and its products of matrices take the bits of bfloat16 for integers and sum in an order
that depends on the sizes. That of Triton 3.6 has no loops to a bound that is computed, with numpy 2.4 and later."""

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
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


def in_float64(x: TensorHandle) -> np.ndarray:
    """The values of float32, float16 or bfloat16, whose bits the interpreter holds as integers."""
    if x.dtype.scalar == tl.bfloat16:
        return (x.data.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x.data.astype(np.float64)


def install() -> None:
    """Mends the interpreter of this process."""
    cast, patch_tensor = InterpreterBuilder.create_fp_to_fp, interpreter._patch_lang_tensor

    def patch_index(tensor: object, scope: interpreter._LangPatchScope) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda scalar: scalar.handle.data.item())

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

    def create_dot(
        self: object,
        a: TensorHandle,
        b: TensorHandle,
        d: TensorHandle,
        input_precision: object,
        max_num_imprecise_acc: object,
    ) -> TensorHandle:  # fmt: skip
        product = np.matmul(*(in_float64(each) for each in (a, b)))
        return TensorHandle(product.astype(np.float32) + d.data, d.dtype.scalar)

    interpreter._patch_lang_tensor = patch_index
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.create_fma = create_fma
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
