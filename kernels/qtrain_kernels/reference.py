"""The torch twin of every operation: runs anywhere, and is the definition of correct.

Layout of every operand here: (outer, span, inner), quantised along dim 1, computed in float32. An operand (M, K)
quantised along K is (M * K / span, span, 1); along M it is (M / span, span, K): no transpose is ever made. The span is
the block that shares a scale, the blocks that share an EDEN correction, or, for a format with one scale per row or
tensor, the whole contraction dim. Tiles of several rows come as blocks, one after the other.

x ≈ codes * block_scale * tensor_scale. `tensor_scale` sees whole rows or tensors, `encode` one span at a time. Codes
are levels of the element, less the zero point of their block where there is one. Exponents are read from the bits of a
float32, never from log2, and every sum that decides a scale is `tree_sum`, so that compiled code can agree bit for bit.

NaN and infinity stay visible: either one in a block (or row, or, with a tensor scale, tensor) makes all of it NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn import functional as F

from qtrain_kernels.checks import check_fields
from qtrain_kernels.formats import FLOAT_SCALES, Element
from qtrain_kernels.plans import Knows, Mask, Packed, Plan, Rotation, ScaleRule, field_width, scale_nan, stored_integer
from qtrain_kernels.precision import matmul

if TYPE_CHECKING:
    from qtrain_kernels.qtensor import Layout, Side

# ----------------------------------------------------------------------------------------------------------- reductions


def tree_sum(x: Tensor) -> Tensor:
    """Sum over dim 1, kept: halves are added until one element is left, an odd last one waiting for the next round."""
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        folded = x[:, :half] + x[:, half : 2 * half]
        x = torch.cat((folded, x[:, 2 * half :]), dim=1) if x.shape[1] % 2 else folded
    return x


def divide(x: Tensor, divisor: float) -> Tensor:
    """x / divisor rounded once, on every device: by a Python number, torch multiplies with its reciprocal on CUDA."""
    return x / torch.full((), divisor, dtype=x.dtype, device=x.device)


def mean(x: Tensor) -> Tensor:
    """(outer, 1, inner) over dim 1."""
    return divide(tree_sum(x), x.shape[1])


def root(x: Tensor) -> Tensor:
    """The square root rounded once: torch's own of float32 is off by one unit on a sixth of all values on CPU (MKL)."""
    return torch.sqrt(x.double()).to(x.dtype)


def rms(x: Tensor) -> Tensor:
    """(outer, 1, inner) root mean square over dim 1."""
    return root(mean(x * x))


def std(x: Tensor) -> Tensor:
    """(outer, 1, inner) standard deviation over dim 1 about the block's own mean, population variance."""
    centred = x - mean(x)
    return root(mean(centred * centred))


def amax(x: Tensor) -> Tensor:
    """(outer, 1, inner): the largest magnitude over dim 1."""
    if x.shape[0] == x.shape[2] == 1:  # one pass and no copy: a third of the time
        low, high = torch.aminmax(x)
        return torch.maximum(low.abs(), high.abs()).view(1, 1, 1)
    return x.abs().amax(dim=1, keepdim=True)


def extent(x: Tensor) -> Tensor:
    """(outer, 1, inner): the largest value over dim 1 less the smallest, zero counted among them."""
    return x.amax(dim=1, keepdim=True).clamp_min(0.0) - lowest(x)


def lowest(x: Tensor, dim: int = 1) -> Tensor:
    """The smallest value over a dim, which is kept; zero counted among them."""
    return x.amin(dim=dim, keepdim=True).clamp_max(0.0)


# -------------------------------------------------------------------------------------------------------- powers of two


def biased_exponent(bits: Tensor) -> Tensor:
    """The exponent field of float32 bits: floor(log2 |x|) + 127; 0 for zero and subnormals, 255 for inf and NaN."""
    return (bits >> 23) & 0xFF


def power_of_two(biased: Tensor) -> Tensor:
    """2^(biased - 127), biased in 0..255: the E8M0 scale. 0 is 2^-127, a float32 subnormal; 255 is NaN."""
    normal = (biased << 23).view(torch.float32)
    return torch.where(biased == 0, 2.0**-127, torch.where(biased == 255, float("nan"), normal))


def _reciprocal(scale: Tensor) -> Tensor:
    """1 / scale for a power of two, exact (2^127 gives the subnormal 2^-127)."""
    return 1.0 / scale


