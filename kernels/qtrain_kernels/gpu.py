"""Backend triton: matrices are rotated, scaled, rounded and written as a QTensor holds them, each by one kernel.

`quantize` writes the tensors of a QTensor of one Layout. The matrix is read once and each result is written once.
`quantize_both` reads a matrix once for both of its dims. All results equal those of the reference bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from qtrain_kernels import reference
from qtrain_kernels.checks import check_key, check_mask, check_packed, check_same_device, check_signs, check_spans
from qtrain_kernels.formats import FLOAT_SCALES, MX_E2M1
from qtrain_kernels.plans import (
    Knows,
    Packed,
    Plan,
    Rotation,
    Rounding,
    ScaleRule,
    field_width,
    grids,
    scale_nan,
    stored_integer,
)  # fmt: skip

# What no kernel is worth its launch for.
from qtrain_kernels.reference import fake_quantize_by, join, pack, random_signs, split

if TYPE_CHECKING:
    from qtrain_kernels.qtensor import Layout, QTensor, Side

__all__ = [
    "FUSED", "fake_quantize", "join", "missing_kernel", "obstacle", "pack", "quantize", "quantize_both", "random_signs",
    "requantizes", "rotate", "split", "unpack", "unrotate", "writes",
]  # fmt: skip

FUSED = True
STORAGES = ("float32", "bfloat16", "int8", "packed", "float8_128")
GROUP = 128  # elements along the contraction that share a scale in float8_128
LARGEST_SPAN = 256
LEAST_BFLOAT16 = 2.0**-133
UNPACKED = 4096  # elements that a program unpacks; blocks divide it
# Of every launch: a fused multiply-add rounds once where the reference rounds twice.
UNFUSED = {"enable_fp_fusion": False}
KNOWS = Knows(
    "triton",
    statistics=("amax", "rms", "std", "absmean", "rms_absmean"),
    scales=("e8m0", "minifloat", *FLOAT_SCALES),
    roundings=("nearest", "stochastic"),
    masks=("inside", "within", "error"),
    sparsities=("2:4", "4:8"),
)

Shaped = tuple[tuple[int, ...], torch.dtype]
Scales = Literal["none", "single", "lines"]


# ---------------------------------------------------------------------------------------------------- what has a kernel

HAS_TRITON = find_spec("triton") is not None  # a constant, since torch.compile of torch 2.11 cannot trace find_spec


def obstacle(device_type: str) -> str | None:
    """Why Triton's kernels cannot run there, with the remedy; None if they can."""
    if not HAS_TRITON:
        return "triton is not installed; install it"
    if device_type == "cuda" or (device_type == "cpu" and _interpreted()):
        return None
    return f"Triton makes no code for {device_type}; move the tensor to cuda"


def _interpreted() -> bool:
    """Whether Triton runs kernels by its interpreter: TRITON_INTERPRET=1 stood in the environment at their import."""
    from qtrain_kernels import triton_quantize

    return type(triton_quantize.quantize_kernel).__name__ == "InterpretedFunction"


def missing_kernel(plan: Plan | None, rotation: int | None, lines: int = 1) -> str | None:
    """Why there is no kernel for a plan, whose blocks hold so many lines, or for a rotation of this size; None if there
    is one."""
    if plan is not None and plan.element.zero_point:
        return "backend 'triton' knows no codes with a zero point"
    if plan is not None and (reason := KNOWS.lacks(plan)):
        return reason
    if plan is not None and lines > 1 and not _shares_by_largest(plan):
        return f"backend 'triton' finds scales of tiles by their largest magnitude alone; rule {plan.rule!r} asks more"
    sizes = {"rotation": rotation}
    if plan is not None:
        sizes |= {
            "block": plan.block and plan.block // lines,
            "tile of a height": lines,
            "correction": plan.correction,
        }
    for name, size in sizes.items():
        if size is not None and (size & (size - 1) or size > LARGEST_SPAN):
            return f"backend 'triton' needs a {name} that is a power of two up to {LARGEST_SPAN}; got {size}"
    return None


def _shares_by_largest(plan: Plan) -> bool:
    """Whether the scale of a tile of several lines follows from the largest of their blocks' largest magnitudes."""
    rule = plan.scale_rule
    by_largest = rule.statistic == "amax" and len(rule.divisors) == len(rule.steps) == 1
    return by_largest and plan.correction is None and plan.sparsity is None and (plan.line_rule is None or plan.whole)


