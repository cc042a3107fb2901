"""Device code of packing: reference.pack, unpack, join and split, on SIZE elements of a flat tensor at a time.

# W bits of a field, 8 / W of them in a byte
"""

# A constexpr stands for the object that it holds.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from qtrain_kernels.triton_quantize import NAN, bits_of, float_of, minifloat_field, scale_field, to_bfloat16, to_float32


@triton.jit
def elements(SIZE: tl.constexpr):
    """Positions of this program's elements, int64."""
    return tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)


@triton.jit
def store_fields(pointer, fields, size, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """(SIZE,) int32 of W bits, so many in a byte as fit; `size` bytes in all. Beyond the last field must be zeros."""
    COUNT: tl.constexpr = 8 // WIDTH
    joined = tl.sum(tl.reshape(fields, (SIZE // COUNT, COUNT)) << (tl.arange(0, COUNT) * WIDTH)[None, :], axis=1)
    at = elements(SIZE // COUNT)
    tl.store(pointer + at, joined.to(tl.uint8), mask=at < size)


@triton.jit
def load_fields(pointer, size, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    COUNT: tl.constexpr = 8 // WIDTH
    at = elements(SIZE // COUNT)
    joined = tl.load(pointer + at, mask=at < size, other=0).to(tl.int32)
    apart = (joined[:, None] >> (tl.arange(0, COUNT) * WIDTH)[None, :]) & ((1 << WIDTH) - 1)
    return tl.reshape(apart, (SIZE,))


@triton.jit
def join_kernel(fields, joined, count, size, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    at = elements(SIZE)
    store_fields(joined, tl.load(fields + at, mask=at < count, other=0).to(tl.int32), size, WIDTH, SIZE)


@triton.jit
def split_kernel(fields, joined, count, size, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    at = elements(SIZE)
    tl.store(fields + at, load_fields(joined, size, WIDTH, SIZE).to(tl.uint8), mask=at < count)


@triton.jit
def at_place(place, GRID: tl.constexpr):
    """A minifloat's magnitude by its place among all."""
    normal = float_of((place << (23 - GRID.mantissa_bits)) + ((GRID.min_exponent + 126) << 23))
    return tl.where(
        place < 2**GRID.mantissa_bits, place.to(tl.float32) * (2.0 ** (GRID.min_exponent - GRID.mantissa_bits)), normal
    )


@triton.jit
def field_of(code, FORM: tl.constexpr):
    GRID: tl.constexpr = FORM.plan.element
    code = tl.where(code == code, code, GRID.max)
    code = tl.where(code < -GRID.max, -GRID.max, tl.where(code > GRID.max, GRID.max, code))
    if GRID.mantissa_bits is None:
        field = ((code + GRID.max) * (1.0 / GRID.step)).to(tl.int32)
    else:
        magnitude = minifloat_field(code, GRID) & ((1 << (FORM.bits - 1)) - 1)
        field = magnitude | (((bits_of(code) >> 31) & 1) << (FORM.bits - 1))
    return field


@triton.jit
def code_of(field, FORM: tl.constexpr):
    GRID: tl.constexpr = FORM.plan.element
    if GRID.mantissa_bits is None:
        code = field.to(tl.float32) * GRID.step - GRID.max
    else:
        magnitude = at_place(field & ((1 << (FORM.bits - 1)) - 1), GRID)
        code = float_of(bits_of(magnitude) | ((field >> (FORM.bits - 1)) << 31))
    return code


@triton.jit
def scale_of(byte, FORM: tl.constexpr):
    """A block scale by its byte, int32."""
    if FORM.plan.scale_kind == "e8m0":
        scale = float_of(tl.where(byte == 0, 0x400000, tl.where(byte == 255, NAN, byte << 23)))
    else:
        GRID: tl.constexpr = FORM.plan.scale_element
        scale = float_of(tl.where(byte == FORM.scale_nan, NAN, bits_of(at_place(byte, GRID))))
    return scale


@triton.jit
def pack_kernel(values, codes, blocks, scales, count, size, FORM: tl.constexpr, SIZE: tl.constexpr):
    at = elements(SIZE)
    loaded = tl.load(values + at, mask=at < count, other=0)
    if FORM.integers:
        code = (loaded.to(tl.float32) + FORM.offset) * FORM.unit
    else:
        code = to_float32(loaded)
    BLOCK: tl.constexpr = FORM.plan.block
    if BLOCK is not None:
        b = elements(SIZE // BLOCK)
        scale = tl.load(blocks + b, mask=b < count // BLOCK, other=1.0)
        code = tl.reshape(code, (SIZE // BLOCK, BLOCK))
        if FORM.plan.scale_kind == "e8m0":
            code *= tl.div_rn(1.0, scale)[:, None]
        else:
            code = tl.div_rn(code, scale[:, None])
        code = tl.reshape(code, (SIZE,))
        tl.store(scales + b, scale_field(scale, FORM), mask=b < count // BLOCK)
    store_fields(codes, tl.where(at < count, field_of(code, FORM), 0), size, FORM.width, SIZE)


@triton.jit
def unpack_kernel(values, codes, scales, count, size, FORM: tl.constexpr, SIZE: tl.constexpr):
    code = code_of(load_fields(codes, size, FORM.width, SIZE), FORM)
    BLOCK: tl.constexpr = FORM.plan.block
    if BLOCK is not None:
        b = elements(SIZE // BLOCK)
        scale = scale_of(tl.load(scales + b, mask=b < count // BLOCK, other=0).to(tl.int32), FORM)
        code = tl.reshape(tl.reshape(code, (SIZE // BLOCK, BLOCK)) * scale[:, None], (SIZE,))
    at = elements(SIZE)
    if FORM.integers:
        found = (code * (1.0 / FORM.unit) - FORM.offset).to(tl.int32).to(tl.int8)
    elif FORM.bfloat16:
        found = to_bfloat16(code, True)
    else:
        found = code
    tl.store(values + at, found, mask=at < count)