def _e8m0_exponent(magnitude: Tensor, rule: ScaleRule, step: int) -> Tensor:
    """The biased exponent of a scale as `ScaleRule` says, `step` added: in 0..254, and 255 for infinity and NaN.
    Subnormals are lifted first: their bits have no exponent."""
    tiny = magnitude < 2.0**-60
    bits = divide(torch.where(tiny, magnitude * 2.0**64, magnitude), rule.divisor).view(torch.int32)
    moved = biased_exponent(bits + rule.increment) - rule.shift - 64 * tiny.to(torch.int32)
    return torch.where(biased_exponent(bits) == 255, 255, (moved.clamp(0, 254) + step).clamp(0, 254))


# ------------------------------------------------------------------------------------------------------------- rotation


def rotate(x: Tensor, rotation: Rotation | None) -> Tensor:
    """x (outer, span, inner) -> x D H, float32. outer * span: whole rows one after the other, or one of columns; a
    multiple of rotation.size. Sums are taken in pairs, elements half a block apart first; those of base by a matmul,
    whose order is its own."""
    if rotation is None:
        return x.float()
    blocks = x.float().reshape(-1, rotation.size, x.shape[2])
    signs = signs_of(rotation)
    if signs is not None:
        blocks = blocks * signs[:, None]
    return _hadamard(blocks, None if rotation.base is None else rotation.base.T).reshape(x.shape)


def signs_of(rotation: Rotation) -> Tensor | None:
    """(size,) ±1, drawn where the rotation has a key; None without."""
    signs = rotation.signs
    return random_signs(rotation.size, signs) if signs is not None and signs.dtype == torch.int32 else signs


def unrotate(
    x: Tensor,
    rotation: Rotation | None,
    mask: Tensor | None,
    dtype: torch.dtype,
    scales: Sequence[Tensor | float] = (),
) -> Tensor:
    """(x * scales * mask) (D H)^-1 in dtype, computed in float32: a gradient that leaves a rotation.

    x as in `rotate`; scales: floats, or float32 tensors that broadcast to x, multiplied in their order, each product
    rounded to float32; mask: uint8 of x's shape, or its bits as of `join`, or None.
    """
    for scale in scales:
        x = x.float() * scale
    if mask is not None:
        x = x * (mask if mask.shape == x.shape else split(mask.view(-1), 1, x.numel()).view(x.shape))  # exact
    if rotation is None:
        return x.to(dtype)
    blocks = _hadamard(x.float().reshape(-1, rotation.size, x.shape[2]), rotation.base)
    signs = signs_of(rotation)
    if signs is not None:
        blocks = blocks * signs[:, None]
    return blocks.reshape(x.shape).to(dtype)


def _hadamard(x: Tensor, base: Tensor | None) -> Tensor:
    """(blocks, size, inner) times the symmetric Sylvester part and base from the left, over sqrt(size)."""
    blocks, size, inner = x.shape
    half = size // 2
    while half >= (1 if base is None else base.shape[0]):
        pairs = x.reshape(-1, 2, half, inner)
        first, second = pairs[:, 0], pairs[:, 1]
        x = torch.stack((first + second, first - second), dim=1)
        half //= 2
    if base is not None and inner == 1:  # of blocks of one column, matmul would make as many small products
        x = matmul(x.reshape(-1, base.shape[0]), base.T)
    elif base is not None:
        x = matmul(base, x.reshape(-1, base.shape[0], inner))
    return x.reshape(blocks, size, inner) * size**-0.5


# --------------------------------------------------------------------------------------------------------------- scales


STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "amax": amax,
    "rms": rms,
    "std": std,
    "absmean": lambda x: mean(x.abs()),
    "range": extent,
}


def _magnitude(x: Tensor, rule: ScaleRule) -> Tensor:
    """(outer, 1, inner): what a rule sees of dim 1."""
    if rule.statistic == "rms_absmean":
        spread = rule.gain * rms(x) - rule.less * mean(x.abs())
        return torch.where(spread <= 0, amax(x), spread)  # not positive where magnitudes are nearly equal
    return rule.gain * STATISTICS[rule.statistic](x) + rule.bias


