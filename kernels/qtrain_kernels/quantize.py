"""Quantisers on the GPU by Triton: rotate, scale, round and store, the matrix read once and its result written once.

`encode` and `operand` are the reference's, bit for bit. `quantize` works on a matrix along either dim, with the
rotation inside and the result packed if asked; `quantize_both` reads a matrix once for both of its dims. Each is a
torch.library operator, which torch.compile, checkpointing and FSDP see as one node; its plan travels as text.
"""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from qtrain_kernels.checks import check_key, check_operand_dtype, check_same_device, check_signs, check_spans
from qtrain_kernels.formats import Element
from qtrain_kernels.operators import Namespace, plan_of, spell
from qtrain_kernels.plans import Knows, Plan, Rotation, Rounding, ScaleRule, scale_nan, stored_integer

TRITON = Namespace("qtrain", "CompositeExplicitAutograd")
Output = Literal["codes", "bfloat16", "float32", "int8", "packed", "float8", "packed_float8"]
GROUP = 128  # elements along the contraction that share a scale in float8
LARGEST_SPAN = 256
LEAST_BFLOAT16 = 2.0**-133
UNFUSED = {
    "enable_fp_fusion": False
}  # of every launch: a fused multiply-add rounds once where the reference rounds twice


KNOWS = Knows(
    "triton",
    statistics=("amax", "rms", "std", "absmean", "rms_absmean"),
    scales=("e8m0", "minifloat", "float32"),
    roundings=("nearest", "stochastic"),
    masks=("inside", "within", "error"),
    sparsities=("2:4", "4:8"),
)


class Quantized(NamedTuple):
    """x (M, K), quantised along dim -1 or -2.

    codes, float32 by output "codes"; codes * block_scale by "bfloat16" and "float32"; integers q by "int8"; all (M, K).
    q int8, where code = (q + offset) * unit of `plans.stored_integer`. Packed: (L, n) with the contraction last,
    L = M rows along dim -1, L = K columns along dim -2; E2M1 uint8, two codes a byte, low nibble first; float8_e4m3fn
    and float8_e5m2; other minifloats uint8, sign, exponent and mantissa in the low bits; integers q.
    block_scale: float32 in the place of its block, (M, K / block) or (M / block, K); packed: (L, n / block) uint8, the
    byte of E8M0, E4M3 or UE5M3, or float32; None without blocks, or where they are not asked for.
    mask: uint8 (M, K) of 0 and 1; packed: (L, ceil(n / 8)), 8 a byte, the first lowest; None where the plan has none.

    Output "float8" leaves values and block_scale None, and packs the mask; "packed_float8" gives all. float8: (L, n)
    float8_e4m3fn, or float8_e5m2 where codes are E5M2's; float8_scale: float32 (L, ceil(n / 128)). The scale is the
    largest block scale among 128 elements along the contraction, divided by 2^k, and at least 2^-126. float8 is code *
    block_scale / float8_scale. 2^k is the largest power of two that keeps the largest code within float8: 2^6 for E2M1.
    E2M1's codes are exact under block scales down to 2^-14 of the largest among their 128 elements. Smaller ones are
    rounded to the nearest float8, and not counted. A NaN block scale makes its 128 elements NaN.
    """

    values: Tensor | None
    block_scale: Tensor | None
    mask: Tensor | None
    float8: Tensor | None = None
    float8_scale: Tensor | None = None


@dataclass(frozen=True)
class Spec:
    """One quantisation of a matrix: plan, dim (-1 | -2), order of the rotation or None, output; with_blocks: whether
    the block scales, if any, are written too; of_packed: the matrix comes packed along its rows, as MXFP4. ValueError
    for a plan that there is no kernel for."""

    plan: Plan
    dim: int = -1
    rotation: int | None = None
    output: Output = "bfloat16"
    with_blocks: bool = True
    of_packed: bool = False

    def __post_init__(self) -> None:
        KNOWS.check(self.plan)
        if self.in_float8:
            _check_float8(self.plan)

    def __str__(self) -> str:
        """JSON of all of it, which `read_spec` takes."""
        return spell(self)

    @property
    def span(self) -> int:
        """What the contraction must be a multiple of."""
        groups = {None: 1, "2:4": 4, "4:8": 8}[self.plan.sparsity]
        return max(self.plan.span or 1, self.rotation or 1, groups)

    @property
    def reach(self) -> int:
        """Elements along the contraction that a tile must hold."""
        return max(self.span, GROUP if self.in_float8 else 1)

    @property
    def in_float8(self) -> bool:
        return self.output in ("float8", "packed_float8")

    @property
    def packs(self) -> bool:
        """Whether results lie with their contraction last, masks in bits."""
        return self.output == "packed" or self.in_float8


