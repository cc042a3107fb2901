"""Device code of few rows times a packed weight, which is read once, as it lies.

# N lines of the weight, K elements along the contraction, R rows of x
# a tile is of the transposed result, (lines of the weight, rows of x): the codes are the left factor, in registers

Codes of up to 8 bits are whole in float16, bfloat16 and float32, so the product of codes and x rounds nothing but sums.
A run (a block, or a part of one) is summed in float32 and then multiplied by its block scale, in float32 too.
"""

# A constexpr stands for the object that it holds.
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false

import triton
import triton.language as tl

from qtrain_kernels.triton_quantize import code_of, fields_of, scale_of, times, to_bfloat16


@triton.jit
def decoded(codes, line, first, lines, size, DTYPE: tl.constexpr, JOB: tl.constexpr):
    """The codes of a run of each line, (lines, run) in DTYPE, which holds them. size: bytes of a line."""
    COUNT: tl.constexpr = 8 // JOB.width
    byte = first // COUNT + tl.arange(0, JOB.run // COUNT)
    inside = (line < lines)[:, None] & (byte < size)[None, :]
    joined = tl.load(codes + line[:, None] * size + byte[None, :], mask=inside, other=0)
    code = code_of(fields_of(joined, JOB.width), JOB)
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        code = to_bfloat16(code, False)
    return code.to(DTYPE)


@triton.jit
def sum_of_run(x, codes, scales, line, first, lines, size, blocks, k, rows, JOB: tl.constexpr):
    """(lines, rows of x) float32: a run of each line times that of each row of x, and its block scale."""
    place, row = first + tl.arange(0, JOB.run), tl.arange(0, JOB.few)
    inside = (place < k)[:, None] & (row < rows)[None, :]
    turned = tl.load(x + row[None, :] * k + place[:, None], mask=inside, other=0.0)
    found = tl.dot(decoded(codes, line, first, lines, size, turned.dtype, JOB), turned, input_precision="ieee")
    if JOB.plan.block is not None:
        at = line * blocks + first // JOB.plan.block
        found *= scale_of(tl.load(scales + at, mask=(line < lines) & (first < k), other=0), JOB)[:, None]
    return found


@triton.jit
def few_rows_kernel(
    x, codes, scales, scale, y, n, k, rows, size, blocks, part, JOB: tl.constexpr
):  # fmt: skip
    """y (parts, rows, n) float32: x (rows, k) times the transpose of a weight (n, k), summed over each part of the
    contraction, of `part` elements. size, blocks: bytes and block scales of a line of the weight."""
    i, j = tl.program_id(0), tl.program_id(1)
    line, here = tl.arange(0, JOB.rows), i.to(tl.int64) * JOB.rows
    codes += here * size
    if JOB.plan.block is not None:
        scales += here * blocks
    total = tl.full((JOB.rows, JOB.few), 0.0, tl.float32)
    for at in range(j * part, tl.minimum((j + 1) * part, k), JOB.turn):
        for run in tl.static_range(JOB.turn // JOB.run):
            first = at + run * JOB.run
            total += sum_of_run(x, codes, scales, line, first, n - i * JOB.rows, size, blocks, k, rows, JOB)
    write(y + j * rows * n, total, scale, i, n, rows, JOB)


@triton.jit
def sum_kernel(parts, scale, y, count, n, rows, JOB: tl.constexpr):
    """y (rows, n): the sum of parts (count, rows, n), the first first."""
    i = tl.program_id(0)
    line, row = i * JOB.rows + tl.arange(0, JOB.rows), tl.arange(0, JOB.few)
    at, inside = row[None, :] * n + line[:, None], (line < n)[:, None] & (row < rows)[None, :]
    total = tl.load(parts + at, mask=inside, other=0.0)
    for part in range(1, count):
        total += tl.load(parts + part * rows * n + at, mask=inside, other=0.0)
    write(y, total, scale, i, n, rows, JOB)


@triton.jit
def write(y, total, scale, i, n, rows, JOB: tl.constexpr):
    """Stores tile i of the transposed result into y (rows, n), times the scale of the tensor or of each line."""
    KIND: tl.constexpr = JOB.scale
    line, row = i * JOB.rows + tl.arange(0, JOB.rows), tl.arange(0, JOB.few)
    total = times(total, scale, i, 0, n, rows, KIND, JOB)
    tl.store(y + row[None, :] * n + line[:, None], total, mask=(line < n)[:, None] & (row < rows)[None, :])