def tensor_scale(x: Tensor, plan: Plan, rotation: Rotation | None = None) -> Tensor | float:
    """The scale above the blocks: (outer, 1, inner) float32 per row, () float32 per tensor, or a constant.

    x: whole rows, (outer, contraction, inner), before the rotation. A row or tensor of zeros gets scale 0, which
    `encode` takes as codes of zero inputs: the product is 0.
    """
    KNOWS.check(plan)
    constant = constant_scale(plan)
    if constant is not None:
        return constant
    if not x.numel():
        return x.new_zeros(() if plan.whole else (x.shape[0], 1, x.shape[2]), dtype=torch.float32)
    x, rule = rotate(x, rotation), plan.line_rule
    assert rule is not None
    scale = _float_scale(_magnitude(x.reshape(1, -1, 1) if plan.whole else x, rule), rule.divisor)
    return scale.reshape(()) if plan.whole else scale


def constant_scale(plan: Plan) -> float | None:
    """The scale above the blocks where it does not depend on x. ValueError for a learned one, which is given."""
    if plan.scale_rule.given and plan.block is None:
        raise ValueError(f"scale rule {plan.rule!r} has no scale of x: it is a parameter, which is given")
    return 1.0 / plan.scale_rule.headroom if plan.line_rule is None else None


def scale_of_amax(largest: Tensor, rule: ScaleRule) -> Tensor:
    """The float32 scale of what has this amax, by a rule whose statistic that is."""
    return _float_scale(rule.gain * largest + rule.bias, rule.divisor)


SCALE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}  # of FLOAT_SCALES


def _float_scale(magnitude: Tensor, divisor: float, kind: str = "float32") -> Tensor:
    scale = divide(magnitude, divisor).to(SCALE_DTYPES[kind]).float()
    return torch.where(scale < float("inf"), scale, float("nan"))


def block_scale(x: Tensor, scale: Tensor | float, plan: Plan) -> Tensor:
    """(outer, 1, inner) float32 values of the format's block scale: of its rule's scale and candidates, the one of
    least squared error of rounding to nearest, a tie to the earlier. ValueError for a learned one, which is given."""
    KNOWS.check(plan)
    magnitude = _magnitude(x, plan.scale_rule)
    first, *others = (_candidate(magnitude, which, scale, plan) for which in range(len(plan.scale_rule.divisors)))
    if not others:
        return first
    best, least = first, _squared_error(x, scale, first, first, plan)
    for blocks in others:
        error = _squared_error(x, scale, blocks, first, plan)
        better = error < least
        best, least = torch.where(better, blocks, best), torch.where(better, error, least)
    return best


def _candidate(magnitude: Tensor, which: int, scale: Tensor | float, plan: Plan) -> Tensor:
    """The scale of a block by its rule, or the candidate of that number. A minifloat scale that rounds to zero becomes
    1: with E4M3, |u| is under 6 * 2^-10 there, which rounds to zero to nearest, and keeps its mean under stochastic
    rounding."""
    rule = plan.scale_rule
    if plan.scale_kind == "e8m0":
        return power_of_two(_e8m0_exponent(magnitude, rule, rule.steps[which]))
    if plan.has_float_scales:
        return _float_scale(magnitude, rule.divisors[which], plan.scale_kind)
    assert plan.scale_element is not None
    divided = divide(magnitude, rule.divisors[which]) / _nonzero(torch.as_tensor(scale))
    rounded = round_nearest(divided, plan.scale_element)
    return torch.where(rounded == 0, 1.0, rounded)


def _squared_error(x: Tensor, scale: Tensor | float, blocks: Tensor, first: Tensor, plan: Plan) -> Tensor:
    """In units of the first candidate, so that none overflows; under minifloat scales in those of the tensor scale."""
    u = _in_code_units(x, scale, blocks, plan)
    difference = (round_nearest(u, plan.element) - u) * (blocks if plan.scale_kind == "minifloat" else blocks / first)
    return tree_sum(difference * difference)


def zero_points(smallest: Tensor, scale: Tensor, element: Element) -> Tensor:
    """float32 integers from 0 to element.max: the level of the value 0 where `smallest`, which is at most 0, has level
    0. scale: of the block, of the same shape; a zero point under a scale that is NaN is 0."""
    return (-smallest / _nonzero(scale)).nan_to_num(0.0).round().clamp(0.0, element.max)


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale)


# ------------------------------------------------------------------------------------------------------------- rounding


