"""Device code of the Triton quantisers: reference.py once more, on one tile of a matrix at a time.

# R, C rows and columns of the tile; G blocks in it; B elements of a block; I lanes beside it
# axis 1 of (G, B, I) is the contraction: (R, C) is (R * C / B, B, 1) along rows and (R / B, B, C) along columns

Equal to the reference bit for bit, on the GPU and in Triton's interpreter. Therefore every kernel is launched with
enable_fp_fusion=False; divisions and roots are the IEEE ones; floats are rounded by adding and taking off a large
number, and by a cast only beside a branch for the interpreter, whose casts truncate; and a tensor is summed in halves,
by reductions of two terms, which have no order. NaN passes through comparisons and integer maxima, not through tl.max
of floats.
"""

# A constexpr stands for the object that it holds.
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false
# pyright: reportPossiblyUnboundVariable=false, reportUnboundVariable=false, reportOperatorIssue=false

import triton
import triton.language as tl

INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
if INTERPRETED:
    from qtrain_kernels import triton_interpreter

    triton_interpreter.install()

ABS: tl.constexpr = tl.constexpr(0x7FFFFFFF)
INFINITY: tl.constexpr = tl.constexpr(0x7F800000)
NAN: tl.constexpr = tl.constexpr(0x7FC00000)
LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)
LARGE: tl.constexpr = tl.constexpr(1.5 * 2.0**23)
# A code of E2M1 times this has its exponent, or subnormal, and its mantissa in float16's bits: S000fff0 00000000.
IN_FLOAT16: tl.constexpr = tl.constexpr(2.0**-14)
# PTX: the upper bytes of 4 low and 4 high codes in float16 to 4 bytes of two codes each, and back.
JOIN_CODES: tl.constexpr = tl.constexpr("""{
    .reg .b32 a, b, c, d;
    prmt.b32 a, $1, $2, 0x7531;
    prmt.b32 c, $3, $4, 0x7531;
    shr.b32 b, a, 4;
    and.b32 b, b, 0x08080808;
    shr.b32 a, a, 1;
    and.b32 a, a, 0x07070707;
    and.b32 d, c, 0x80808080;
    shl.b32 c, c, 3;
    and.b32 c, c, 0x70707070;
    or.b32 a, a, b;
    or.b32 c, c, d;
    or.b32 $0, a, c;
}""")
SPLIT_CODES: tl.constexpr = tl.constexpr("""{
    .reg .b32 a, b, c, d;
    shl.b32 a, $4, 1;
    and.b32 a, a, 0x0E0E0E0E;
    shl.b32 b, $4, 4;
    and.b32 b, b, 0x80808080;
    or.b32 a, a, b;
    shr.b32 c, $4, 3;
    and.b32 c, c, 0x0E0E0E0E;
    and.b32 d, $4, 0x80808080;
    or.b32 c, c, d;
    prmt.b32 $0, a, 0, 0x1404;
    prmt.b32 $1, a, 0, 0x3424;
    prmt.b32 $2, c, 0, 0x1404;
    prmt.b32 $3, c, 0, 0x3424;
}""")


@triton.constexpr_function
def log2(n):
    return n.bit_length() - 1


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def to_float32(x):
    """bfloat16 by its bits: the interpreter's cast is wrong for subnormals."""
    if x.dtype == tl.bfloat16:
        x = float_of(x.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return x.to(tl.float32)


@triton.jit
def to_bfloat16(x, INEXACT: tl.constexpr):
    """Rounded to nearest, ties to even; by the bits in the interpreter, whose cast truncates. INEXACT: x is no bfloat16
    yet."""
    if INTERPRETED:
        bits = bits_of(x)
        if INEXACT:
            bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits)
        found = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        found = x.to(tl.bfloat16)
    return found


@triton.jit
def constant(value: tl.constexpr):
    return tl.full((1, 1, 1), value, tl.float32)


# ----------------------------------------------------------------------------------------------------------- reductions


@triton.jit
def tree_sum(x):
    """(G, B, I) -> (G, 1, I): reference.tree_sum for B a power of two."""
    for _ in tl.static_range(log2(x.shape[1])):
        x = tl.sum(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2, x.shape[2])), axis=1)
    return x


@triton.jit
def once(x):
    """x, as a sum of one term each: Triton moves a sum to the threads that ask for it, where it would have each of them
    compute x."""
    return tl.sum(tl.reshape(x, x.shape + (1,)), axis=len(x.shape))  # noqa: RUF005  no star in Triton 3.6


@triton.jit
def mean(x):
    return tree_sum(x) * (1.0 / x.shape[1])  # a power of two: rounds as the division does


@triton.jit
def rms(x):
    return tl.sqrt_rn(mean(x * x))


@triton.jit
def std(x):
    centred = x - mean(x)
    return tl.sqrt_rn(mean(centred * centred))


