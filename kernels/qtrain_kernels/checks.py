"""What the operations of reference.py are given, checked before a kernel reads memory by it. ValueError says what was
found and what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qtrain_kernels.plans import Packed, Plan, field_width

if TYPE_CHECKING:
    from qtrain_kernels.qtensor import Layout

WIDTHS = (1, 2, 4, 8)


def check_spans(x: Tensor, device: str = "cpu") -> None:
    """x: (outer, span, inner), a float dtype."""
    if x.ndim != 3:
        raise ValueError(
            f"an operand is (outer, span, inner); got {tuple(x.shape)}; view a matrix as (rows, columns, 1)"
        )
    _check_float(x, device)


def check_matrix(x: Tensor, layout: Layout, device: str = "cpu") -> None:
    """x: floats in the shape of its layout."""
    if x.shape != layout.shape:
        raise ValueError(f"the layout is of {layout.shape}; got {tuple(x.shape)}; give a matrix of that shape")
    _check_float(x, device)


def _check_float(x: Tensor, device: str) -> None:
    if not x.is_floating_point():
        raise ValueError(f"an operand is float; got {x.dtype}; convert it with x.float()")
    if x.device.type != device:
        raise ValueError(f"these kernels work on {device}; got a tensor on {x.device}; move it with x.to({device!r})")


def check_same_device(x: Tensor, **others: Tensor | None) -> None:
    """That all lie where x does."""
    for name, other in others.items():
        if other is not None and other.device != x.device:
            raise ValueError(f"{name} is on {other.device}, x on {x.device}; move it with .to(x.device)")


def check_key(key: Tensor | None, plan: Plan, x: Tensor) -> None:
    """key: (2,) int32 where the plan draws."""
    if not plan.rounding_mode.draws:
        return
    if key is None:
        raise ValueError(f"rounding {plan.rounding!r} draws random bits; got no key; give (2,) int32")
    check_words(key)
    check_same_device(x, key=key)


def check_words(key: Tensor) -> None:
    """key: (2,) int32."""
    if key.shape != (2,) or key.dtype != torch.int32:
        raise ValueError(f"a key is (2,) int32; got {tuple(key.shape)} {key.dtype}")


def check_signs(signs: Tensor | None, size: int | None) -> None:
    """As many as the rotation's size, which may be none; or a key that draws them."""
    if signs is not None and signs.dtype == torch.int32:
        check_words(signs)
    elif signs is not None and signs.shape != (size,):
        raise ValueError(f"a rotation of {size} takes as many signs; got {tuple(signs.shape)}")


def check_mask(mask: Tensor | None, x: Tensor) -> None:
    """mask: uint8 of x's shape."""
    if mask is None:
        return
    if mask.dtype != torch.uint8 or mask.shape != x.shape:
        raise ValueError(f"a mask is uint8 of {tuple(x.shape)}; got {tuple(mask.shape)} {mask.dtype}")
    check_same_device(x, mask=mask)


def check_packed(packed: Packed, shape: Sequence[int], plan: Plan) -> None:
    """As many bytes as the shape takes."""
    count = math.prod(shape)
    check_fields(packed.codes, field_width(plan.element), count)
    expected = None if plan.block is None else count / plan.block
    found = None if packed.scales is None else packed.scales.numel()
    if expected != found:
        raise ValueError(f"{tuple(shape)} values have {expected or 'no'} block scales; got {found or 'none'}")
    zeros = None if packed.zero_points is None else packed.zero_points.numel()
    if zeros != (expected if plan.element.zero_point else None):
        raise ValueError(f"{tuple(shape)} values of this plan have {expected} blocks; got {zeros or 'no'} zero points")
    check_same_device(packed.codes, scales=packed.scales, zero_points=packed.zero_points)


def check_fields(x: Tensor, width: int, count: int | None = None) -> None:
    """uint8; that as many joined bytes are there as `count` fields need."""
    if width not in WIDTHS:
        raise ValueError(f"a field has {', '.join(map(str, WIDTHS))} bits; asked for {width}")
    if x.dtype != torch.uint8:
        raise ValueError(f"packed fields are uint8; got {x.dtype}")
    if count is not None and x.numel() < -(-count * width // 8):
        raise ValueError(f"{count} fields of {width} bits take {-(-count * width // 8)} bytes; got {x.numel()}")