def _minifloat_step(u: Tensor, element: Element) -> tuple[Tensor, Tensor]:
    """The distance of neighbouring codes around u, a power of two, and its reciprocal."""
    assert element.mantissa_bits is not None
    biased = biased_exponent(u.view(torch.int32)).clamp_min(element.min_exponent + 127) - element.mantissa_bits
    return (biased << 23).view(torch.float32), ((254 - biased) << 23).view(torch.float32)


def _on_grid(u: Tensor, element: Element) -> tuple[Tensor, Tensor | float, float]:
    """(v, step, offset): codes are (an integer next to v, + offset) * step. u beyond the grid saturates; NaN stays."""
    u = u.clamp(element.min, element.max)
    if element.mantissa_bits is None:
        return u * (1.0 / element.step) - element.offset, element.step, element.offset
    step, inv_step = _minifloat_step(u, element)
    return u * inv_step, step, 0.0


def round_nearest(u: Tensor, element: Element) -> Tensor:
    """The nearest code; ties go to the even integer of the grid. Centred: round(u + 1/2) - 1/2, as QuEST writes it.
    Of a table, ties go to the lower code, as bitsandbytes has it."""
    if element.table is not None:
        codes = constants(element.table, u.device)
        return torch.where(u.isnan(), u, codes[_place_in_table(u, element)])
    if element.offset:
        return torch.round(u.clamp(-element.max, element.max) + 0.5) - 0.5
    v, step, _ = _on_grid(u, element)
    return torch.round(v) * step


def nearest_code(u: Tensor, element: Element, zero_point: Tensor | None) -> Tensor:
    """The nearest code; under a zero point, which broadcasts to u, the nearest level to u + zero_point less it."""
    if zero_point is None:
        return round_nearest(u, element)
    return round_nearest(u + zero_point, element) - zero_point


@cache
def constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float32. They are kept for each device: a copy to a GPU in each call would hold it up."""
    with torch.inference_mode(False), unset_fake_temporarily():  # whoever asks first must not mark them
        return torch.tensor(values, dtype=torch.float32, device=device)


def _place_in_table(u: Tensor, element: Element) -> Tensor:
    """int64, of the nearest code of a table among its codes."""
    codes = constants(element.table, u.device)
    return torch.bucketize(u, (codes[1:] + codes[:-1]) / 2).clamp(max=len(codes) - 1)


def round_stochastic(u: Tensor, element: Element, uniform: Tensor) -> Tensor:
    """One of the two neighbouring codes, the upper one with a probability equal to the distance from the lower
    (to 2^-24, the resolution of uniform, float32 in [0, 1)). Codes stay; u beyond the grid saturates."""
    v, step, offset = _on_grid(u, element)
    lower = torch.floor(v)
    code = lower + torch.ceil((v - lower) - uniform)  # up where uniform < v - lower; no bool, see `_mask`
    return (code + offset if offset else code) * step


ROUND: dict[str, Callable[..., Tensor]] = {"nearest": round_nearest, "stochastic": round_stochastic}

# ----------------------------------------------------------------------------------------------------------- randomness


def mix(index: Tensor, key: Tensor) -> Tensor:
    """32 random bits (int32) per element: a multiply-xorshift finaliser of the index, keyed twice.

    index: int32; key: (2,) int32. One word enters before the first multiplication, one between the two: with the first
    alone, two keys would give one noise field in two orders. Wrapping int32 arithmetic; shifts are logical by masking.
    """
    h = index ^ key[0]
    h = (h ^ ((h >> 16) & 0xFFFF)) * 0x7FEB352D
    h = h ^ key[1]
    h = (h ^ ((h >> 15) & 0x1FFFF)) * -0x7B935975  # 0x846CA68B
    return h ^ ((h >> 16) & 0xFFFF)


def random_signs(n: int, key: Tensor) -> Tensor:
    """(n,) float32 of ±1, a function of key (2,) int32."""
    index = torch.arange(n, dtype=torch.int32, device=key.device)
    return (mix(index, key) & 1).to(torch.float32) * 2.0 - 1.0


def uniform(index: Tensor, key: Tensor) -> Tensor:
    """float32 multiples of 2^-24 in [0, 1)."""
    return ((mix(index, key) >> 8) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def element_index(x: Tensor) -> Tensor:
    """int32 position of each element in the operand as quantised, row-major with the contraction dim last (wraps)."""
    outer, block, inner = x.shape
    along = torch.arange(outer * block, dtype=torch.int32, device=x.device).view(outer, block, 1)
    across = torch.arange(inner, dtype=torch.int32, device=x.device) * (outer * block)
    return along + across


# --------------------------------------------------------------------------------------------------------------- encode

KNOWS = Knows(
    "reference",
    statistics=(*STATISTICS, "rms_absmean"),
    scales=("e8m0", "minifloat", *FLOAT_SCALES),
    roundings=tuple(ROUND),
    masks=("inside", "within", "error"),
    sparsities=("2:4", "4:8"),
    tables=True,
)


def encode(
    x: Tensor, scale: Tensor | float, key: Tensor | None, plan: Plan, rotation: Rotation | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Codes, block scales and the gradient's mask of one operand.

    x: (outer, span, inner), before the rotation; scale: its tensor_scale, () or (outer, 1, inner); key: (2,) int32 for
    a rounding that draws.
    Returns codes float32, (outer, span, inner), on the element's grid, less the zero point of their block where it has
    one; block_scale (outer * span / block, 1, inner) or None; mask uint8 (1 passes the gradient) or None. ValueError
    for a rule, rounding, mask or sparsity that is unknown.
    """
    KNOWS.check(plan)
    x, rounding = rotate(x, rotation), plan.rounding_mode
    shape, blocks = x.shape, None
    if plan.divides_first:
        x, scale = x / _nonzero(torch.as_tensor(scale)), 1.0
    if plan.block is not None:
        x = x.reshape(-1, plan.block, shape[2])
        blocks = block_scale(x, scale, plan)
    u = _in_code_units(x, scale, blocks, plan)
    if plan.element.zero_point:
        assert blocks is not None
        codes = nearest_code(u, plan.element, zero_points(lowest(x), blocks, plan.element))
    else:
        noise = (_noise(x, key),) if rounding.noisy else ()
        codes = ROUND[rounding.codes](u, plan.element, *noise)
    if plan.sparsity is not None:
        codes = codes * _largest(x, plan.sparsity)
    if rounding.corrects:
        assert blocks is not None
        blocks = _corrected(u, codes, blocks, key, plan)
    mask = None if plan.mask is None else _mask(u, codes, plan.mask).reshape(shape)
    return codes.reshape(shape), blocks, mask