@cache
def read_spec(text: str) -> Spec:
    """The Spec of its spelling."""
    fields = json.loads(text)
    return Spec(**(fields | {"plan": plan_of(fields["plan"])}))


# -------------------------------------------------------------------------------------------- what the device code asks


@dataclass(frozen=True)
class Job:
    """Everything that a kernel is compiled for; every constant is a field, since fields name the compiled kernel.

    rows, columns: of a tile; groups and block: blocks in it and their elements (without block scales: its lines).
    side: neighbouring rows that a thread holds, 1 where no element needs its column's others. packs: as of the
    Spec. float8_unit: the scale of a float8 group over its largest block scale.
    scales: whether the tensor scale is not read, single, or one per line. aligned: both dims of the matrix are
    multiples of 128. rule, rounding, divides_first: the plan's. unit, offset: as of `stored_integer`; bits: of a packed
    minifloat; scale_nan: a packed scale's NaN; inexact: bfloat16 does not hold every product.
    """

    plan: Plan
    dim: int
    rotation: int | None
    output: Output
    packs: bool
    with_blocks: bool
    rows: int
    columns: int
    side: int
    block: int
    groups: int
    scales: Literal["none", "single", "lines"]
    rule: ScaleRule
    rounding: Rounding
    divides_first: bool
    unit: float
    offset: float
    bits: int
    scale_nan: int
    float8_unit: float
    aligned: bool
    inexact: bool


def _element_bits(element: Element) -> int:
    """Of a packed code."""
    return 8 if element.mantissa_bits is None else element.bits


def _least_product(plan: Plan) -> float:
    """The smallest code times the smallest block scale; E8M0's is 2^-127."""
    finest = plan.element.step / 2
    if plan.element.mantissa_bits is not None:
        finest = 2.0 ** (plan.element.min_exponent - plan.element.mantissa_bits)
    return finest * (2.0**-127 if plan.scale_kind == "e8m0" else 1.0)


def _job(spec: Spec, tile: Tile, scales: Literal["none", "single", "lines"], aligned: bool, both: bool = False) -> Job:
    """both: along the other dim too, of the same tile."""
    plan, rows, columns = spec.plan, tile.rows, tile.columns
    block = plan.block or (columns if spec.dim == -1 else rows)
    contraction, lines = (columns, rows) if spec.dim == -1 else (rows, 1)
    unit, offset = stored_integer(plan.element)
    return Job(
        plan=plan,
        dim=spec.dim,
        rotation=spec.rotation,
        output=spec.output,
        packs=spec.packs,
        with_blocks=spec.with_blocks and plan.block is not None and spec.output != "float8",
        rows=rows,
        columns=columns,
        side=tile.side if both or (spec.dim == -2 and spec.span > 1) else 1,
        block=block,
        groups=contraction // block * lines,
        scales=scales,
        rule=plan.scale_rule,
        rounding=plan.rounding_mode,
        divides_first=plan.divides_first,
        unit=unit,
        offset=offset,
        bits=_element_bits(plan.element),
        scale_nan=scale_nan(plan),
        float8_unit=2.0 ** -math.floor(math.log2(_float8_max(plan) / plan.element.max)),
        aligned=aligned,
        inexact=not plan.exact_in_bfloat16 or _least_product(plan) < LEAST_BFLOAT16,
    )


def _float8_max(plan: Plan) -> float:
    """Of the float8 that holds its codes, their exponents shifted."""
    return 57344.0 if plan.element.max > 448.0 else 448.0


class Tile(NamedTuple):
    """What one program works on, and its warps."""

    rows: int
    columns: int
    warps: int

    @property
    def side(self) -> int:
        """Neighbouring rows that a thread holds, of 8 columns."""
        return self.rows * self.columns // (256 * self.warps)


