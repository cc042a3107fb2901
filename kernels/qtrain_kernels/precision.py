"""Matrix products in the precision that their operands have, whatever torch is allowed to do and the processor can do.

On a processor without bfloat16 units torch (2.13) multiplies bfloat16 matrices in a slow loop: at 4 GFLOP/s on one core
of an EPYC with AVX2, where float32 reaches 55. There, the product of bfloat16 values is by definition the float32
product, rounded once to bfloat16, in the forward and in the backward. Only the functions here keep to this definition,
so the layers of a model and its attention call them instead of torch's.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtrain_kernels.attention import document_attention

_SETTINGS: dict[str, Any] = {
    "cuda": torch.backends.cuda.matmul,
    "cpu": torch.backends.mkldnn.matmul,  # pyright: ignore[reportAttributeAccessIssue]
}


def _cpu_has_bfloat16_units() -> bool:
    """Whether oneDNN multiplies bfloat16: by AMX, AVX512_BF16 or AVX_NE_CONVERT, by AVX-512 with conversions between,
    or by Arm's instructions. ONEDNN_MAX_CPU_ISA limits that by itself; ATEN_CPU_CAPABILITY limits torch's own code, and
    is taken for both, so that either setting makes a laptop of a large machine."""
    if os.environ.get("ATEN_CPU_CAPABILITY") in ("avx2", "default"):
        return False
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


BFLOAT16_UNITS_ON_CPU = _cpu_has_bfloat16_units()  # found once: the functions below ask at every call


def has_bfloat16_units(device_type: str) -> bool:
    """Whether products of bfloat16 matrices are fast on a type of device, cpu or cuda. A CUDA device that this machine
    lacks counts as one that has the units, as all since compute capability 8.0 do."""
    if device_type == "cuda":
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    return BFLOAT16_UNITS_ON_CPU


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in the dtype of the two, under any autocast. Float32 stays float32 also where
    torch.set_float32_matmul_precision or torch.backends allow TF32 (CUDA) or bfloat16 (CPU): quantised values would
    lose bits, and codes would change."""
    if left.dtype == torch.bfloat16 and _multiplies_in_float32(left):
        return matmul(left.float(), right.float()).bfloat16()
    if torch.is_autocast_enabled(left.device.type):
        with torch.autocast(left.device.type, enabled=False):
            return matmul(left, right)
    with _ieee(left):
        return left @ right


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, in the autocast dtype where autocast is on: x (..., K), weight (N, K), bias (N,) -> (..., N)."""
    if _is_few(x, weight):
        return _few_rows(x, weight, bias)
    if not (_multiplies_in_float32(x) and _dtype_of_products(x) == torch.bfloat16):
        return F.linear(x, weight, bias)
    with torch.autocast("cpu", enabled=False):
        return F.linear(_rounded(x), _rounded(weight), None if bias is None else _rounded(bias)).bfloat16()


FEW = 8  # rows, up to which a bfloat16 weight is read as it lies: a float32 copy of it costs more than the product
FEW_MULTIPLE = 32  # of the contraction of such a weight


def _is_few(x: Tensor, weight: Tensor) -> bool:
    """Whether `qtrain_kernels.few_rows` multiplies: it takes half the time of torch's own, also with bfloat16 units. It
    reads memory, which a graph that is being recorded and a function transform do not have."""
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or x.device.type != "cpu"
        or weight.dtype != torch.bfloat16
        or _dtype_of_products(x) != torch.bfloat16
    ):
        return False
    few = 0 < x.numel() <= FEW * x.shape[-1] and weight.shape[1] % FEW_MULTIPLE == 0
    return few and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))


def _few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from qtrain_kernels.few_rows import bfloat16_rows  # which needs this module

    rows = x.reshape(-1, x.shape[-1])
    if bias is None:
        y = bfloat16_rows(rows, weight, torch.bfloat16)
    else:  # rounded once, with it
        y = (bfloat16_rows(rows.bfloat16(), weight, torch.float32) + bias.bfloat16()).bfloat16()
    return y.view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """An nn.Linear whose product is `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Causal F.scaled_dot_product_attention, in the autocast dtype where autocast is on. q (B, H, T, d); k, v
    (B, H, T, d), or fewer heads that divide H. A single query is the last of its sequence and sees all keys, however
    many there are. Where bfloat16 is multiplied in float32, scores and weights stay in
    float32: only the operands, the result and the gradients are rounded.

    cu_seqlens (N + 1,) int32: a token attends to those of its own document alone; see `qtrain_kernels.attention`."""
    if not (_multiplies_in_float32(q) and _dtype_of_products(q) == torch.bfloat16):
        return _attention(q, k, v, cu_seqlens)
    with torch.autocast("cpu", enabled=False):
        return _attention(_rounded(q), _rounded(k), _rounded(v), cu_seqlens).bfloat16()


def _attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    if cu_seqlens is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=k.shape[1] != q.shape[1])
    dtype = _dtype_of_products(q)  # autocast does not know the operators of documents
    return document_attention(q.to(dtype), k.to(dtype), v.to(dtype), cu_seqlens)


def _multiplies_in_float32(x: Tensor) -> bool:
    return x.device.type == "cpu" and not BFLOAT16_UNITS_ON_CPU


def _dtype_of_products(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _rounded(x: Tensor) -> Tensor:
    """x with the values of bfloat16, in float32. Its gradient, too, is rounded to bfloat16 on the way back."""
    return x.bfloat16().float()


class _Ieee:
    """Torch's settings for float32 products, held at "ieee" while products run that may not take fewer bits.

    A setting is one of the process. The first product to need it changes it, and the last to end, in whichever thread,
    puts back what was allowed: at its own level, even if it had come from a general one.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running = dict.fromkeys(_SETTINGS, 0)  # products that hold the setting, by type of device
        self.allowed = dict.fromkeys(_SETTINGS, "none")

    @contextmanager
    def __call__(self, x: Tensor) -> Iterator[None]:
        """While a product of tensors like x runs. Nothing changes where x is not in float32."""
        device = x.device.type
        held = x.dtype == torch.float32 and device in _SETTINGS and self._begin(device)
        try:
            yield
        finally:
            if held:
                self._end(device)

    def _begin(self, device: str) -> bool:
        """Whether the setting is held for one more product; not where it is torch's default, or "ieee" by itself."""
        with self.lock:
            if not self.running[device]:
                self.allowed[device] = _SETTINGS[device].fp32_precision
                if self.allowed[device] in ("none", "ieee"):
                    return False
                _SETTINGS[device].fp32_precision = "ieee"
            self.running[device] += 1
            return True

    def _end(self, device: str) -> None:
        with self.lock:
            self.running[device] -= 1
            if not self.running[device]:
                _SETTINGS[device].fp32_precision = self.allowed[device]


_ieee = _Ieee()
