"""x times the transpose of a weight in few bits, for few rows of x, by Triton: what `few_rows` is on CPU.

A weight is read once, as it lies: packed codes of 1, 2, 4 or 8 bits. Nothing is dequantised into memory. Codes are
multiplied by x in x's own dtype, which holds them, and summed in float32; scales multiply these sums in float32. So no
value is rounded but x (by who made it) and the sums.

The contraction is cut into parts where the lines alone are too few programs to fill a GPU. Each part is summed by one
program, and the parts are added in their order, without atomics. Lines of a tile, runs and parts follow from the
weight's shape and format alone; more rows of x make a tile wider, and change no sum. So a row has the same result alone
and among others. Each result is within (K + 64) 2^-23 sum |x w| of the exact product of the same values, in whatever
order the units add a run. No GPU has run it yet: tile, parts and FEW are chosen, not measured.
"""

# R rows of x, N lines of the weight, K elements along the contraction

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

import torch
from torch import Tensor

from qtrain_kernels import gpu
from qtrain_kernels.few_rows import rotate_rows
from qtrain_kernels.gpu import Tile
from qtrain_kernels.plans import Plan, Rotation, field_width, grids, scale_nan
from qtrain_kernels.qtensor import Layout, QTensor

FEW = 64  # rows of x: what one program holds the sums of
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of x
LINES = 64  # of a tile: what four warps multiply at once
TURN_BYTES = 64  # of a line, which a program reads between two tests for the end
LONGEST_TURN = 256  # elements: of 64 rows of x in float32, 512 do not fit in the shared memory of an H100
LEAST_TURNS = 4  # of a part
PROGRAMS = 256  # to fill a GPU of some 130 multiprocessors
LONGEST_RUN, SHORTEST_RUN = 64, 16  # elements that one product of the units sums

Scale = float | Literal["single", "rows"]


@dataclass(frozen=True)
class SumJob:
    """What the kernel that adds parts is compiled for. rows: lines of the weight in a tile; few: rows of x, of which
    some may not be there. scale: what multiplies the sums, a number, one that is read, or one for each line."""

    rows: int
    few: int
    scale: Scale


@dataclass(frozen=True)
class FewJob(SumJob):
    """What the product's kernel is compiled for. plan, bits, width, scale_nan: as of a Form. run: elements that are
    summed before their block scale multiplies; turn: elements of a line between two tests for the end."""

    plan: Plan
    bits: int
    width: int
    scale_nan: int
    run: int
    turn: int


def lacks(layout: Layout) -> str | None:
    """Why a weight in this layout is not multiplied as it lies; None if it is."""
    plan = layout.plan
    if plan is None or layout.storage != "packed" or layout.dim != -1:
        return "it is not packed along its contraction"
    if plan.element.table is not None:
        return "codes of a table are not decoded"
    if plan.block is not None and plan.block < SHORTEST_RUN:
        return f"its blocks of {plan.block} are shorter than {SHORTEST_RUN}"
    if layout.shape[1] * field_width(plan.element) % 8:
        return f"its lines of {layout.shape[1]} codes are no whole bytes"
    return gpu.missing_kernel(grids(plan), None)


def most(layout: Layout) -> int:
    """Rows of x up to which the product is taken."""
    return FEW