def _noise(x: Tensor, key: Tensor | None) -> Tensor:
    """A uniform number for each element."""
    assert key is not None
    return uniform(element_index(x), key)


def _corrected(u: Tensor, codes: Tensor, blocks: Tensor, key: Tensor | None, plan: Plan) -> Tensor:
    """EDEN: block scales times S = <x, x> / <x, q(x)>, rounded stochastically to the scale's grid. S is taken over
    `correction` elements, in code units as Quartet II's training code does; one whose codes are all zero is left."""
    assert plan.scale_element is not None and plan.block is not None and plan.correction is not None
    group = plan.correction // plan.block
    square, product = (tree_sum(tree_sum(u * other).reshape(-1, group, u.shape[2])) for other in (u, codes))
    correction = torch.where(product == 0, 1.0, square / _nonzero(product))
    correction = correction[:, None].expand(-1, group, -1, -1).reshape(blocks.shape)
    scales = blocks * correction
    return round_stochastic(scales, plan.scale_element, _noise(scales, key))


def _largest(x: Tensor, sparsity: str) -> Tensor:
    """float32 1 at what stays of every 4 (2:4) or of every 4 pairs (4:8) along dim 1: the two of largest magnitude, or
    of largest L2 norm; of equal ones the earlier."""
    pair = 2 if sparsity == "4:8" else 1
    outer, block, inner = x.shape
    groups = x.reshape(outer, block // (4 * pair), 4, pair, inner)
    size = groups.square().sum(3) if pair == 2 else groups[:, :, :, 0].abs()
    rank = torch.zeros_like(size)
    for other in range(4):
        rival = size[:, :, other : other + 1]
        earlier = (torch.arange(4, device=x.device) > other).view(1, 1, 4, 1)
        rank = rank + ((rival > size) | ((rival == size) & earlier)).to(size.dtype)
    keep = (rank < 2).to(x.dtype)[:, :, :, None].expand(groups.shape)
    return keep.reshape(x.shape)


def operand(
    x: Tensor,
    scale: Tensor | float,
    key: Tensor | None,
    plan: Plan,
    dtype: torch.dtype,
    rotation: Rotation | None = None,
    with_blocks: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What a GEMM takes, codes * block_scale; and block_scale and mask as of `encode`, whose arguments it has;
    with_blocks False: None for the block scales, which are then not written. The tensor scale is left to the GEMM's
    result. dtype must hold the product exactly: bfloat16 where
    plan.exact_in_bfloat16, else float32. int8, of integer codes without blocks: the codes as `stored_integer` says; a
    NaN, whose scale is NaN too, is any of them."""
    codes, blocks, mask = encode(x, scale, key, plan, rotation)
    return _operand(codes, blocks, plan, dtype), blocks if with_blocks else None, mask


def _operand(codes: Tensor, blocks: Tensor | None, plan: Plan, dtype: torch.dtype) -> Tensor:
    if dtype == torch.int8:
        unit, offset = stored_integer(plan.element)
        return (codes * (1.0 / unit) - offset).to(torch.int8)
    if blocks is not None:
        codes = (codes.reshape(blocks.shape[0], plan.block or 1, codes.shape[2]) * blocks).reshape(codes.shape)
    return codes.to(dtype)


FUSED = False


def quantize(x: Tensor, side: Side) -> list[Tensor | None]:
    """x (M, N), float -> codes, block scales, tensor scale and mask, the parts of a QTensor of side.layout, which is
    its own `held`; then its zero points, where the element has such; then, with side.packed, packed codes and their
    block scales. ValueError as of `encode`, and for packed codes with zero points beside others."""
    layout, rotation = side.layout, side.rotation
    plan = layout.plan
    assert plan is not None
    if plan.element.zero_point and side.packed:
        raise ValueError("codes with a zero point are not written twice; quantise into the packed storage")
    # Tiles are copies, which no rotation runs through; zero points are found beside the codes.
    if rotation is not None and (layout.rows > 1 or plan.element.zero_point):
        x, rotation = rotate(layout.whole_lines(x), rotation).view(x.shape), None
    scale = tensor_scale(layout.whole_lines(x), plan, rotation) if side.learned is None else side.learned
    if isinstance(scale, Tensor) and scale.ndim == 2:  # learned, one a row
        scale = scale[..., None]
    spans, each = layout.spans(x), scale
    if isinstance(scale, Tensor) and scale.ndim:  # one a line over several blocks
        each = scale.repeat_interleave(spans.shape[0] // max(scale.shape[0], 1), 0).expand(-1, -1, spans.shape[2])
    codes, blocks, mask = encode(spans, each, side.key, plan, rotation)
    values = codes
    if layout.storage in DTYPES:
        values = _operand(codes, blocks, plan, DTYPES[layout.storage])
    found = parts_of(
        layout, None if layout.packed else values, blocks if layout.blocks or layout.storage == "float8_128" else None,
        scale, None if mask is None else join(layout.unspan(mask), 1),
    )  # fmt: skip
    zeros = _zero_points_of(spans, blocks, layout) if plan.element.zero_point else None
    if not (side.packed or layout.packed):
        return found if zeros is None else [*found, zeros if layout.blocks else None]
    codes, scales, packed_zeros = _packed_parts(layout, codes, blocks, zeros)
    if not layout.packed:
        return [*found, codes, scales]
    return [codes, scales, *found[2:], *([] if zeros is None else [packed_zeros])]


def _zero_points_of(spans: Tensor, blocks: Tensor | None, layout: Layout) -> Tensor:
    """uint8, as the block scales of a float storage lie."""
    assert blocks is not None and layout.plan is not None
    found = zero_points(lowest(spans.float()), blocks, layout.plan.element).to(torch.uint8)
    return found.view(layout.scale_grid if layout.dim == -1 else layout.scale_grid[::-1])


def _packed_parts(
    layout: Layout, codes: Tensor, blocks: Tensor | None, zeros: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Codes, block scales and zero points of a layout in its packed storage."""
    packed, plan = layout.unmasked.stored("packed"), layout.plan
    assert plan is not None
    codes = codes.reshape(layout.shape)
    if blocks is not None:
        blocks = blocks.view(packed.scale_grid if layout.dim == -1 else packed.scale_grid[::-1])
    if layout.dim == -2:
        codes = codes.T
        blocks, zeros = (None if part is None else part.T for part in (blocks, zeros))
    found = pack_codes(codes, blocks, plan, zeros)
    scales = None if found.scales is None else found.scales.view(packed.scale_grid)
    bits = None if zeros is None else join_lines(zeros, field_width(plan.element))
    return found.codes.view(packed.shapes()[0][0]), scales, bits


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def parts_of(
    layout: Layout, codes: Tensor | None, blocks: Tensor | None, scale: Tensor | float | None, mask: Tensor | None
) -> list[Tensor | None]:
    """The parts of a QTensor, of what `encode` or `operand` has given; mask: bits."""
    if codes is not None:
        codes = codes.view(layout.shape) if layout.rows == 1 else layout.unspan(codes)
    if blocks is not None:
        blocks = blocks.view(layout.scale_grid if layout.dim == -1 else layout.scale_grid[::-1])
    if layout.storage == "float8_128":
        assert blocks is not None and codes is not None
        codes = codes if layout.dim == -1 else codes.T
        if layout.tiled is (layout.dim == -2):  # in the layout's order
            blocks = blocks.T.contiguous()
        codes = codes.to(layout.float8_dtype, memory_format=torch.contiguous_format)
    scale = scale.squeeze(1) if isinstance(scale, Tensor) and scale.ndim == 3 else scale
    return [codes, blocks, scale if isinstance(scale, Tensor) else None, mask]


def fake_quantize(x: Tensor, side: Side, dtype: torch.dtype) -> Tensor:
    """x (M, N) quantised in layout's float32, dequantised and rotated back, in dtype."""
    return fake_quantize_by(quantize, unrotate, x, side, dtype)


def fake_quantize_by(
    quantize: Callable[..., list[Any]], unrotate: Callable[..., Tensor], x: Tensor, side: Side, dtype: torch.dtype
) -> Tensor:
    """`fake_quantize` of two operations of a backend."""
    layout, plan = side.layout, side.layout.plan
    codes, _, scale, *_ = quantize(x, side)
    values = codes * (layout.constant if scale is None else scale)
    if side.rotation is None:
        return values.to(dtype)
    assert plan is not None
    return unrotate(layout.whole_lines(values), side.rotation, None, dtype).view(x.shape)


def _in_code_units(x: Tensor, scale: Tensor | float, blocks: Tensor | None, plan: Plan) -> Tensor:
    if plan.scale_kind == "e8m0":
        assert blocks is not None
        return x * plan.scale_rule.headroom * _reciprocal(blocks)
    if plan.has_float_scales and blocks is not None:
        return x / _nonzero(blocks)
    divisor = _nonzero(torch.as_tensor(scale))
    return x / (divisor if blocks is None else divisor * blocks)


def _mask(u: Tensor, codes: Tensor, mask: Mask) -> Tensor:
    """uint8 0 or 1: a product with bool takes four times as long on CPU."""
    if mask.kind == "inside":
        passed = u.abs() < mask.limit
    elif mask.kind == "within":
        passed = u.abs() <= mask.limit
    else:
        passed = (codes - u).abs() <= mask.limit
    return passed.to(torch.uint8)


# -------------------------------------------------------------------------------------------------------------- packing


def pack(values: Tensor, blocks: Tensor | None, plan: Plan, zeros: Tensor | None = None) -> Packed:
    """values (rows, span, 1) and block scales as of `operand`, in any of its dtypes, of a plan that `can_pack`; zeros:
    the zero points of as many blocks, where the element has such. A NaN without a scale of its own, whose tensor scale
    is NaN too, becomes any code; a zero of a uniform grid loses its sign."""
    if values.dtype == torch.int8:
        unit, offset = stored_integer(plan.element)
        codes = (values.float() + offset) * unit
    elif blocks is None:
        codes = values.float()
    else:
        codes = values.float().reshape(blocks.shape[0], plan.block or 1, 1) / _nonzero(blocks)
        if plan.scale_kind == "float32":  # whose products with codes are rounded
            codes = round_nearest(codes, plan.element)
    return pack_codes(codes, blocks, plan, zeros)


def pack_codes(codes: Tensor, blocks: Tensor | None, plan: Plan, zeros: Tensor | None = None) -> Packed:
    """`pack` of the codes themselves, in any shape."""
    element = plan.element
    if zeros is not None:
        codes = codes.reshape(zeros.numel(), -1) + zeros.reshape(-1, 1)
    codes = torch.where(codes.isnan(), element.max, codes.clamp(element.min, element.max)).reshape(-1)
    if element.table is not None:
        fields = _place_in_table(codes, element).to(torch.uint8)
    elif element.mantissa_bits is None:
        fields = ((codes - element.min) * (1.0 / element.step)).to(torch.uint8)
    else:
        fields = _place(codes.abs(), element) | (codes.signbit().to(torch.uint8) << (element.bits - 1))
    scales = None if blocks is None else _scale_bytes(blocks.reshape(-1), plan)
    return Packed(join(fields, field_width(element)), scales, None if zeros is None else zeros.reshape(-1))


def unpack(packed: Packed, shape: torch.Size, plan: Plan, dtype: torch.dtype) -> Tensor:
    """values in dtype, which is that of what was packed, or another that holds them."""
    element, device = plan.element, packed.codes.device
    fields = split(packed.codes, field_width(element), shape.numel())
    if element.table is not None:
        codes = constants(element.table, device)[fields.long()]
    elif element.mantissa_bits is None:
        codes = fields.float() * element.step + element.min
    else:
        sign = 1.0 - 2.0 * (fields >> (element.bits - 1)).float()
        codes = sign * _table(element, device)[(fields & (2 ** (element.bits - 1) - 1)).long()]
    if dtype == torch.int8:
        unit, offset = stored_integer(element)
        return (codes * (1.0 / unit) - offset).to(torch.int8).view(shape)
    if packed.zero_points is not None:
        codes = codes.view(packed.zero_points.numel(), -1) - packed.zero_points.view(-1, 1)
    if packed.scales is not None:
        codes = codes.view(packed.scales.numel(), -1) * _scales_of(packed.scales, plan)[:, None]
    return codes.to(dtype).view(shape)


def _scale_bytes(blocks: Tensor, plan: Plan) -> Tensor:
    """E8M0's biased exponent; of a minifloat the place among its magnitudes, NaN the one after the last; floats as they
    are."""
    if plan.has_float_scales:
        return blocks.to(SCALE_DTYPES[plan.scale_kind], copy=True)
    if plan.scale_kind == "e8m0":
        return biased_exponent(blocks.view(torch.int32)).to(torch.uint8)
    assert plan.scale_element is not None
    return torch.where(blocks.isnan(), scale_nan(plan), _place(blocks, plan.scale_element))


def _scales_of(scale_bytes: Tensor, plan: Plan) -> Tensor:
    if plan.has_float_scales:
        return scale_bytes.float()
    if plan.scale_kind == "e8m0":
        return power_of_two(scale_bytes.to(torch.int32))
    assert plan.scale_element is not None
    return _table(plan.scale_element, scale_bytes.device)[scale_bytes.long()]


def _place(magnitudes: Tensor, element: Element) -> Tensor:
    """uint8, of each among a minifloat's magnitudes."""
    known = torch.tensor(element.magnitudes(), dtype=torch.float32, device=magnitudes.device)
    return torch.searchsorted(known, magnitudes).to(torch.uint8)


def _table(element: Element, device: torch.device) -> Tensor:
    """A minifloat's magnitudes by their place, NaN beyond."""
    known = element.magnitudes()
    return torch.tensor([*known, *[float("nan")] * (256 - len(known))], dtype=torch.float32, device=device)


def join(fields: Tensor, width: int) -> Tensor:
    """fields uint8 of `width` bits -> as many as fit in each byte, the first lowest, the last filled with zeros."""
    flat, count = fields.reshape(-1), 8 // width
    flat = torch.cat((flat, flat.new_zeros(-flat.numel() % count))).view(-1, count)
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=fields.device)
    return (flat << shifts).sum(1, dtype=torch.uint8)


def join_lines(fields: Tensor, width: int) -> Tensor:
    """fields (L, n) uint8 of `width` bits -> (L, bytes) uint8, each line joined by itself."""
    filled = F.pad(fields, (0, -fields.shape[1] % (8 // width)))
    return join(filled, width).view(len(fields), -1)


def split_lines(joined: Tensor, width: int, count: int) -> Tensor:
    """`join_lines` undone: (L, count)."""
    fields = split(joined.reshape(-1), width, joined.numel() * (8 // width))
    return fields.view(len(joined), -1)[:, :count]


def split(joined: Tensor, width: int, count: int) -> Tensor:
    """`join` undone: the first `count` fields. ValueError for another width, dtype, or too few bytes."""
    check_fields(joined, width, count)
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=joined.device)
    return ((joined[:, None] >> shifts) & (2**width - 1)).view(-1)[:count]