def writes(layout: Layout) -> bool:
    """Whether `quantize` gives a layout."""
    return layout.plan is not None and layout.storage in STORAGES and not layout.loses_nan


def requantizes(layout: Layout) -> bool:
    """Whether `quantize` takes a QTensor of this layout: MXFP4, packed along its rows, without a tensor scale."""
    plan = layout.plan
    return (
        layout.storage == "packed"
        and layout.dim == -1
        and plan is not None
        and (plan.element.levels(), plan.scale_kind, plan.block) == (MX_E2M1.levels(), "e8m0", 32)
        and (layout.parts[2], layout.constant) == (None, 1.0)
    )


def _check_device(x: Tensor) -> None:
    reason = obstacle(x.device.type)
    if reason:
        raise ValueError(f"backend 'triton' cannot run on {x.device.type}: {reason}")


def _check_float(x: Tensor) -> None:
    _check_device(x)
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"backend 'triton' takes float32 or bfloat16; got {x.dtype}; convert it with x.float()")


def _check_kernel(plan: Plan | None, rotation: int | None, lines: int = 1) -> None:
    reason = missing_kernel(plan, rotation, lines)
    if reason:
        raise ValueError(reason)


def _check_span(shape: Sequence[int], dim: int, span: int) -> None:
    if shape[dim] % span:
        raise ValueError(f"dim {dim} must be a multiple of {span}; x has {tuple(shape)}; pad it with zeros")


def _signs_of(rotation: Rotation | None, x: Tensor) -> Tensor | None:
    """What a kernel reads the signs of a rotation from: (size,) float32, or a key that draws them."""
    if rotation is None:
        return None
    if rotation.base is not None:
        raise ValueError(f"backend 'triton' needs a rotation that is a power of two; got {rotation.size}")
    signs = rotation.signs
    if signs is None:
        return None
    check_signs(signs, rotation.size)
    check_same_device(x, signs=signs)
    return signs if signs.dtype == torch.int32 else signs.float().contiguous()


# ---------------------------------------------------------------------------------------------------------------- tiles