@triton.jit
def larger(x, y):
    """NaN if either is."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def amax(x):
    """NaN if any is. In the interpreter by the bits, whose order is that of the magnitudes with NaN above all."""
    if INTERPRETED:
        found = float_of(tl.max(bits_of(x) & ABS, axis=1, keep_dims=True))
    else:
        found = tl.reduce(tl.abs(x), 1, larger, keep_dims=True)
    return found


# ------------------------------------------------------------------------------------------------------------- division


@triton.jit
def inverse(x):
    """1 / x rounded once. The GPU's own instruction is half of its division, and has no name in Triton."""
    if INTERPRETED:
        found = tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)
    else:
        found = tl.inline_asm_elementwise("rcp.rn.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return found


@triton.jit
def divisor(d):
    """What `quotient` divides by, made once for a block: a power of two whose sign is not d's, d times it, and the
    reciprocal of that product, which is -2^24 or less where a power of two brings d there: no remainder underflows."""
    bits = d.to(tl.uint32, bitcast=True)
    lift = tl.minimum(0x8B000000 - (bits & 0x7F800000), 0x7F000000) | ((bits & 0x80000000) ^ 0x80000000)
    below = d * lift.to(tl.float32, bitcast=True)
    return lift.to(tl.float32, bitcast=True), tl.maximum(below, -LARGEST), inverse(below)


@triton.jit
def quotient(x, by):
    """x / d rounded once, as IEEE division does, of what `divisor` made of d; without a division.

    Markstein's theorem: of a reciprocal rounded once, the product's exact remainder corrects the product to the nearest
    float. A divisor below zero makes that remainder +0 of a zero, which keeps the zero's sign. A product that is
    infinite is corrected by what is infinite or zero. Quotients below 2^-126 may be off by 2^-149, those above 2^102
    infinite: no grid has codes between those and zero, or beyond these.
    """
    lift, below, reciprocal = by
    x = x * lift
    product = clamp(x * reciprocal, LARGEST)
    return tl.fma(tl.fma(product, below * -1.0, x), reciprocal, product)


# ----------------------------------------------------------------------------------------------------------- randomness


@triton.jit
def mix(index, key):
    """reference.mix in uint32, whose shifts are logical. key: pointer to two int32."""
    h = (index ^ tl.load(key)).to(tl.uint32, bitcast=True)
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = h ^ tl.load(key + 1).to(tl.uint32, bitcast=True)
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def draw(index, key):
    """reference.uniform times 2^24, which is an integer."""
    return (mix(index, key) >> 8).to(tl.float32)


# ------------------------------------------------------------------------------------------------------------- rounding


@triton.jit
def clamp(u, largest: tl.constexpr):
    """NaN stays."""
    return tl.clamp(u, -largest, largest, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def rint(u, large):
    """u to the nearest multiple of a step, ties to even; large: 1.5 * 2^23 steps, around which floats are one step
    apart. |u| at most 2^22 steps; a zero keeps its sign."""
    return float_of(bits_of((u + large) - large) | (bits_of(u) & ~ABS))


@triton.jit
def floor(v):
    """|v| at most 2^22; a zero keeps its sign. tl.floor flushes subnormals on the GPU: -1e-40 would give 0. The GPU's
    addition rounds down where asked, by an instruction that has no name in Triton; LARGE is 0f4B400000."""
    if INTERPRETED:
        nearest = rint(v, LARGE)
        found = tl.where(nearest > v, nearest - 1.0, nearest)
    else:
        above = tl.inline_asm_elementwise(
            "add.rm.f32 $0, $1, 0f4B400000;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1
        )
        found = float_of(bits_of(above - LARGE) | (bits_of(v) & ~ABS))
    return found


@triton.jit
def round_nearest(u, ELEMENT: tl.constexpr, CLIPS: tl.constexpr):
    """reference.round_nearest. CLIPS: |u| may be beyond the largest code."""
    if CLIPS:
        u = clamp(u, ELEMENT.max)
    if ELEMENT.offset != 0:
        code = rint(u + 0.5, LARGE) - 0.5
    elif ELEMENT.mantissa_bits is None:
        code = rint(u, LARGE * ELEMENT.step)
    else:
        power = float_of(tl.maximum(bits_of(u) & INFINITY, (ELEMENT.min_exponent + 127) << 23))
        # Products with a power of two round nothing: the fused multiply-add is the addition of `rint`.
        large = tl.full(u.shape, LARGE * 2.0**-ELEMENT.mantissa_bits, tl.float32)
        near = tl.fma(power, -1.0 * large, tl.fma(power, large, u))
        code = float_of(bits_of(near) | (bits_of(u) & ~ABS))
    return code


@triton.jit
def round_stochastic(u, ELEMENT: tl.constexpr, drawn):
    """reference.round_stochastic; drawn: integers of `draw`, whose product with 2^-24 rounds nothing in the fused
    multiply-add."""
    u = clamp(u, ELEMENT.max)
    if ELEMENT.mantissa_bits is None:
        step = ELEMENT.step
        v = u * (1.0 / ELEMENT.step) - ELEMENT.offset
    else:
        power = tl.maximum(bits_of(u) & INFINITY, (ELEMENT.min_exponent + 127) << 23)
        power -= ELEMENT.mantissa_bits << 23
        step = float_of(power)
        v = u * float_of((254 << 23) - power)
    lower = floor(v)
    above = tl.fma(drawn, tl.full(drawn.shape, -(2.0**-24), tl.float32), v - lower)
    code = lower + tl.where(above > 0, 1.0, above * 0.0)  # its ceiling, with the sign of a zero
    if ELEMENT.offset != 0:
        code = code + ELEMENT.offset
    return code * step


# --------------------------------------------------------------------------------------------------------------- scales


@triton.jit
def nonzero(scale):
    return tl.where(scale == 0, 1.0, scale)


@triton.jit
def finite_or_nan(scale):
    return tl.where(bits_of(scale) < INFINITY, scale, float_of(tl.full((1, 1, 1), NAN, tl.int32)))


@triton.jit
def power_of_two(biased):
    """2^(biased - 127): 0 is a float32 subnormal, 255 NaN."""
    return float_of(tl.where(biased == 0, 0x400000, tl.where(biased == 255, NAN, biased << 23)))


@triton.jit
def reciprocal(scale):
    """Of a power of two that `power_of_two` made."""
    biased = bits_of(scale) >> 23
    return power_of_two(tl.where(biased == 255, 255, 254 - biased))


@triton.constexpr_function
def tried(rule):
    return len(rule.divisors)


@triton.constexpr_function
def divisor_of(rule, which):
    return rule.divisors[which]


@triton.constexpr_function
def step_of(rule, which):
    return rule.steps[which]


@triton.jit
def magnitude_of(x, RULE: tl.constexpr):
    """(G, 1, I): what a rule sees of a block, reference._magnitude."""
    if RULE.statistic == "rms_absmean":
        spread = RULE.gain * rms(x) - RULE.less * mean(tl.abs(x))
        found = tl.where(spread <= 0, amax(x), spread)
    else:
        if RULE.statistic == "amax":
            found = amax(x)
        if RULE.statistic == "rms":
            found = rms(x)
        if RULE.statistic == "std":
            found = std(x)
        if RULE.statistic == "absmean":
            found = mean(tl.abs(x))
        if RULE.gain != 1.0:
            found = RULE.gain * found
        if RULE.bias != 0.0:
            found = found + RULE.bias
    return found


@triton.jit
def e8m0_exponent(magnitude, STEP: tl.constexpr, RULE: tl.constexpr):
    """reference._e8m0_exponent."""
    tiny = magnitude < 2.0**-60
    lifted = tl.where(tiny, magnitude * 2.0**64, magnitude)
    if RULE.divisor != 1.0:
        lifted = tl.div_rn(lifted, constant(RULE.divisor))
    bits = bits_of(lifted)
    moved = (((bits + RULE.increment) >> 23) & 0xFF) - RULE.shift - tl.where(tiny, 64, 0)
    moved = tl.minimum(tl.maximum(moved, 0), 254)
    if STEP != 0:
        moved = tl.minimum(tl.maximum(moved + STEP, 0), 254)
    return tl.where(((bits >> 23) & 0xFF) == 255, 255, moved)


@triton.jit
def candidate(magnitude, by_scale, WHICH: tl.constexpr, JOB: tl.constexpr):
    """reference._candidate. by_scale: the divisor made of the tensor scale."""
    RULE: tl.constexpr = JOB.rule
    KIND: tl.constexpr = JOB.plan.scale_kind
    if KIND == "e8m0":
        blocks = power_of_two(e8m0_exponent(magnitude, step_of(RULE, WHICH), RULE))
    else:
        blocks = tl.div_rn(magnitude, constant(divisor_of(RULE, WHICH)))
        if KIND == "minifloat":
            GRID: tl.constexpr = JOB.plan.scale_element
            blocks = nonzero(round_nearest(quotient(blocks, by_scale), GRID, True))
        else:
            blocks = finite_or_nan(to_float32(in_scale_dtype(blocks, KIND)))
    return blocks


@triton.jit
def in_scale_dtype(blocks, KIND: tl.constexpr):
    """Block scales as one of FLOAT_SCALES, rounded to nearest, ties to even."""
    if KIND == "float16":
        found = blocks.to(tl.float16)
    elif KIND == "bfloat16":
        found = to_bfloat16(blocks, True)
    else:
        found = blocks
    return found


@triton.jit
def squared_error(u, blocks, first, JOB: tl.constexpr):
    """reference._squared_error. u: x in code units under `blocks`."""
    ELEMENT: tl.constexpr = JOB.plan.element
    if JOB.plan.scale_kind == "e8m0":
        weight = blocks * reciprocal(first)
    elif JOB.plan.scale_kind == "minifloat":
        weight = blocks
    else:
        weight = tl.div_rn(blocks, first)
    difference = (round_nearest(u, ELEMENT, True) - u) * weight
    return tree_sum(difference * difference)


@triton.constexpr_function
def in_tiles(JOB):
    """A value for each block, taken apart by the lines that share a scale; and which axis these are."""
    if JOB.dim == -1:
        return (JOB.rows // JOB.lines, JOB.lines, JOB.columns // JOB.block), 1
    return (JOB.rows // JOB.block, JOB.columns // JOB.lines, JOB.lines), 2


@triton.jit
def tile_largest(x, JOB: tl.constexpr):
    """The largest of what the blocks of a tile have, none below zero, in the matrix's order of tiles; NaN above all."""
    apart: tl.constexpr = in_tiles(JOB)[0]
    return float_of(tl.max(tl.reshape(bits_of(x), apart), axis=in_tiles(JOB)[1], keep_dims=True))


@triton.jit
def largest_of_tiles(x, JOB: tl.constexpr):
    """(G, 1, I), none below zero: of each block the largest of all blocks that share its scale."""
    if JOB.lines > 1:
        x = tl.reshape(tl.broadcast_to(tile_largest(x, JOB), in_tiles(JOB)[0]), x.shape)
    return x


@triton.jit
def scaled(x, scale, JOB: tl.constexpr):
    """Block scales (G, 1, I) float32, and x in code units under them, which is what is rounded: reference.block_scale
    and reference._in_code_units. scale: the tensor scale, zero made one."""
    RULE: tl.constexpr = JOB.rule
    if JOB.plan.block is None:
        best, u = scale, quotient(x, divisor(scale))
    else:
        magnitude, by_scale = largest_of_tiles(magnitude_of(x, RULE), JOB), divisor(scale)
        first = candidate(magnitude, by_scale, 0, JOB)
        best, u = first, code_units(x, scale, first, JOB)
        if tried(RULE) > 1:
            least = squared_error(u, first, first, JOB)
            for which in tl.static_range(1, tried(RULE)):
                blocks = candidate(magnitude, by_scale, which, JOB)
                units = code_units(x, scale, blocks, JOB)
                error = squared_error(units, blocks, first, JOB)
                better = error < least
                best, u = tl.where(better, blocks, best), tl.where(better, units, u)
                least = tl.where(better, error, least)
    return best, u


# --------------------------------------------------------------------------------------------------------------- encode


@triton.jit
def code_units(x, scale, blocks, JOB: tl.constexpr):
    """reference._in_code_units of a format with blocks."""
    if JOB.plan.scale_kind == "e8m0":
        u = (x * JOB.rule.headroom) * reciprocal(blocks)
    elif JOB.plan.scale_kind == "minifloat":
        u = quotient(x, divisor(scale * blocks))
    else:
        u = quotient(x, divisor(nonzero(blocks)))
    return u


@triton.jit
def largest_of_four(x, PAIR: tl.constexpr):
    """float32 1 at what reference._largest keeps. PAIR: elements that stay or go together, 1 or 2."""
    grouped: tl.constexpr = (x.shape[0], x.shape[1] // (4 * PAIR), 4, PAIR, x.shape[2])
    groups = tl.reshape(x, grouped)
    size = tl.sum(groups * groups, axis=3) if PAIR == 2 else tl.sum(tl.abs(groups), axis=3)
    place = tl.arange(0, 4)[None, None, :, None]
    rank = tl.zeros(size.shape, tl.int32)
    for other in tl.static_range(4):
        rival = tl.sum(tl.where(place == other, size, 0.0), axis=2, keep_dims=True)  # one term is not zero
        rank += ((rival > size) | ((rival == size) & (place > other))).to(tl.int32)
    keep = tl.where(rank < 2, 1.0, 0.0)[:, :, :, None, :]
    return tl.reshape(tl.broadcast_to(keep, grouped), x.shape)


@triton.jit
def corrected(u, codes, blocks, block_index, key, JOB: tl.constexpr):
    """EDEN: reference._corrected."""
    GROUP: tl.constexpr = JOB.plan.correction // JOB.plan.block
    GRID: tl.constexpr = JOB.plan.scale_element
    grouped: tl.constexpr = (blocks.shape[0] // GROUP, GROUP, blocks.shape[2])
    square = tree_sum(tl.reshape(tree_sum(u * u), grouped))
    product = tree_sum(tl.reshape(tree_sum(u * codes), grouped))
    correction = tl.where(product == 0, 1.0, tl.div_rn(square, nonzero(product)))
    correction = tl.reshape(tl.broadcast_to(correction, grouped), blocks.shape)
    return round_stochastic(blocks * correction, GRID, draw(block_index, key))


@triton.jit
def gradient_mask(u, codes, JOB: tl.constexpr):
    """uint32 whose highest bit is 1 where a gradient passes: the sign of what is compared less its limit. A NaN that a
    GPU computes has none."""
    over = tl.abs(codes - u if JOB.plan.mask.kind == "error" else u) - JOB.passes_below
    if INTERPRETED:
        over = tl.where(over == over, over, 0.0)
    return over.to(tl.uint32, bitcast=True)


@triton.jit
def joined(bits, x):
    """bits, and below them the highest of x: one funnel shift."""
    return (bits << 1) | (x >> 31)


@triton.jit
def highest_bits(x, JOB: tl.constexpr):
    """(R, C / 8) uint8 of uint32 (R, C): the highest bits of eight neighbours in a row, the first lowest."""
    x_even, x_odd = tl.split(tl.reshape(x, (JOB.rows, JOB.columns // 8, 2, 2, 2)))
    x_04, x_26 = tl.split(x_even)
    x_15, x_37 = tl.split(x_odd)
    x_0, x_4 = tl.split(x_04)
    x_2, x_6 = tl.split(x_26)
    x_1, x_5 = tl.split(x_15)
    x_3, x_7 = tl.split(x_37)
    upper = joined(joined(joined(x_7 >> 31, x_6), x_5), x_4)
    return joined(joined(joined(joined(upper, x_3), x_2), x_1), x_0).to(tl.uint8)


# ------------------------------------------------------------------------------------------------------------- rotation


@triton.jit
def hadamard(x, N: tl.constexpr):
    """(G, N, I) times the Hadamard matrix over sqrt(N), in the order of additions of reference.rotate: elements half a
    block apart first. An element's partner is the sum of both, as integers, less itself: moved, not computed. A product
    with ±1 rounds nothing, so that the fused multiply-add is the reference's sum or difference."""
    shape: tl.constexpr = x.shape
    side = (1 - 2 * tl.arange(0, 2)).to(tl.float32)[None, :, None, None]
    for stage in tl.static_range(log2(N)):
        pairs = tl.reshape(x, (x.shape[0] * x.shape[1] // (N >> stage), 2, N >> (stage + 1), x.shape[2]))
        partner = float_of(tl.sum(bits_of(pairs), axis=1, keep_dims=True) - bits_of(pairs))
        x = tl.reshape(tl.fma(pairs, tl.broadcast_to(side, pairs.shape), partner), shape)
    return x * (N**-0.5)


@triton.jit
def in_blocks(tile, N: tl.constexpr, JOB: tl.constexpr):
    """(R, C) -> (R * C / N, N, 1) along rows, (R / N, N, C) along columns."""
    LANES: tl.constexpr = 1 if JOB.dim == -1 else JOB.columns
    return tl.reshape(tile, (JOB.rows * JOB.columns // (N * LANES), N, LANES))


@triton.jit
def signs_of(signs, N: tl.constexpr):
    """(N,) ±1: given as float32, or drawn by a key, two int32, as reference.random_signs."""
    place = tl.arange(0, N)
    if signs.dtype.element_ty == tl.int32:
        found = once((mix(place, signs) & 1).to(tl.float32) * 2.0 - 1.0)
    else:
        found = tl.load(signs + place)
    return found


@triton.jit
def rotate(x, signs, INVERSE: tl.constexpr, UNIT: tl.constexpr, JOB: tl.constexpr):
    """float32 (R, C), x in units of a power of two -> x D H in blocks along the contraction, or x (D H)^-1:
    reference.rotate, unrotate."""
    N: tl.constexpr = JOB.rotation
    blocks = in_blocks(x, N, JOB)
    if signs is None:
        blocks = hadamard(blocks * UNIT, N)
    else:
        diagonal = (signs_of(signs, N) * UNIT)[None, :, None]
        blocks = hadamard(blocks, N) * diagonal if INVERSE else hadamard(blocks * diagonal, N)
    return tl.reshape(blocks, (JOB.rows, JOB.columns))


# --------------------------------------------------------------------------------------------------------------- output


@triton.jit
def store(pointer, tile, row, column, rows, columns):
    """The part of tile (R, C) that lies inside a (rows, columns) matrix, at (row, column)."""
    r, c = tl.arange(0, tile.shape[0])[:, None], tl.arange(0, tile.shape[1])[None, :]
    inside = (row + r < rows) & (column + c < columns)
    pointer += row.to(tl.int64) * columns + column
    tl.store(pointer + r * columns + c, tile, mask=inside)


@triton.jit
def share(length, SHARE: tl.constexpr, JOB: tl.constexpr):
    """Elements along a dim of `length` where one stands for SHARE; written so that Triton sees what they are a multiple
    of, and makes wide stores."""
    if JOB.aligned and SHARE <= 64:
        shared = length // 128 * (128 // SHARE)
    else:
        shared = tl.cdiv(length, SHARE)
    return shared


@triton.jit
def emit(pointer, tile, i, j, rows, columns, SHARE: tl.constexpr, LINES: tl.constexpr, JOB: tl.constexpr):
    """Stores tile (i, j) (any shape in row-major order), of which one element stands for SHARE along the contraction.
    LINES: as (lines, contraction), for which a tile along columns is transposed; else in the place of the matrix."""
    if JOB.dim == -1:
        flat = tl.reshape(tile, (JOB.rows, JOB.columns // SHARE))
        store(pointer, flat, i * JOB.rows, j * (JOB.columns // SHARE), rows, share(columns, SHARE, JOB))
    else:
        flat = tl.reshape(tile, (JOB.rows // SHARE, JOB.columns))
        row, column = i * (JOB.rows // SHARE), j * JOB.columns
        if LINES:
            store(pointer, tl.trans(flat), column, row, columns, share(rows, SHARE, JOB))
        else:
            store(pointer, flat, row, column, share(rows, SHARE, JOB), columns)


@triton.jit
def emit_scales(pointer, scales, i, j, rows, columns, LAST: tl.constexpr, JOB: tl.constexpr):
    """Stores a block scale for each tile of JOB.lines lines. LAST: as (lines, contraction); else where tiles lie."""
    HEIGHT: tl.constexpr = JOB.lines if JOB.dim == -1 else JOB.block
    WIDTH: tl.constexpr = JOB.block if JOB.dim == -1 else JOB.lines
    tiles = tl.reshape(tile_largest(scales, JOB), (JOB.rows // HEIGHT, JOB.columns // WIDTH))
    row, column = i * (JOB.rows // HEIGHT), j * (JOB.columns // WIDTH)
    down, across = tl.cdiv(rows, HEIGHT), tl.cdiv(columns, WIDTH)
    if LAST and JOB.dim == -2:
        store(pointer, tl.trans(tiles), column, row, across, down)
    else:
        store(pointer, tiles, row, column, down, across)


@triton.jit
def rows_first(x, JOB: tl.constexpr):
    """x (any shape of a tile) in registers whose order is that of four neighbouring rows: those that a word of bytes is
    stored for, where columns are lines. Nothing is moved."""
    fours = tl.permute(tl.reshape(x, (JOB.rows // 4, 2, 2, JOB.columns)), (0, 3, 1, 2))
    even, odd = tl.split(fours)
    x_0, x_2 = tl.split(even)
    x_1, x_3 = tl.split(odd)
    fours = tl.join(tl.join(x_0, x_2), tl.join(x_1, x_3))
    return tl.reshape(tl.permute(fours, (0, 2, 3, 1)), x.shape)


@triton.jit
def minifloat_field(code, ELEMENT: tl.constexpr):
    """The bits of a code without its sign, int32: scaled so, the element's exponents and subnormals are float32's."""
    return (bits_of(code * (2.0 ** (-126 - ELEMENT.min_exponent))) & ABS) >> (23 - ELEMENT.mantissa_bits)


@triton.jit
def packed_in_bytes(field, BITS: tl.constexpr, JOB: tl.constexpr):
    """8 / BITS neighbours along the contraction in one byte, the first in the low bits."""
    COUNT: tl.constexpr = 8 // BITS
    if JOB.dim == -1:
        apart = tl.reshape(field, (JOB.rows, JOB.columns // COUNT, COUNT, 1))
    else:
        apart = tl.reshape(field, (1, JOB.rows // COUNT, COUNT, JOB.columns))
    return tl.sum(apart << (tl.arange(0, COUNT) * BITS)[None, None, :, None], axis=2).to(tl.uint8)


@triton.jit
def stored_integer(codes, JOB: tl.constexpr):
    whole = codes * (1.0 / JOB.unit) - JOB.offset
    return whole.to(tl.int32).to(tl.int8)


@triton.jit
def code_field(codes, BITS: tl.constexpr, ELEMENT: tl.constexpr):
    """The bits of a code as reference.pack writes them, int32. A NaN, whose scale is NaN too, is the largest code."""
    codes = tl.where(codes == codes, codes, ELEMENT.max)
    if ELEMENT.mantissa_bits is None:
        field = ((codes + ELEMENT.max) * (1.0 / ELEMENT.step)).to(tl.int32)
    else:
        magnitude = minifloat_field(codes, ELEMENT) & ((1 << (BITS - 1)) - 1)
        field = magnitude | (((bits_of(codes) >> 31) & 1) << (BITS - 1))
    return field


@triton.jit
def joined_codes(low, high):
    """uint8 of two codes of E2M1 each, times IN_FLOAT16. A NaN, whose bits a GPU makes 0x7FFF, is the largest code."""
    low, high = low.to(tl.float16), high.to(tl.float16)
    if INTERPRETED:
        low = tl.where(low == low, low, 6.0 * IN_FLOAT16).to(tl.int16, bitcast=True)
        high = tl.where(high == high, high, 6.0 * IN_FLOAT16).to(tl.int16, bitcast=True)
        found = ((low >> 9) & 0x07) | ((low >> 12) & 0x08) | ((high >> 5) & 0x70) | ((high >> 8) & 0x80)
        found = found.to(tl.uint8)
    else:
        found = tl.inline_asm_elementwise(JOIN_CODES, "=r,r,r,r,r", [low, high], dtype=tl.uint8, is_pure=True, pack=4)
    return found


@triton.jit
def split_codes(x):
    """Of uint8: the low codes of E2M1 and the high, times IN_FLOAT16, float32."""
    if INTERPRETED:
        bits = x.to(tl.int32)
        low = (((bits << 9) & 0x0E00) | ((bits << 12) & 0x8000)).to(tl.int16).to(tl.float16, bitcast=True)
        high = (((bits << 5) & 0x0E00) | ((bits << 8) & 0x8000)).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        low, high = tl.inline_asm_elementwise(
            SPLIT_CODES, "=r,=r,=r,=r,r", [x], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def pairs_of_e2m1(codes, JOB: tl.constexpr):
    """`packed_in_bytes` of `code_field` by the GPU's conversion into float16."""
    if JOB.dim == -1:
        pairs = tl.reshape(codes, (JOB.rows, JOB.columns // 2, 2))
    else:
        pairs = tl.permute(tl.reshape(codes, (JOB.rows // 2, 2, JOB.columns)), (0, 2, 1))
    low, high = tl.split(pairs * IN_FLOAT16)
    return joined_codes(low, high)


@triton.jit
def emit_packed(pointer, scales, codes, blocks, i, j, rows, columns, JOB: tl.constexpr):
    """Codes and block scales in the bits of their formats."""
    ELEMENT: tl.constexpr = JOB.plan.element
    if ELEMENT.mantissa_bits == 1 and ELEMENT.bits == 4:
        fields = pairs_of_e2m1(codes, JOB)
    elif JOB.width == 8:
        fields = code_field(codes, ELEMENT.bits, ELEMENT).to(tl.uint8)
    else:
        fields = packed_in_bytes(code_field(codes, ELEMENT.bits, ELEMENT), JOB.width, JOB)
    emit(pointer, fields, i, j, rows, columns, 8 // JOB.width, True, JOB)
    if scales is not None:
        emit(scales, scale_field(blocks, JOB), i, j, rows, columns, JOB.block, True, JOB)


@triton.jit
def scale_field(blocks, JOB: tl.constexpr):
    """A block scale in its own format: a byte, or a float."""
    KIND: tl.constexpr = JOB.plan.scale_kind
    if KIND == "e8m0":
        field = (bits_of(blocks) >> 23).to(tl.uint8)
    elif KIND == "minifloat":
        GRID: tl.constexpr = JOB.plan.scale_element
        field = tl.where(blocks == blocks, minifloat_field(blocks, GRID), JOB.scale_nan).to(tl.uint8)
    else:
        field = in_scale_dtype(blocks, KIND)
    return field


@triton.jit
def emit_float8(pointer, scales, codes, blocks, i, j, rows, columns, JOB: tl.constexpr):
    """Codes in float8 and the float32 scale of each 128 along the contraction: the block scale itself of a plan that
    has float32 scales; else the largest block scale over 2^k, as qtensor._shifted has it, and codes times their own
    block scale over that one, rounded to nearest where float8 does not hold them."""
    if JOB.plan.scale_kind == "float32":
        scale = blocks
    else:
        COUNT: tl.constexpr = 128 // JOB.block
        grouped: tl.constexpr = (JOB.groups // COUNT, COUNT, blocks.shape[2])
        # Beyond the matrix elements are zero, and no rule gives a smaller scale than that of zeros.
        largest = float_of(tl.max(tl.reshape(bits_of(blocks), grouped), axis=1, keep_dims=True))
        scale = tl.maximum(largest * JOB.float8_unit, 2.0**-126, propagate_nan=tl.PropagateNan.ALL)
        codes *= tl.reshape(tl.reshape(blocks, grouped) * reciprocal(scale), blocks.shape)
    if JOB.lines == 128:
        emit_scales(scales, scale, i, j, rows, columns, True, JOB)
    elif JOB.dim == -1:
        turned = tl.trans(tl.reshape(scale, (JOB.rows, JOB.columns // 128)))
        store(scales, turned, j * (JOB.columns // 128), i * JOB.rows, share(columns, 128, JOB), rows)
    else:
        emit(scales, scale, i, j, rows, columns, 128, False, JOB)
    if JOB.dim == -2:
        codes = rows_first(codes, JOB)
    found = codes.to(tl.float8e5 if JOB.plan.element.max > 448.0 else tl.float8e4nv)
    emit(pointer, found.to(tl.uint8, bitcast=True), i, j, rows, columns, 1, True, JOB)


@triton.jit
def emit_values(pointer, codes, blocks, i, j, rows, columns, JOB: tl.constexpr):
    """What the matrix is multiplied as, in its own place: integers, or codes times their block scale."""
    if pointer.dtype.element_ty == tl.int8:
        values = stored_integer(codes, JOB)
    else:
        values = codes if JOB.plan.block is None else codes * blocks
        if pointer.dtype.element_ty == tl.bfloat16:
            values = to_bfloat16(values, JOB.inexact)
    emit(pointer, values, i, j, rows, columns, 1, False, JOB)


@triton.jit
def tensor_scale_of_blocks(pointer, i, j, rows, columns, JOB: tl.constexpr):
    """The tensor scale of the tile's blocks, zero made one: (1, 1, 1), of each row (G, 1, 1), or of each column
    (1, 1, C)."""
    if JOB.scales == "none":
        scale = constant(1.0)
    elif JOB.scales == "single":
        scale = tl.load(pointer) + constant(0.0)
    elif JOB.dim == -1:
        r = i * JOB.rows + tl.arange(0, JOB.rows)
        scale = tl.load(pointer + r, mask=r < rows, other=0.0)[:, None]
        scale = tl.reshape(tl.broadcast_to(scale, (JOB.rows, JOB.columns // JOB.block)), (JOB.groups, 1, 1))
    else:
        c = j * JOB.columns + tl.arange(0, JOB.columns)
        scale = tl.load(pointer + c, mask=c < columns, other=0.0)[None, None, :]
    return nonzero(scale)


@triton.jit
def quantize_tile(
    tile, scale, key, signs, values, value_scales, packed, packed_scales, float8, float8_scales, mask,
    i, j, rows, columns, UNIT: tl.constexpr, JOB: tl.constexpr,
):  # fmt: skip
    """One quantisation of a loaded tile (i, j) of (rows, columns), in units of UNIT: every output of it that there is a
    pointer for."""
    ELEMENT: tl.constexpr = JOB.plan.element  # a constexpr by its annotation: Triton 3.6 passes no bare object on
    x = to_float32(tile)
    if JOB.rotation is not None:
        x = rotate(x, signs, False, UNIT, JOB)
    else:
        x = x * UNIT
    x = in_blocks(x, JOB.block, JOB)
    above = tensor_scale_of_blocks(scale, i, j, rows, columns, JOB)
    if JOB.divides_first:
        x = quotient(x, divisor(above))
    blocks, u = scaled(x, above, JOB)
    if JOB.rounding.codes == "nearest":
        codes = round_nearest(u, ELEMENT, JOB.clips)
    if JOB.rounding.codes == "stochastic":
        codes = round_stochastic(u, ELEMENT, draw(element_index(i, j, rows, columns, 1, JOB), key))
    if JOB.plan.sparsity is not None:
        codes = codes * largest_of_four(x, 2 if JOB.plan.sparsity == "4:8" else 1)
    if JOB.rounding.corrects:
        blocks = corrected(u, codes, blocks, element_index(i, j, rows, columns, JOB.block, JOB), key, JOB)

    if mask is not None:
        passed = gradient_mask(u, codes, JOB)
        if JOB.mask_bits:
            emit(mask, highest_bits(passed, JOB), i, j, rows, columns, 8, False, JOB)
        else:
            emit(mask, (passed >> 31).to(tl.uint8), i, j, rows, columns, 1, False, JOB)
    if value_scales is not None:
        if JOB.lines > 1:
            emit_scales(value_scales, blocks, i, j, rows, columns, False, JOB)
        else:
            emit(value_scales, blocks, i, j, rows, columns, JOB.block, False, JOB)
    if packed is not None:
        emit_packed(packed, packed_scales, codes, blocks, i, j, rows, columns, JOB)
    if float8 is not None:
        emit_float8(float8, float8_scales, codes, blocks, i, j, rows, columns, JOB)
    if values is not None:
        emit_values(values, codes, blocks, i, j, rows, columns, JOB)


@triton.jit
def element_index(i, j, rows, columns, SHARE: tl.constexpr, JOB: tl.constexpr):
    """reference.element_index of the tile's elements (SHARE 1) or of its block scales (SHARE block), int32."""
    if JOB.lines > 1:
        index = index_in_tiles(i, j, columns, JOB)
    elif JOB.dim == -1:
        r = i * JOB.rows + tl.arange(0, JOB.rows)[:, None]
        c = j * (JOB.columns // SHARE) + tl.arange(0, JOB.columns // SHARE)[None, :]
        index = tl.reshape(r * (columns // SHARE) + c, (JOB.groups, JOB.block // SHARE, 1))
    else:
        r = i * (JOB.rows // SHARE) + tl.arange(0, JOB.rows // SHARE)[:, None]
        c = j * JOB.columns + tl.arange(0, JOB.columns)[None, :]
        index = tl.reshape(r + c * (rows // SHARE), (JOB.groups, JOB.block // SHARE, JOB.columns))
    return index


@triton.jit
def index_in_tiles(i, j, columns, JOB: tl.constexpr):
    """`element_index` where lines share scales: tiles follow each other, and each one's rows."""
    HEIGHT: tl.constexpr = JOB.lines if JOB.dim == -1 else JOB.block
    WIDTH: tl.constexpr = JOB.block if JOB.dim == -1 else JOB.lines
    r = i * JOB.rows + tl.arange(0, JOB.rows)[:, None]
    c = j * JOB.columns + tl.arange(0, JOB.columns)[None, :]
    before = (r // HEIGHT * tl.cdiv(columns, WIDTH) + c // WIDTH) * (HEIGHT * WIDTH)
    return in_blocks(before + r % HEIGHT * WIDTH + c % WIDTH, JOB.block, JOB)


@triton.jit
def as_lines(index, SHAPE: tl.constexpr):
    """Broadcast to SHAPE (A, B, D), as (1, A * B * D, 1)."""
    return tl.reshape(tl.broadcast_to(index, SHAPE), (1, SHAPE[0] * SHAPE[1] * SHAPE[2], 1))


@triton.jit
def arranged(x, width, i, j, rows, columns, SHARE: tl.constexpr, JOB: tl.constexpr):
    """Tile (i, j) of a matrix of `width` columns, each of which stands for SHARE of the tile's, zeros beyond its end.

    Where lines are quantised, so that a thread holds a patch of JOB.side neighbouring rows and JOB.run columns, and few
    threads share a block. For that the lines are read in the order (pieces of a patch, patches), pieces of 16 bytes:
    Triton gives the last patches to lanes, those before to warps, the pieces to registers. All lines are one dim, since
    versions of Triton hand lanes to several in different orders; and there is a third, since Triton gives two matrices
    of one shape the same columns a thread, though one is float32 and the other bfloat16. A warp's patches lie side by
    side, in up to 64 columns where a patch has several rows.
    """
    R: tl.constexpr = JOB.rows
    C: tl.constexpr = JOB.columns // SHARE
    row, column = i * R, j * C
    x += row.to(tl.int64) * width + column
    if JOB.run == 1:
        r, c = tl.arange(0, R)[:, None], tl.arange(0, C)[None, :]
        tile = tl.load(x + r * width + c, mask=(row + r < rows) & (column + c < width), other=0)
    else:
        H: tl.constexpr = JOB.side
        W: tl.constexpr = JOB.run // SHARE if JOB.run > SHARE else 1
        PIECE: tl.constexpr = min(W, 128 // x.dtype.element_ty.primitive_bitwidth)
        PIECES: tl.constexpr = W // PIECE
        BESIDE: tl.constexpr = JOB.columns // 64 if H > 1 and JOB.columns > 64 else 1  # warps side by side
        ACROSS: tl.constexpr = C // W // BESIDE
        lines: tl.constexpr = (H * PIECES, R * C // (H * W), 1)
        piece, patch = tl.arange(0, H * PIECES)[:, None, None], tl.arange(0, lines[1])[None, :, None]
        below, beside = patch // ACROSS % (R // H), patch // ACROSS // (R // H) * ACROSS + patch % ACROSS
        r = below * H + piece // PIECES
        inside, r = as_lines(row + r < rows, lines), as_lines(r, lines)
        # Triton sees what is a multiple of what only outside of a reshape.
        c = as_lines(beside * PIECES + piece % PIECES, lines) * PIECE + tl.arange(0, PIECE)[None, None, :]
        tile = tl.load(x + r * width + c, mask=inside & (column + c < width), other=0)
        tile = tl.reshape(tile, (H, PIECES, BESIDE, R // H, ACROSS, PIECE))
        tile = tl.reshape(tl.permute(tile, (3, 0, 2, 4, 1, 5)), (R, C))
    return tile


@triton.jit
def load_tile(x, i, j, rows, columns, JOB: tl.constexpr):
    return arranged(x, columns, i, j, rows, columns, 1, JOB)


@triton.jit
def dequantized(codes, scales, i, j, rows, columns, JOB: tl.constexpr):
    """Tile (i, j) of a matrix that lies packed along its rows as MXFP4, times IN_FLOAT16: float32."""
    BLOCK: tl.constexpr = 32
    # Scales first, since Triton arranges a product as the operand that is loaded last.
    powers = arranged(scales, columns // BLOCK, i, j, rows, columns, BLOCK, JOB).to(tl.int32)
    low, high = split_codes(arranged(codes, columns // 2, i, j, rows, columns, 2, JOB))
    code = tl.reshape(tl.join(low, high), (JOB.rows, JOB.columns // BLOCK, BLOCK))
    return tl.reshape(code * once(power_of_two(powers))[:, :, None], (JOB.rows, JOB.columns))


@triton.jit
def quantize_kernel(
    x, x_scales, rows, columns,
    scale, key, signs, values, value_scales, packed, packed_scales, float8, float8_scales, mask, JOB: tl.constexpr,
):  # fmt: skip
    """x (rows, columns), read once, packed where x_scales are given; one program for each tile."""
    i, j = tl.program_id(0), tl.program_id(1)
    if x_scales is not None:
        tile, UNIT = dequantized(x, x_scales, i, j, rows, columns, JOB), 1.0 / IN_FLOAT16
    else:
        tile, UNIT = load_tile(x, i, j, rows, columns, JOB), 1.0
    found = (values, value_scales, packed, packed_scales, float8, float8_scales, mask)
    quantize_tile(tile, scale, key, signs, *found, i, j, rows, columns, UNIT, JOB)


@triton.jit
def quantize_both_kernel(
    x, rows, columns,
    scale, key, signs, values, value_scales, packed, packed_scales, float8, float8_scales, mask, JOB: tl.constexpr,
    scale_2, key_2, signs_2, values_2, value_scales_2, packed_2, packed_scales_2, float8_2, float8_scales_2, mask_2,
    JOB_2: tl.constexpr,
):  # fmt: skip
    """x (rows, columns), read once and quantised along its rows and along its columns, each its own way."""
    i, j = tl.program_id(0), tl.program_id(1)
    tile = load_tile(x, i, j, rows, columns, JOB)
    found = (values, value_scales, packed, packed_scales, float8, float8_scales, mask)
    quantize_tile(tile, scale, key, signs, *found, i, j, rows, columns, 1.0, JOB)
    # Read again, from the cache, for its arrangement.
    tile = load_tile(x, i, j, rows, columns, JOB_2)
    found = (values_2, value_scales_2, packed_2, packed_scales_2, float8_2, float8_scales_2, mask_2)
    quantize_tile(tile, scale_2, key_2, signs_2, *found, i, j, rows, columns, 1.0, JOB_2)


@triton.jit
def times(tile, scale, i, j, rows, columns, KIND: tl.constexpr, JOB: tl.constexpr):
    """tile (i, j) times a scale: a number, or read, one for all, for each row, or for each column."""
    if KIND == "single":
        tile *= tl.load(scale)
    elif KIND == "rows":
        r = i * JOB.rows + tl.arange(0, JOB.rows)
        tile *= tl.load(scale + r, mask=r < rows, other=1.0)[:, None]
    elif KIND == "columns":
        c = j * JOB.columns + tl.arange(0, JOB.columns)
        tile *= tl.load(scale + c, mask=c < columns, other=1.0)[None, :]
    elif KIND != 1.0:
        tile *= KIND
    return tile


@triton.jit
def load_bits(x, i, j, rows, columns, JOB: tl.constexpr):
    """Tile (i, j) of a matrix of bits, (rows, columns / 8) bytes, the first lowest: int32 of 0 and 1."""
    joined = arranged(x, columns // 8, i, j, rows, columns, 8, JOB).to(tl.int32)
    return tl.reshape((joined[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1, (JOB.rows, JOB.columns))


@triton.jit
def rotate_kernel(x, mask, signs, first, second, y, rows, columns, JOB: tl.constexpr):
    """y = x D H, or (x * scales * mask) (D H)^-1 where JOB.inverse; x, mask, y (rows, columns), or the mask's bits."""
    i, j = tl.program_id(0), tl.program_id(1)
    FIRST: tl.constexpr = JOB.first
    SECOND: tl.constexpr = JOB.second
    tile = to_float32(load_tile(x, i, j, rows, columns, JOB))
    tile = times(tile, first, i, j, rows, columns, FIRST, JOB)
    tile = times(tile, second, i, j, rows, columns, SECOND, JOB)
    if mask is not None:
        if JOB.bits:
            tile = tile * load_bits(mask, i, j, rows, columns, JOB).to(tl.float32)
        else:
            tile = tile * load_tile(mask, i, j, rows, columns, JOB).to(tl.float32)
    if JOB.rotation is not None:
        tile = rotate(tile, signs, JOB.inverse, 1.0, JOB)
    if y.dtype.element_ty == tl.bfloat16:
        tile = to_bfloat16(tile, True)
    store(y, tile, i * JOB.rows, j * JOB.columns, rows, columns)


@triton.jit
def amax_kernel(x, signs, largest, rows, columns, JOB: tl.constexpr):
    """The bits of the largest magnitude of x D H, of each line along the contraction, or of all where JOB.single: a
    maximum, of which no order changes anything. largest: int32 zeros, (lines,) or ()."""
    i, j = tl.program_id(0), tl.program_id(1)
    tile = to_float32(load_tile(x, i, j, rows, columns, JOB))
    if JOB.rotation is not None:
        tile = rotate(tile, signs, False, 1.0, JOB)
    magnitude = bits_of(tile) & ABS
    if JOB.single:
        tl.atomic_max(largest, tl.max(tl.max(magnitude, axis=1), axis=0))
    elif JOB.dim == -1:
        line = i * JOB.rows + tl.arange(0, JOB.rows)
        tl.atomic_max(largest + line, tl.max(magnitude, axis=1), mask=line < rows)
    else:
        line = j * JOB.columns + tl.arange(0, JOB.columns)
        tl.atomic_max(largest + line, tl.max(magnitude, axis=0), mask=line < columns)


# ------------------------------------------------------------------------------------------------------------ unpacking


@triton.jit
def fields_of(joined, WIDTH: tl.constexpr):
    """(L, n) bytes -> (L, n * 8 / WIDTH) fields of WIDTH bits, int32, the first in a byte lowest. Bytes are halved
    until their fields are apart: so a thread keeps the fields of its bytes, and does not load a byte for each field."""
    field = joined.to(tl.int32)
    for halved in tl.static_range(log2(8 // WIDTH)):
        halves = tl.join(field & ((1 << (4 >> halved)) - 1), field >> (4 >> halved))
        field = tl.reshape(halves, (field.shape[0], 2 * field.shape[1]))
    return field


@triton.jit
def load_fields(pointer, size, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """This program's SIZE fields of WIDTH bits, int32; `size` bytes in all."""
    COUNT: tl.constexpr = 8 // WIDTH
    at = tl.program_id(0).to(tl.int64) * (SIZE // COUNT) + tl.arange(0, SIZE // COUNT)
    return tl.reshape(fields_of(tl.load(pointer + at, mask=at < size, other=0)[None, :], WIDTH), (SIZE,))


@triton.jit
def at_place(place, GRID: tl.constexpr):
    """A minifloat's magnitude by its place among all: moved so, its exponent and subnormals are float32's."""
    return float_of(place << (23 - GRID.mantissa_bits)) * 2.0 ** (126 + GRID.min_exponent)


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
def scale_of(field, FORM: tl.constexpr):
    """A block scale by `scale_field`."""
    if FORM.plan.scale_kind == "e8m0":
        scale = power_of_two(field.to(tl.int32))
    elif FORM.plan.scale_kind == "minifloat":
        GRID: tl.constexpr = FORM.plan.scale_element
        byte = field.to(tl.int32)
        scale = float_of(tl.where(byte == FORM.scale_nan, NAN, bits_of(at_place(byte, GRID))))
    else:
        scale = to_float32(field)
    return scale


@triton.jit
def unpack_kernel(values, codes, scales, count, size, FORM: tl.constexpr, SIZE: tl.constexpr):
    """reference.unpack of SIZE elements of a flat tensor of `count`, in `size` bytes."""
    code = code_of(load_fields(codes, size, FORM.width, SIZE), FORM)
    start = tl.program_id(0).to(tl.int64)
    BLOCK: tl.constexpr = FORM.plan.block
    if BLOCK is not None:
        b = start * (SIZE // BLOCK) + tl.arange(0, SIZE // BLOCK)
        scale = scale_of(tl.load(scales + b, mask=b < count // BLOCK, other=0), FORM)
        code = tl.reshape(tl.reshape(code, (SIZE // BLOCK, BLOCK)) * scale[:, None], (SIZE,))
    if values.dtype.element_ty == tl.int8:
        code = stored_integer(code, FORM)
    elif values.dtype.element_ty == tl.bfloat16:
        code = to_bfloat16(code, True)
    at = start * SIZE + tl.arange(0, SIZE)
    tl.store(values + at, code, mask=at < count)