def tile_of(dim: int, span: int, columns: int) -> Tile:
    """32 elements a thread along rows; along columns 64 and more, where a warp then holds whole blocks and sums them in
    its registers. A function of the span and of how the matrix's columns divide."""
    if dim == -2:
        rows = max(span, 32)
        return Tile(rows, 64 if rows == 32 else 4096 // max(rows, 128), 1)
    fitting = columns & -columns
    if fitting < 64:
        fitting = 1 << (columns - 1).bit_length()
    wide = max(span, 16, min(fitting, 256))
    return Tile(4096 // wide, wide, 4)


def _common_tile(rows: Spec, columns: Spec) -> Tile:
    """Of a matrix that is quantised along both dims: 64 elements a thread."""
    height, width = max(columns.reach, 32), max(rows.reach, 64)
    return Tile(height, width, height * width // 2048)


# --------------------------------------------------------------------------------------------------------------- checks


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


def check_matrix(x: Tensor, dim: int, span: int) -> None:
    """ValueError for a device, dtype or shape that there is no kernel for."""
    if x.ndim != 2:
        raise ValueError(f"a matrix has two dims; got {tuple(x.shape)}; view it as one")
    reason = obstacle(x.device.type)
    if reason:
        raise ValueError(f"backend 'triton' cannot run on {x.device.type}: {reason}")
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"backend 'triton' takes float32 or bfloat16; got {x.dtype}; convert it with x.float()")
    if x.shape[dim] % span:
        raise ValueError(f"dim {dim} must be a multiple of {span}; x has {tuple(x.shape)}; pad it with zeros")


def missing_kernel(plan: Plan | None, rotation: int | None) -> str | None:
    """Why there is no kernel for a plan or for a rotation of this size; None if there is one."""
    sizes = {"rotation": rotation}
    if plan is not None:
        sizes |= {"block": plan.block, "correction": plan.correction}
    for name, size in sizes.items():
        if size is not None and (size & (size - 1) or size > LARGEST_SPAN):
            return f"backend 'triton' needs a {name} that is a power of two up to {LARGEST_SPAN}; got {size}"
    return None


def check_kernel(plan: Plan | None, rotation: int | None) -> None:
    """ValueError where there is no kernel."""
    reason = missing_kernel(plan, rotation)
    if reason:
        raise ValueError(reason)


def signs_of(rotation: Rotation | None, x: Tensor) -> Tensor | None:
    """Of a rotation of x, float32. ValueError for one that is not Sylvester's."""
    if rotation is None:
        return None
    if rotation.base is not None:
        raise ValueError(f"backend 'triton' needs a rotation that is a power of two; got {rotation.size}")
    return _signs(rotation.signs, rotation.size, x)


def _signs(signs: Tensor | None, size: int | None, x: Tensor) -> Tensor | None:
    check_signs(signs, size)
    check_same_device(x, signs=signs)
    if signs is None or signs.dtype == torch.int32:  # a key draws them in the kernel
        return signs
    return signs.float().contiguous()


def _check(x: Tensor, spec: Spec, key: Tensor | None) -> None:
    """ValueError for what the kernels cannot do."""
    plan = spec.plan
    check_kernel(plan, spec.rotation)
    check_matrix(x, spec.dim, spec.span)
    check_key(key, plan, x)
    if spec.output == "packed":
        _check_packed(plan)


def _check_packed(plan: Plan) -> None:
    if plan.scale_rule.given:
        raise ValueError(
            f"rule {plan.rule!r} cannot be packed: a NaN would be lost, as its scale stays finite; use 'codes'"
        )
    if plan.scale_element is not None and plan.scale_element.max not in (448.0, 114688.0):
        raise ValueError(
            f"block scales up to {plan.scale_element.max} cannot be packed: their format has no NaN; use e4m3 or ue5m3"
        )


def _check_float8(plan: Plan) -> None:
    element = plan.element
    if plan.scale_kind != "e8m0" or plan.block is None or element.mantissa_bits is None:
        raise ValueError(
            "float8 holds minifloat codes under block scales that are powers of two (mxfp4, mxfp8); "
            f"this plan has {plan.scale_kind} scales of {plan.block or 'line'}; ask for output 'packed'"
        )
    if plan.block > GROUP:
        raise ValueError(f"float8 has a scale for {GROUP} elements; blocks have {plan.block}; use smaller ones")


def _reads_scale(plan: Plan) -> bool:
    """Whether `encode` looks at the tensor scale."""
    return plan.line_rule is not None


def _scale(scale: Tensor | float | None, plan: Plan, lines: int, x: Tensor) -> Tensor | None:
    """The tensor scale as kernels read it: None, (), or (lines,) float32."""
    if not _reads_scale(plan):
        return None
    if scale is None:
        raise ValueError(f"rule {plan.rule!r} needs a tensor scale; got None; give reference.tensor_scale of x rotated")
    if not isinstance(scale, Tensor):
        return torch.full((), scale, dtype=torch.float32, device=x.device)
    if scale.ndim and scale.numel() != lines:
        raise ValueError(f"a tensor scale is () or one of {lines} lines; got {tuple(scale.shape)}")
    if scale.dtype != torch.float32:
        raise ValueError(f"a tensor scale is float32; got {scale.dtype}")
    check_same_device(x, scale=scale)
    return scale.detach().reshape(-1).contiguous() if scale.ndim else scale.detach()


# --------------------------------------------------------------------------------------------------------------- launch


def _shapes(spec: Spec, rows: int, columns: int) -> list[tuple[tuple[int, int], torch.dtype] | None]:
    """(shape, dtype) of values, block scales, mask, float8 and its scales; None for what the spec does not have."""
    plan, packed = spec.plan, spec.packs
    lines, length = (rows, columns) if spec.dim == -1 else (columns, rows)

    def shape(share: int) -> tuple[int, int]:
        short = -(-length // share)
        return (lines, short) if packed or spec.dim == -1 else (short, lines)

    dtypes = {"codes": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}
    values = dtypes.get(spec.output, torch.int8 if plan.element.mantissa_bits is None else torch.uint8)
    scales = mask = None
    if plan.block is not None and spec.with_blocks and spec.output != "float8":
        scales = shape(plan.block), torch.uint8 if packed and plan.scale_kind != "float32" else torch.float32
    if plan.mask is not None:
        mask = shape(8 if packed else 1), torch.uint8
    held = None if spec.output == "float8" else (shape(2 if packed and _element_bits(plan.element) == 4 else 1), values)
    found = [held, scales, mask, None, None]
    if spec.in_float8:
        found[3:] = (shape(1), torch.uint8), (shape(GROUP), torch.float32)
    return found


def _size(x: Tensor, spec: Spec) -> tuple[int, int]:
    """(M, K) of the matrix that x is, or holds packed."""
    return (x.shape[0], 2 * x.shape[1]) if spec.of_packed else (x.shape[0], x.shape[1])


def _allocate(spec: Spec, x: Tensor) -> list[Tensor | None]:
    wanted = _shapes(spec, *_size(x, spec))
    return [None if one is None else torch.empty(one[0], dtype=one[1], device=x.device) for one in wanted]


def _present(tensors: list[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _named(tensors: list[Tensor], spec: Spec) -> Quantized:
    """`_present` undone, and float8 codes by their dtype."""
    rest = iter(tensors)
    values, block_scale, mask, float8, float8_scale = (
        None if one is None else next(rest) for one in _shapes(spec, 0, 0)
    )
    kinds = {(4, 3): torch.float8_e4m3fn, (5, 2): torch.float8_e5m2}
    bits, mantissa = _element_bits(spec.plan.element), spec.plan.element.mantissa_bits
    own = None if mantissa is None or bits != 8 else kinds.get((7 - mantissa, mantissa))
    if values is not None and spec.packs and own is not None:
        values = values.view(own)
    if float8 is not None:
        float8 = float8.view(torch.float8_e5m2 if _float8_max(spec.plan) > 448.0 else torch.float8_e4m3fn)
    return Quantized(values, block_scale, mask, float8, float8_scale)


_cached_job = cache(_job)


def _job_of(x: Tensor, scale: Tensor | None, spec: Spec, tile: Tile, both: bool = False) -> Job:
    lined = "none" if scale is None else "lines" if scale.ndim else "single"
    return _cached_job(spec, tile, lined, not any(size % 128 for size in _size(x, spec)), both)


def launch(kernel: Any, x: Tensor, tile: Tile, *arguments: object, size: tuple[int, int] | None = None) -> None:
    """One program for each tile of x (M, K), which comes before the arguments, or of a matrix of another size."""
    rows, columns = size or x.shape
    grid = (-(-rows // tile.rows), -(-columns // tile.columns))
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        kernel[grid](x, *arguments, num_warps=tile.warps, **UNFUSED)


@TRITON.operator
def _quantize(
    x: Tensor,
    x_scales: Tensor | None,
    scale: Tensor | None,
    key: Tensor | None,
    signs: Tensor | None,
    spec: str,
    per: int,
) -> list[Tensor]:
    """Those of values, block scales, mask, float8 and its scales that the spec has."""
    from qtrain_kernels.triton_quantize import quantize_kernel

    what = read_spec(spec)
    found = _allocate(what, x)
    rows, columns = _size(x, what)
    if x.numel():
        tile = tile_of(what.dim, what.reach, columns)
        arguments = (x_scales, rows, columns, per, scale, key, signs, *found, _job_of(x, scale, what, tile))
        launch(quantize_kernel, x, tile, *arguments, size=(rows, columns))
    return _present(found)


TRITON.fake(_quantize)(lambda x, x_scales, scale, key, signs, spec, per: _present(_allocate(read_spec(spec), x)))


@TRITON.operator
def _quantize_both(
    x: Tensor,
    row_scale: Tensor | None,
    row_key: Tensor | None,
    row_signs: Tensor | None,
    row_spec: str,
    column_scale: Tensor | None,
    column_key: Tensor | None,
    column_signs: Tensor | None,
    column_spec: str,
) -> list[Tensor]:
    """`_quantize` along the rows, and along the columns."""
    from qtrain_kernels.triton_quantize import quantize_both_kernel

    rows, columns = read_spec(row_spec), read_spec(column_spec)
    row_found, column_found = _allocate(rows, x), _allocate(columns, x)
    if x.numel():
        tile = _common_tile(rows, columns)
        along_rows = (row_scale, row_key, row_signs, *row_found, _job_of(x, row_scale, rows, tile, True))
        along_columns = (
            column_scale,
            column_key,
            column_signs,
            *column_found,
            _job_of(x, column_scale, columns, tile, True),
        )
        launch(quantize_both_kernel, x, tile, *x.shape, *along_rows, *along_columns)
    return _present(row_found) + _present(column_found)


TRITON.fake(_quantize_both)(
    lambda x, *sides: [tensor for spec in (sides[3], sides[7]) for tensor in _present(_allocate(read_spec(spec), x))]
)


# --------------------------------------------------------------------------------------------------------- entry points


def quantize(
    x: Tensor,
    spec: Spec,
    scale: Tensor | float | None = None,
    key: Tensor | None = None,
    signs: Tensor | None = None,
) -> Quantized:
    """x (M, K) float32 or bfloat16, rotated as spec says and quantised along spec.dim.

    scale: reference.tensor_scale of x rotated: a float, () float32, or one for each row (dim -1) or column (dim -2),
    (M,) or (K,) in any shape; None where the plan reads none. key: (2,) int32 for stochastic rounding and EDEN. signs:
    (n,) float32 of ±1, D in x D H; None for H alone. ValueError for a dtype, device, block or rotation that there is no
    kernel for.
    """
    _check(x, spec, key)
    scale = _scale(scale, spec.plan, x.shape[0] if spec.dim == -1 else x.shape[1], x)
    signs = _signs(signs, spec.rotation, x)
    return _named(_quantize(x.detach().contiguous(), None, scale, key, signs, str(spec), x.shape[spec.dim]), spec)


def requantize(
    codes: Tensor,
    scales: Tensor,
    spec: Spec,
    scale: Tensor | float | None = None,
    key: Tensor | None = None,
    signs: Tensor | None = None,
) -> Quantized:
    """`quantize` of a matrix that `quantize` has packed along its rows as MXFP4: codes (M, K / 2) and scales
    (M, K / 32), uint8. The matrix itself is not written in between. The other arguments and ValueError as there."""
    spec = replace(spec, of_packed=True)
    rows, columns = _size(codes, spec)
    if codes.dtype != torch.uint8 or scales.dtype != torch.uint8 or scales.shape != (rows, columns // 32):
        raise ValueError(
            f"MXFP4 packed along rows is uint8 (M, K / 2) and (M, K / 32); got {tuple(codes.shape)} {codes.dtype} and "
            f"{tuple(scales.shape)} {scales.dtype}"
        )
    check_same_device(codes, scales=scales)
    _check(codes.new_empty((), dtype=torch.float32).expand(rows, columns), spec, key)
    scale = _scale(scale, spec.plan, rows if spec.dim == -1 else columns, codes)
    signs = _signs(signs, spec.rotation, codes)
    per = columns if spec.dim == -1 else rows
    return _named(_quantize(codes.contiguous(), scales.contiguous(), scale, key, signs, str(spec), per), spec)


@dataclass(frozen=True)
class Side:
    """One of two quantisations: what `quantize` takes beside the matrix."""

    spec: Spec
    scale: Tensor | float | None = None
    key: Tensor | None = None
    signs: Tensor | None = None


def quantize_both(x: Tensor, rows: Side, columns: Side) -> tuple[Quantized, Quantized]:
    """`quantize` of x (M, K) along its rows (spec.dim -1) and along its columns (-2), in one reading of x. ValueError
    as there, and where the dims are others."""
    if (rows.spec.dim, columns.spec.dim) != (-1, -2):
        raise ValueError(f"quantize_both needs dims (-1, -2); got {(rows.spec.dim, columns.spec.dim)}")
    operands = []
    for side, lines in ((rows, x.shape[0]), (columns, x.shape[1])):
        _check(x, side.spec, side.key)
        signs = _signs(side.signs, side.spec.rotation, x)
        operands += [_scale(side.scale, side.spec.plan, lines, x), side.key, signs, str(side.spec)]
    found = _quantize_both(x.detach().contiguous(), *operands)
    own = sum(shape is not None for shape in _shapes(rows.spec, 0, 0))
    return _named(found[:own], rows.spec), _named(found[own:], columns.spec)


def encode(
    x: Tensor, scale: Tensor | float, key: Tensor | None, plan: Plan, rotation: Rotation | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Equals reference.encode bit for bit. ValueError as `quantize`."""
    return _of_spans(x, scale, key, Spec(plan, output="codes"), rotation)


def operand(
    x: Tensor,
    scale: Tensor | float,
    key: Tensor | None,
    plan: Plan,
    dtype: torch.dtype,
    rotation: Rotation | None = None,
    with_blocks: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Equals reference.operand bit for bit. ValueError as `quantize`."""
    outputs: dict[torch.dtype, Output] = {torch.bfloat16: "bfloat16", torch.float32: "float32", torch.int8: "int8"}
    check_operand_dtype(dtype, plan)
    return _of_spans(x, scale, key, Spec(plan, output=outputs[dtype], with_blocks=with_blocks), rotation)


def _of_spans(
    x: Tensor, scale: Tensor | float, key: Tensor | None, spec: Spec, rotation: Rotation | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x (outer, span, inner) as a matrix, quantised along its rows if inner is 1, else along its columns."""
    check_spans(x, x.device.type)
    outer, span, inner = x.shape
    signs = signs_of(rotation, x)
    if rotation is not None:
        spec = replace(spec, rotation=rotation.size)
    if inner != 1:
        spec = replace(spec, dim=-2)
        if spec.plan.block is None and outer > 1:
            raise ValueError(f"columns with one scale each need an outer size of 1; got {tuple(x.shape)}")
    width = span if spec.plan.block is None else spec.span
    if inner == 1 and x.numel() % width:
        raise ValueError(f"x must fill rotations of {width}; got {tuple(x.shape)}; pad it with zeros")
    matrix = x.detach().contiguous().view((x.numel() // width, width) if inner == 1 else (outer * span, inner))
    _check(matrix, spec, key)
    lined = _scale(scale, spec.plan, outer * inner, matrix)
    values, blocks, mask, *_ = _named(_quantize(matrix, None, lined, key, signs, str(spec), span), spec)
    assert values is not None
    blocks = None if blocks is None else blocks.reshape(-1, 1, inner)
    return values.view(x.shape), blocks, None if mask is None else mask.view(x.shape)