class Tile(NamedTuple):
    """What one program works on, and its warps."""

    rows: int
    columns: int
    warps: int

    def patch(self, dim: int, span: int) -> tuple[int, int]:
        """Neighbouring rows and columns that a thread holds, of spans along dim: whole spans where they fit it. (1, 1):
        it does not matter."""
        held = self.rows * self.columns // (32 * self.warps)
        if dim == -1:
            return (1, min(span, held)) if span >= 16 else (1, 1)
        wide = 2 if 2 * span <= held else 4
        return (held // wide, wide) if span > 1 else (1, 1)


def tile_of(dim: int, span: int, columns: int, reach: int = 1, lines: int = 1) -> Tile:
    """32 elements a thread along rows; along columns 64 and more, where a warp then holds whole spans and sums them in
    its registers; 64 where a tile must hold many lines. A function of the span, of how far a tile must reach along the
    contraction and of how many lines it must hold, and of how the matrix's columns divide."""
    if dim == -2:
        rows = max(span, reach, 32)
        tile = Tile(rows, 64, rows // 32) if span <= 32 else Tile(rows, 4096 // max(rows, 128), 1)
        return tile if lines <= tile.columns else _of_64_each(rows, lines)
    fitting = columns & -columns
    if fitting < 64:
        fitting = 1 << (columns - 1).bit_length()
    wide = max(span, reach, 16, min(fitting, 256, 4096 // lines))
    tile = Tile(4096 // wide, wide, 4)
    return tile if lines <= tile.rows else _of_64_each(lines, wide)


def _common_tile(rows: Work, columns: Work) -> Tile:
    """Of a matrix that is quantised along both dims."""
    return _of_64_each(max(columns.reach, rows.lines, 32), max(rows.reach, columns.lines, 64))


def _of_64_each(height: int, width: int) -> Tile:
    """64 elements a thread."""
    return Tile(height, width, height * width // 2048)


def launch(kernel: Any, x: Tensor, tile: Tile, *arguments: object, size: tuple[int, int] | None = None) -> None:
    """One program for each tile of x (M, N), which comes before the arguments, or of a matrix of another size."""
    rows, columns = size or x.shape
    grid = (-(-rows // tile.rows), -(-columns // tile.columns))
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        kernel[grid](x, *arguments, num_warps=tile.warps, **UNFUSED)


# ----------------------------------------------------------------------------------------------------------------- jobs


@dataclass(frozen=True)
class Job:
    """What a quantiser's kernel is compiled for beside the tensors that it is given: every constant is a field, since
    fields name the compiled kernel.

    rows, columns: of a tile. groups, block: the blocks in it and their elements (without block scales: its lines).
    lines: those whose blocks share a scale. side, run: rows and columns of a thread's patch. scales: whether the tensor
    scale is not read, single, or one per line. rule, rounding, divides_first: the plan's. unit, offset: as of
    `stored_integer`. width: bits of a packed code. scale_nan: the byte of a packed scale that is NaN. float8_unit: the
    scale of a group of float8_128 over its largest block scale. aligned: both dims of the matrix are multiples of 128.
    inexact: bfloat16 does not hold every product. mask_bits: the mask is written as bits, else as bytes. passes_below:
    the magnitude below which a gradient passes. clips: code units may be beyond the largest code.
    """

    plan: Plan
    dim: int
    rotation: int | None
    rows: int
    columns: int
    side: int
    run: int
    block: int
    lines: int
    groups: int
    scales: Scales
    rule: ScaleRule
    rounding: Rounding
    divides_first: bool
    unit: float
    offset: float
    width: int
    scale_nan: int
    float8_unit: float
    aligned: bool
    inexact: bool
    mask_bits: bool
    passes_below: float
    clips: bool


def _job(layout: Layout, rotation: int | None, tile: Tile, patch: tuple[int, int], scales: Scales) -> Job:
    plan = layout.plan
    assert plan is not None
    block = layout.size or (tile.columns if layout.dim == -1 else tile.rows)
    contraction, beside = (tile.columns, tile.rows) if layout.dim == -1 else (tile.rows, 1)
    unit, offset = stored_integer(plan.element)
    float8_max = torch.finfo(layout.float8_dtype).max
    return Job(
        plan=plan,
        dim=layout.dim,
        rotation=rotation,
        rows=tile.rows,
        columns=tile.columns,
        side=patch[0],
        run=patch[1],
        block=block,
        lines=layout.rows,
        groups=contraction // block * beside,
        scales=scales,
        rule=plan.scale_rule,
        rounding=plan.rounding_mode,
        divides_first=plan.divides_first,
        unit=unit,
        offset=offset,
        width=field_width(plan.element),
        scale_nan=scale_nan(plan),
        float8_unit=2.0 ** -math.floor(math.log2(float8_max / plan.element.max)),
        aligned=not any(size % 128 for size in layout.shape),
        inexact=not plan.exact_in_bfloat16 or _least_product(plan) < LEAST_BFLOAT16,
        mask_bits=_mask_in_bits(layout),
        passes_below=_passes_below(plan),
        clips=_clips(plan),
    )


def _mask_in_bits(layout: Layout) -> bool:
    return layout.dim == -1 and layout.shape[1] % 8 == 0


def _passes_below(plan: Plan) -> float:
    """The limit of its mask; of one that passes at its limit, the float32 above."""
    if plan.mask is None or plan.mask.kind == "inside":
        return plan.mask.limit if plan.mask else math.inf
    return torch.nextafter(torch.tensor(plan.mask.limit), torch.tensor(math.inf)).item()


def _clips(plan: Plan) -> bool:
    """Whether code units may be beyond the largest code. Under an E8M0 scale that follows from the largest magnitude
    alone, they are less than 2^(shift + 1) times the headroom."""
    rule = plan.scale_rule
    of_largest = ScaleRule(shift=rule.shift, headroom=rule.headroom)
    bounded = plan.scale_kind == "e8m0" and replace(rule, outer=None, fitted_to=None) == of_largest
    return not bounded or rule.headroom * 2.0 ** (rule.shift + 1) > plan.element.max


def _least_product(plan: Plan) -> float:
    """The smallest code times the smallest block scale; E8M0's is 2^-127."""
    finest = plan.element.step / 2
    if plan.element.mantissa_bits is not None:
        finest = 2.0 ** (plan.element.min_exponent - plan.element.mantissa_bits)
    return finest * (2.0**-127 if plan.scale_kind == "e8m0" else 1.0)


class Work(NamedTuple):
    """What a quantisation does, the same for all matrices of a layout.

    outputs: (shape, dtype) of what the kernel writes, None for what it does not: values and their block scales in the
    place of the matrix; packed codes and their scales; float8 codes and their scales; mask. packs_lines: whether packed
    lines are whole bytes. span: elements along the contraction that are worked on together. reach, lines: elements
    along it, and lines, that a tile must hold.
    """

    outputs: tuple[Shaped | None, ...]
    packs_lines: bool
    span: int
    reach: int
    lines: int


@lru_cache(4096)
def _work(layout: Layout, rotation: int | None, packed: bool) -> Work:
    """ValueError for what the kernels cannot do."""
    plan = layout.plan
    if plan is None or layout.storage not in STORAGES:
        what = "an unquantised matrix" if plan is None else layout.storage
        raise ValueError(f"backend 'triton' quantises into {', '.join(STORAGES)}; asked for {what}")
    _check_kernel(plan, rotation, layout.rows)
    KNOWS.check(plan)
    groups = {None: 1, "2:4": 4, "4:8": 8}[plan.sparsity]
    span = max((plan.span or 1) // layout.rows, rotation or 1, groups)
    _check_span(layout.shape, layout.dim, span if layout.rows == 1 else rotation or 1)
    codes, blocks, _, mask, _ = layout.parts
    values, bits, float8 = (None, None), (None, None), (None, None)
    if layout.flat:
        values = codes, blocks
    if layout.storage == "float8_128":
        assert codes is not None
        float8 = (codes[0], torch.uint8), blocks
    if packed or layout.storage == "packed":
        bits = layout.unmasked.stored("packed").parts[:2]
    if mask is not None and not _mask_in_bits(layout):
        mask = layout.shape, torch.uint8
    whole = layout.lines[1] * field_width(plan.element) % 8 == 0
    reach = max(span, GROUP if layout.storage == "float8_128" else 1)
    return Work((*values, *bits, *float8, mask), whole or bits[0] is None, span, reach, layout.rows)


@lru_cache(4096)
def _alone(layout: Layout, rotation: int | None, packed: bool, scales: Scales) -> tuple[Tile, Job]:
    work = _work(layout, rotation, packed)
    tile = tile_of(layout.dim, work.span, layout.shape[1], work.reach, work.lines)
    return tile, _job(layout, rotation, tile, tile.patch(layout.dim, work.span), scales)


# ------------------------------------------------------------------------------------------------------------ quantise


def quantize(x: Tensor | QTensor, side: Side) -> list[Tensor | None]:
    """The tensors of a QTensor of side.layout: codes, block scales, tensor scale, mask; with side.packed also the
    packed codes and their block scales.

    x: (M, N) float32 or bfloat16, before the rotation; or a QTensor of a layout that `requantizes`. ValueError for a
    dtype, device, layout or rotation that there is no kernel for.
    """
    from qtrain_kernels.triton_quantize import quantize_kernel

    layout, work = side.layout, _work_of(side)
    x, x_scales = (x, None) if isinstance(x, Tensor) else _held(x, side)
    x = x.detach().contiguous()
    if not work.packs_lines:
        return _converted(x, side)
    _check(x, side, x_scales is not None)
    scale, given = _tensor_scale(x, side), _given(x, side)
    outputs = _allocate(work, x)
    if layout.shape[0] and layout.shape[1]:
        tile, job = _alone(layout, side.rotation and side.rotation.size, side.packed, _read(scale))
        launch(quantize_kernel, x, tile, x_scales, *layout.shape, scale, *given, *outputs, job, size=layout.shape)
    return _tensors(outputs, scale, side)


def quantize_both(x: Tensor, rows: Side, columns: Side) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """`quantize` of x (M, N) along its rows (layout.dim -1) and along its columns (-2), in one reading of x. ValueError
    as there, and where the dims are others."""
    from qtrain_kernels.triton_quantize import quantize_both_kernel

    sides = rows, columns
    if (rows.layout.dim, columns.layout.dim) != (-1, -2):
        raise ValueError(f"quantize_both needs dims (-1, -2); got {(rows.layout.dim, columns.layout.dim)}")
    works = [_work_of(side) for side in sides]
    if not all(work.packs_lines for work in works):
        return quantize(x, rows), quantize(x, columns)
    x = x.detach().contiguous()
    tile = _common_tile(*works)
    scales, results, arguments = [], [], []
    for side, work in zip(sides, works, strict=True):
        _check(x, side, False)
        scale = _tensor_scale(x, side)
        job = _shared_job(side.layout, side.rotation and side.rotation.size, tile, _read(scale))
        outputs = _allocate(work, x)
        scales.append(scale)
        results.append(outputs)
        arguments += [scale, *_given(x, side), *outputs, job]
    if x.numel():
        launch(quantize_both_kernel, x, tile, *x.shape, *arguments)
    along_rows, along_columns = (
        _tensors(outputs, scale, side) for outputs, scale, side in zip(results, scales, sides, strict=True)
    )
    return along_rows, along_columns


@lru_cache(4096)
def _shared_job(layout: Layout, rotation: int | None, tile: Tile, scales: Scales) -> Job:
    return _job(layout, rotation, tile, tile.patch(layout.dim, _work(layout, rotation, False).span), scales)


def _work_of(side: Side) -> Work:
    return _work(side.layout, side.rotation and side.rotation.size, side.packed)


def _held(x: QTensor, side: Side) -> tuple[Tensor, Tensor | None]:
    """The codes and scales of a packed matrix; or the matrix itself, where its tensor scale is to be found first."""
    if not requantizes(x.layout):
        raise ValueError(
            f"backend 'triton' quantises again what is MXFP4 packed along rows; got {x.layout}; dequantise it first"
        )
    if _needs_scale(side):
        return x.dequantize("triton"), None
    return x.codes, x.block_scale


def _check(x: Tensor, side: Side, packed: bool) -> None:
    layout, plan = side.layout, side.layout.plan
    assert plan is not None
    if (side.learned is None) == plan.scale_rule.given:
        found = "none" if side.learned is None else "one"
        raise ValueError(f"rule {plan.rule!r}: a learned scale goes with rule 'learned' alone; got {found}")
    if packed:
        _check_device(x)
    else:
        _check_float(x)
    shape = (x.shape[0], 2 * x.shape[1]) if packed else tuple(x.shape)
    if shape != layout.shape:
        raise ValueError(f"the layout is of {layout.shape}; got {shape}")
    check_key(side.key, plan, x)
    if side.learned is not None and layout.parts[2] is not None:
        found, (shape, dtype) = (tuple(side.learned.shape), side.learned.dtype), layout.parts[2]
        if found != (shape, dtype):
            raise ValueError(f"a learned scale is {shape} {dtype} here; got {found[0]} {found[1]}")


def _given(x: Tensor, side: Side) -> tuple[Tensor | None, Tensor | None]:
    """Key and signs, as the kernel reads them."""
    plan = side.layout.plan
    assert plan is not None
    return side.key if plan.rounding_mode.draws else None, _signs_of(side.rotation, x)


def _needs_scale(side: Side) -> bool:
    """Whether a tensor scale is to be found from x."""
    return side.learned is None and side.layout.plan is not None and side.layout.plan.line_rule is not None


def _read(scale: Tensor | None) -> Scales:
    return "none" if scale is None else "lines" if scale.ndim else "single"


def _tensor_scale(x: Tensor, side: Side) -> Tensor | None:
    """() or, one for each line, (M, 1) or (1, N) float32; None where the plan has none. Largest magnitudes are found
    without writing x rotated. Sums are the reference's, of x rotated here."""
    layout, plan, rotation = side.layout, side.layout.plan, side.rotation
    if not _needs_scale(side):
        return side.learned
    assert plan is not None and plan.line_rule is not None
    if x.numel() and plan.line_rule.statistic == "amax":
        scale = reference.scale_of_amax(_amax(x, rotation, layout.dim, plan.whole), plan.line_rule)
    else:
        scale = reference.tensor_scale(rotate(layout.whole_lines(x), rotation), plan)
        assert isinstance(scale, Tensor)
    return scale if plan.whole else scale.view((-1, 1) if layout.dim == -1 else (1, -1))


def _amax(x: Tensor, rotation: Rotation | None, dim: int, single: bool) -> Tensor:
    """float32 magnitudes of x (M, N) rotated along dim: (), (M,) for dim -1 or (N,) for -2."""
    from qtrain_kernels.triton_quantize import amax_kernel

    x, size = x.detach().contiguous(), None if rotation is None else rotation.size
    bits = torch.zeros(() if single else (x.shape[-3 - dim],), dtype=torch.int32, device=x.device)
    tile = tile_of(dim, size or 1, x.shape[1])
    job = Turn(dim, size, tile.rows, tile.columns, *tile.patch(dim, size or 1), single=single)
    launch(amax_kernel, x, tile, _signs_of(rotation, x), bits, *x.shape, job)
    return bits.view(torch.float32)


def _allocate(work: Work, x: Tensor) -> list[Tensor | None]:
    device = x.device
    return [None if one is None else torch.empty(one[0], dtype=one[1], device=device) for one in work.outputs]


def _tensors(outputs: list[Tensor | None], scale: Tensor | None, side: Side) -> list[Tensor | None]:
    """What `quantize` gives, of what a kernel wrote."""
    layout = side.layout
    values, blocks, codes, scales, float8, float8_scales, mask = outputs
    if mask is not None and not _mask_in_bits(layout):
        mask = join(mask, 1)
    if layout.flat:
        found = [values, blocks, scale, mask]
    elif float8 is not None:
        found = [float8.view(layout.float8_dtype), float8_scales, scale, mask]
    else:
        found = [codes, scales, scale, mask]
    return [*found, codes, scales] if side.packed else found


def _converted(x: Tensor, side: Side) -> list[Tensor | None]:
    """Where lines of packed codes are no whole bytes: what the kernel gives in a float, converted."""
    from qtrain_kernels.qtensor import QTensor, float_storage

    held = side.layout.stored(float_storage(side.layout.plan, torch.bfloat16), blocks=True)
    found = QTensor(*quantize(x, replace(side, layout=held, packed=False)), held)  # pyright: ignore
    wanted, bits = found.to(side.layout, "triton"), found.unmasked.to(side.layout.unmasked.stored("packed"), "triton")
    tensors = [wanted.codes, wanted.block_scale, wanted.tensor_scale, wanted.mask]
    return [*tensors, bits.codes, bits.block_scale] if side.packed else tensors


def fake_quantize(x: Tensor, side: Side, dtype: torch.dtype) -> Tensor:
    """Equals reference.fake_quantize bit for bit."""
    return fake_quantize_by(quantize, unrotate, x, side, dtype)


# ----------------------------------------------------------------------------------------------------------- rotations


@dataclass(frozen=True)
class Turn:
    """What a rotation's kernel is compiled for. first, second: how two scales multiply what comes in, a number or how
    many of them are read. side, run: as of a Job. bits: eight of the mask in a byte."""

    dim: int
    rotation: int | None
    rows: int
    columns: int
    side: int
    run: int
    inverse: bool = False
    single: bool = False
    first: float | Literal["single", "rows", "columns"] = 1.0
    second: float | Literal["single", "rows", "columns"] = 1.0
    bits: bool = False


def rotate(x: Tensor, rotation: Rotation | None) -> Tensor:
    """Equals reference.rotate bit for bit: x (outer, span, inner) float32 or bfloat16 -> x D H, float32. ValueError for
    a device, dtype, size or rotation that there is no kernel for."""
    return x.float() if rotation is None else _turned(x, rotation, None, torch.float32, False, ())


def unrotate(
    x: Tensor,
    rotation: Rotation | None,
    mask: Tensor | None,
    dtype: torch.dtype,
    scales: Sequence[Tensor | float] = (),
) -> Tensor:
    """Equals reference.unrotate bit for bit: (x * scales * mask) (D H)^-1 in dtype, in one kernel, of up to two scales:
    floats, () or one for each place of a dim of x, float32. ValueError as `rotate`."""
    if rotation is None and mask is None and not scales:
        return x.to(dtype)
    return _turned(x, rotation, mask, dtype, True, scales)


def _turned(
    x: Tensor,
    rotation: Rotation | None,
    mask: Tensor | None,
    dtype: torch.dtype,
    inverse: bool,
    scales: Sequence[Tensor | float],
) -> Tensor:
    """x rotated; or scaled, masked (mask: of x's shape, or its bits) and rotated back."""
    from qtrain_kernels.triton_quantize import rotate_kernel

    size = 1 if rotation is None else rotation.size
    check_spans(x, x.device.type)
    _check_float(x)
    _check_kernel(None, size)
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"a rotation gives bfloat16 or float32; asked for {dtype}")
    matrix, dim = _matrix(x, size)
    bits = mask is not None and 8 * mask.numel() == x.numel() > 0 and matrix.shape[1] % 8 == 0
    if not bits:
        check_mask(mask, x)
    mask = None if mask is None else mask.contiguous().view(matrix.shape[0], matrix.shape[1] // (8 if bits else 1))
    if len(scales) > 2:
        raise ValueError(f"backend 'triton' multiplies by up to two scales; got {len(scales)}")
    first, second = [*(_lined(each, x, matrix) if isinstance(each, Tensor) else each for each in scales), 1.0, 1.0][:2]
    y = torch.empty(matrix.shape, dtype=dtype, device=x.device)
    if x.numel():
        tile = tile_of(dim, size, matrix.shape[1])
        kinds = _kind(first), _kind(second)
        turns = None if rotation is None else size
        job = Turn(dim, turns, tile.rows, tile.columns, *tile.patch(dim, size), inverse, False, *kinds, bits)
        read = (each if isinstance(each, Tensor) else None for each in (first, second))
        launch(rotate_kernel, matrix, tile, mask, _signs_of(rotation, x), *read, y, *matrix.shape, job)
    return y.view(x.shape)


def _matrix(x: Tensor, width: int) -> tuple[Tensor, int]:
    """x (outer, span, inner) as a matrix, and the dim along which its blocks of `width` lie."""
    outer, span, inner = x.shape
    x = x.detach().contiguous()
    if inner != 1:
        x = x.view(outer * span, inner)
        _check_span(x.shape, -2, width)
        return x, -2
    if span and span % width == 0:
        return x.view(outer, span), -1
    if x.numel() % width:
        raise ValueError(f"x must fill rotations of {width}; got {tuple(x.shape)}; pad it with zeros")
    return x.view(x.numel() // width, width), -1


def _lined(scale: Tensor, x: Tensor, matrix: Tensor) -> Tensor:
    """A scale that broadcasts to x, as () or (M, 1) or (1, N) of its matrix."""
    outer, span, inner = x.shape
    places: dict[tuple[int, ...], tuple[int, int]] = {}
    if inner == 1 and matrix.shape == (outer, span):
        places = {(outer, 1, 1): (outer, 1), (1, span, 1): (1, span)}
    elif outer == 1:
        places = {(1, span, 1): (span, 1), (1, 1, inner): (1, inner)}
    check_same_device(x, scale=scale)
    shape = () if scale.numel() == 1 else places.get(tuple(scale.shape))
    if scale.dtype != torch.float32 or shape is None:
        raise ValueError(
            f"a scale of {tuple(x.shape)} is a float, or float32, () or one for each place of one dim; "
            f"got {tuple(scale.shape)} {scale.dtype}"
        )
    return scale.detach().reshape(shape)


def _kind(scale: Tensor | float) -> float | Literal["single", "rows", "columns"]:
    if not isinstance(scale, Tensor):
        return scale
    return "single" if not scale.ndim else "rows" if scale.shape[1] == 1 else "columns"


# ------------------------------------------------------------------------------------------------------------- packing


@dataclass(frozen=True)
class Form:
    """What unpacking is compiled for. bits, width: of a code, and of the field that holds it. scale_nan: a scale's
    byte. unit, offset: of integers."""

    plan: Plan
    bits: int
    width: int
    scale_nan: int
    unit: float
    offset: float


@lru_cache(4096)
def _form(plan: Plan) -> Form:
    return Form(
        grids(plan), plan.element.bits, field_width(plan.element), scale_nan(plan), *stored_integer(plan.element)
    )


def unpack(packed: Packed, shape: torch.Size, plan: Plan, dtype: torch.dtype) -> Tensor:
    """Equals reference.unpack bit for bit. ValueError for a device or block that there is no kernel for."""
    from qtrain_kernels.triton_quantize import unpack_kernel

    _check_device(packed.codes)
    check_packed(packed, shape, plan)
    _check_kernel(plan, None)
    scales = None if packed.scales is None else packed.scales.contiguous()
    values, codes = torch.empty(shape, dtype=dtype, device=packed.codes.device), packed.codes.contiguous()
    if values.numel():
        tile = Tile(UNPACKED, 1, 4)
        # Both sizes are arguments: of one, a kernel does not see how the other divides, and goes byte by byte.
        sizes = values.numel(), codes.numel()
        launch(unpack_kernel, values.view(-1, 1), tile, codes, scales, *sizes, _form(plan), UNPACKED)
    return values