class FewRows:
    """A weight (N, K), ready for products; it keeps the codes, and no copy of contiguous ones. ValueError for one
    that `lacks` names a reason against, or that lies where Triton has no code for. rotation: of the weight's rows, for
    `linear`, by this backend."""

    def __init__(self, weight: QTensor, rotation: Rotation | None = None, backend: str = "auto") -> None:
        reason = lacks(weight.layout)
        if reason is not None:
            raise ValueError(f"this weight is not multiplied in its bits: {reason}")
        gpu._check_device(weight.codes)
        self.shape, self.layout = weight.shape, weight.layout
        self._rotate = None if rotation is None else partial(rotate_rows, rotation=rotation, backend=backend)
        self._codes = weight.codes.contiguous()
        self._blocks = None if weight.block_scale is None else weight.block_scale.contiguous()
        self._scale = None if weight.tensor_scale is None else weight.tensor_scale.contiguous()

    def __call__(self, x: Tensor, scaled: bool = True) -> Tensor:
        """x (R, K), float32, float16 or bfloat16, R at most 64 -> (R, N) float32. scaled: whether the scale of the
        weight's tensor or lines multiplies the sums. ValueError for another x."""
        from qtrain_kernels.triton_few_rows import few_rows_kernel, sum_kernel

        self._check(x)
        x, (n, k), rows = x.detach().resolve_neg().contiguous(), self.shape, x.shape[0]
        part, parts = _parts(self.layout)
        kind = _kind(self.layout, self._scale) if scaled else 1.0
        scale = self._scale if isinstance(kind, str) else None
        sums = _job(self.layout, rows, kind if parts == 1 else 1.0)
        y = torch.empty((parts, rows, n), dtype=torch.float32, device=x.device)
        sizes = self._codes.shape[1], 0 if self._blocks is None else self._blocks.shape[1]
        tile = Tile(sums.rows, sums.turn, 4)
        given = x, tile, self._codes, self._blocks, scale if parts == 1 else None
        gpu.launch(few_rows_kernel, *given, y, n, k, rows, *sizes, part, sums, size=(n, parts * sums.turn))
        if parts == 1:
            return y[0]
        found = torch.empty((rows, n), dtype=torch.float32, device=x.device)
        whole = SumJob(LINES, sums.few, kind)
        gpu.launch(sum_kernel, y, Tile(LINES, 1, 4), scale, found, parts, n, rows, whole, size=(n, 1))
        return found

    def linear(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x (R, K), R at most 64 -> (R, N) in dtype, one of DTYPES: x is rotated in float32 and rounded to dtype, and
        so is the product."""
        turned = x if self._rotate is None else self._rotate(x)
        return self(turned.to(dtype)).to(dtype)

    def _check(self, x: Tensor) -> None:
        if x.ndim != 2 or x.shape[1] != self.shape[1] or not 0 < x.shape[0] <= FEW or x.device != self._codes.device:
            raise ValueError(
                f"x must be (1 to {FEW}, {self.shape[1]}) on {self._codes.device}; "
                f"got {tuple(x.shape)} on {x.device}; give fewer rows, or dequantise the weight"
            )
        assert self.layout.plan is not None
        if x.dtype not in DTYPES or torch.finfo(x.dtype).max < self.layout.plan.element.max:
            raise ValueError(f"x must be a float of up to 32 bits that holds the codes; got {x.dtype}; use x.float()")


@lru_cache(4096)
def _parts(layout: Layout) -> tuple[int, int]:
    """(elements of a part of the contraction, how many parts)."""
    n, k = layout.shape
    turn = _turn(layout)
    turns = max(1, -(-k // turn))
    wanted = min(-(-PROGRAMS // -(-n // LINES)), -(-turns // LEAST_TURNS))
    part = -(-turns // wanted) * turn
    return part, -(-k // part)


def _turn(layout: Layout) -> int:
    assert layout.plan is not None
    return max(min(TURN_BYTES * 8 // field_width(layout.plan.element), LONGEST_TURN), layout.plan.block or 0)


def _kind(layout: Layout, scale: Tensor | None) -> Scale:
    if scale is None:
        return layout.constant
    return "rows" if scale.ndim else "single"


@lru_cache(4096)
def _job(layout: Layout, rows: int, scale: Scale) -> FewJob:
    plan = layout.plan
    assert plan is not None
    return FewJob(
        plan=grids(plan),
        bits=plan.element.bits,
        width=field_width(plan.element),
        scale_nan=scale_nan(plan),
        rows=LINES,
        few=max(16, 1 << (rows - 1).bit_length()),
        run=min(plan.block or LONGEST_RUN, LONGEST_RUN),
        turn=_turn(layout),
        scale=scale,
    )
