"""A QTensor holds what the reference makes of a matrix, in every layout, to the bit; and what would lose bits is
refused by name."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qtrain.config.recipe import read_recipe
from qtrain.quant.quantizer import Quantizer
from qtrain_kernels import qtensor, reference
from qtrain_kernels.formats import E4M3, MX_E2M1, get_format
from qtrain_kernels.plans import Mask, Plan
from qtrain_kernels.qtensor import FLOATS, STORAGES, Layout, QTensor, inexact, quantize, swizzle, unswizzle

RECIPES = Path(__file__).parents[1] / "configs/recipe"
KEY = torch.tensor([7, -8], dtype=torch.int32)


OTHERS = (
    "int8/tensor/float32",
    "int1",
    "mxint8",
    "mxfp6_e2m3",
    "mxfp8_e5m2",
    "e3m4/row/float32",
    "int2_asym/16/float16",
)


def layouts() -> dict[str, Layout]:
    """Of every operand of the shipped recipes, by the text that a printed model shows, and of other formats; shape and
    dim left open."""
    found = {}
    for name in OTHERS:
        fmt = get_format(name)
        found[Plan(fmt.element, fmt.scale_kind, fmt.block_size, fmt.default_scale, per_tensor="tensor" in name), 1] = (
            name
        )
    for name in sorted(path.stem for path in RECIPES.glob("*.yaml")):
        for operands in read_recipe(name).operands().values():
            for spec in operands.values():
                quantizer = Quantizer.build(spec, "reference")
                if quantizer.plan is not None:
                    plan = replace(quantizer.plan)
                    found.setdefault((plan, quantizer.tile[0]), f"{quantizer} {spec.format}")
    return {text: Layout(plan, rows=rows) for (plan, rows), text in found.items()}


LAYOUTS = layouts()
MXFP4 = Plan(MX_E2M1, "e8m0", 32, "floor")
MXFP8 = replace(MXFP4, element=E4M3)
NVFP4 = Plan(MX_E2M1, "minifloat", 16, "absmax", scale_element=E4M3)
QUEST = Plan(get_format("int4").element, "float32", None, "gaussian")
FP8 = Plan(E4M3, "float32", None, "absmax")
FP8_128 = replace(FP8, block=128)


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Gaussian, its rows and columns spread over some octaves; the first row of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x = x * torch.exp2(torch.randint(-3, 4, (rows, 1), generator=generator).float())
    x = x * torch.exp2(torch.randint(-3, 4, (columns,), generator=generator).float())
    x[0] = 0
    return x


def made(layout: Layout, dim: int, lines: int = 40, length: int = 256) -> tuple[QTensor, Tensor]:
    """A matrix of so many lines quantised along dim into a float storage with all that it can keep; and the matrix."""
    shape = (lines, length) if dim == -1 else (length, lines)
    x = matrix(*shape)
    plan = layout.plan
    assert plan is not None
    layout = replace(layout, shape=shape, dim=dim, blocks=plan.block is not None)
    learned = torch.tensor(0.3) if plan.rule == "learned" else None
    return quantize(x, layout, key=KEY, learned=learned, backend="reference"), x


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal to the sign of zero, in shape and dtype; a NaN equals a NaN."""
    if a is None or b is None:
        return a is b
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.itemsize]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def alike(a: QTensor, b: QTensor) -> bool:
    """In layout and tensors. Zeros of a uniform grid have no sign in its bits and integers."""
    uniform = a.layout.plan is not None and a.layout.plan.element.mantissa_bits is None
    pair = [replace(each, codes=each.codes + 0) if uniform else each for each in (a, b)]
    tensors = zip(*(each.tensors() for each in pair), strict=True)
    return a.layout == b.layout and all(same(*each) for each in tensors)


# ------------------------------------------------------------------------------------------------------------ quantise


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.plan.rounding == "nearest"])
def test_each_tile_is_what_the_reference_makes_of_it_alone(name: str, dim: int) -> None:
    """Cut out by hand, with the contraction last; tiles at the edge filled up with zeros."""
    layout = LAYOUTS[name]
    plan = layout.plan
    assert plan is not None
    q, x = made(layout, dim)
    lines = x if dim == -1 else x.T
    scale: Tensor | float = torch.tensor(0.3)
    if plan.rule != "learned":
        whole = x if plan.per_tensor else lines  # sums over a tensor run in the order of its memory
        scale = reference.tensor_scale(whole[:, :, None], plan)
    rows, size = layout.rows, q.layout.size or lines.shape[1]
    expected, mask = torch.zeros_like(lines), torch.zeros_like(lines, dtype=torch.uint8)
    for top in range(0, lines.shape[0], rows):
        for left in range(0, lines.shape[1], size):
            tile = torch.zeros(rows, size)
            part = lines[top : top + rows, left : left + size]
            tile[: part.shape[0]] = part
            own = scale[top] if isinstance(scale, Tensor) and scale.ndim else scale
            codes, block, passes = reference.encode(tile.reshape(1, -1, 1), own, None, plan)
            values = codes if block is None else codes * block
            expected[top : top + rows, left : left + size] = (values * own).view(rows, size)[: part.shape[0]]
            if passes is not None:
                mask[top : top + rows, left : left + size] = passes.view(rows, size)[: part.shape[0]]
    assert torch.equal(q.dequantize().float(), expected if dim == -1 else expected.T)
    if plan.mask is not None:
        assert torch.equal(q.passes("reference"), mask if dim == -1 else mask.T)
        assert 0 < mask.float().mean() < 1 or plan.mask.limit > 6


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_storage_holds_the_same_matrix(name: str, dim: int) -> None:
    """And gives back the float values, scales and mask that it was made of; quantising into it gives it at once."""
    q, x = made(LAYOUTS[name], dim)
    assert (q.dequantize() != 0).float().mean() > 0.1
    learned = torch.tensor(0.3) if q.layout.plan.rule == "learned" else None
    for storage in STORAGES:
        if q.layout.lacks(storage):
            continue
        target = q.layout.stored(storage, blocks=True)
        if qtensor.obstacle(q.layout, target) is None:
            found = q.to(target)
            direct = quantize(x, target, key=KEY, learned=learned, backend="reference")
            assert alike(found, direct), storage
        else:
            found = quantize(x, target, key=KEY, learned=learned, backend="reference")
        assert alike(QTensor.of(found.layout, found.tensors()), found)
        assert alike(found.t.t, found.unmasked) or found.layout.storage not in FLOATS
        assert same(found.t.dequantize().T, found.dequantize())
        rounded = storage.startswith("float8") and q.layout.size is not None and q.layout.plan.scale_kind == "e8m0"
        if not rounded:
            assert torch.equal(found.dequantize().float(), q.dequantize().float()), storage
            assert (found.passes() is None) == (q.mask is None)
        if storage in ("packed", "swizzled", "bfloat16") or (storage == "int8"):
            assert alike(found.to(q.layout), q), storage


@pytest.mark.parametrize("name", LAYOUTS)
def test_real_and_fake_tensors_have_the_shapes_that_the_layout_says(name: str) -> None:
    q, _ = made(LAYOUTS[name], -2)
    for storage in (storage for storage in STORAGES if not q.layout.lacks(storage)):
        layout = q.layout.stored(storage, blocks=True)
        with FakeTensorMode():
            fakes = [torch.empty(shape, dtype=dtype) for shape, dtype in layout.shapes()]
            assert QTensor.of(layout, fakes).layout is layout
        assert hash(layout) == hash(replace(layout))


def test_rotations_run_before_quantising() -> None:
    """Also under tiles, and along either dim."""
    rotation = reference.Rotation(32, reference.random_signs(32, KEY))
    x = matrix(64, 64)
    for dim, rows in ((-1, 1), (-2, 1), (-1, 16), (-2, 16)):
        plan = replace(NVFP4, block=16 * rows)
        layout = Layout(plan, (64, 64), dim, rows=rows)
        turned = reference.rotate(layout.whole_lines(x), rotation).view(64, 64)
        found, expected = quantize(x, layout, rotation), quantize(turned, layout)
        assert alike(found, expected)
        left = quantize(x, Layout(None, (64, 64), dim, "bfloat16"), rotation)
        assert torch.equal(left.codes, turned.bfloat16())


# ------------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize(("lines", "blocks"), [(1, 1), (128, 4), (130, 3), (300, 9), (32, 8), (0, 4)])
def test_scales_are_swizzled_as_cublas_documents(lines: int, blocks: int) -> None:
    """Each byte at the place that the formula says; and back."""
    scales = torch.randint(1, 256, (lines, blocks), generator=torch.Generator().manual_seed(lines)).to(torch.uint8)
    found = swizzle(scales)
    assert torch.equal(unswizzle(found, lines, blocks), scales)
    across = -(-blocks // 4)
    expected = torch.zeros(-(-lines // 128) * 128 * across * 4, dtype=torch.uint8)
    for line in range(lines):
        for block in range(blocks):
            tile, row = (line // 128) * across + block // 4, line % 128
            expected[tile * 512 + (row % 32) * 16 + (row // 32) * 4 + block % 4] = scales[line, block]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "nvfp4"])
def test_units_read_what_torchao_packs_for_them(name: str) -> None:
    """Codes, the order of two in a byte, scale bytes and their order: of each byte the same bits."""
    package, missing = "torchao.prototype.mx_formats", "torchao, the peer, is not installed"
    utils, mx, nvfp4 = (
        pytest.importorskip(f"{package}.{module}", reason=missing) for module in ("utils", "mx_tensor", "nvfp4_tensor")
    )
    x = matrix(136, 192)[1:]  # a zero row's scales are each project's own
    plan = {"mxfp4": MXFP4, "mxfp8": MXFP8, "nvfp4": NVFP4}[name]
    found = quantize(x, Layout(plan, (135, 192), storage="swizzled"))
    if name == "nvfp4":
        scale = nvfp4.per_tensor_amax_to_scale(x.abs().max())
        scales, codes = nvfp4.nvfp4_quantize(x.contiguous(), 16, scale)
        assert torch.equal(found.tensor_scale, scale)
    else:
        dtype = torch.float4_e2m1fn_x2 if name == "mxfp4" else torch.float8_e4m3fn
        scales, codes = mx.to_mx(x.contiguous(), dtype, 32, mx.ScaleCalculationMode.FLOOR)
    assert torch.equal(found.codes, codes.view(torch.uint8).view(135, -1))
    assert torch.equal(found.block_scale, utils.to_blocked(scales.view(torch.uint8)))


def test_packed_lines_have_the_bits_of_the_reference() -> None:
    """Contraction last, so that the transpose has the same."""
    for plan, shape in ((MXFP4, (5, 64)), (NVFP4, (5, 64)), (QUEST, (5, 64)), (QUEST, (5, 63)), (FP8, (3, 7))):
        x = matrix(*shape)
        values, blocks, _ = reference.operand(
            x.reshape(-1, plan.block or shape[1], 1),
            reference.tensor_scale(x[:, :, None], plan),
            None,
            plan,
            torch.float32,
        )
        packed = reference.pack(values, blocks, plan)
        rows = quantize(x, Layout(plan, shape, storage="packed"))
        columns = quantize(x.T.contiguous(), Layout(plan, shape[::-1], -2, "packed"))
        assert torch.equal(rows.codes.flatten(), packed.codes) and alike(columns.t, rows)
        whole = shape[1] * reference.field_width(plan.element) % 8 == 0
        assert rows.codes.ndim == (2 if whole else 1)
        if plan.block is not None:
            assert rows.block_scale.shape == (5, 64 // plan.block)
            assert torch.equal(rows.block_scale.flatten(), packed.scales)


def test_tiles_get_a_scale_a_row_and_codes_a_wider_element() -> None:
    """The values stay; then they pack."""
    for dim in (-1, -2):
        for rows, block, plan in ((16, 16, NVFP4), (32, 32, MXFP8), (32, 64, MXFP4)):
            q, _ = made(Layout(replace(plan, block=rows * block), rows=rows), dim, 40)
            with pytest.raises(ValueError, match=f"tiles of {rows} rows are not packed"):
                q.to("packed")
            smaller = replace(q.layout, plan=replace(plan, block=16), rows=1)
            element = E4M3 if plan.scale_kind == "e8m0" else plan.element
            for target in (smaller, replace(smaller, plan=replace(smaller.plan, element=element))):
                found = q.to(target)
                assert torch.equal(found.dequantize(), q.dequantize())
                assert torch.equal(found.to(target.stored("packed")).dequantize(), q.dequantize())


def test_what_waits_for_the_backward_takes_the_least_bits() -> None:
    for plan, storage, expected in (
        (MXFP4, "bfloat16", "packed"), (QUEST, "int8", "packed"), (FP8, "bfloat16", "packed"),
        (replace(QUEST, element=get_format("int8").element), "int8", "int8"), (FP8_128, "float32", "float32"),
        (replace(QUEST, rule="learned", per_tensor=True), "bfloat16", "bfloat16"), (MXFP4, "float8", "packed"),
        (None, "float32", "float32"),
    ):  # fmt: skip
        assert Layout(plan, (32, 128), storage=storage).saved.storage == expected


def test_the_codes_of_one_scale_serve_the_other_dim() -> None:
    tensor = replace(QUEST, per_tensor=True, mask=Mask("within", 3.0))
    q = quantize(matrix(8, 64), Layout(tensor, (8, 64), storage="int8"))
    again = q.along(-2)
    assert again.layout.dim == -2 and again.mask is None and torch.equal(again.dequantize(), q.dequantize())
    assert Layout(MXFP4, (8, 64)).along(-2).dim == -2  # the block scales are in its values
    for layout in (Layout(QUEST, (8, 64)), Layout(MXFP4, (8, 64), storage="packed")):
        with pytest.raises(ValueError, match="scales of rows or blocks vary along the other dim; dequantise"):
            layout.along(-2)
    with pytest.raises(ValueError, match="packed codes lie along dim -1; convert them to float or int8"):
        Layout(tensor, (8, 64), storage="packed").along(-2)


# ------------------------------------------------------------------------------------------------------------- float8


def test_the_scale_of_a_line_comes_from_its_block_scales() -> None:
    """2^k over the largest of them, so that the largest code is in the top octave of float8; exact for as many octaves
    below as E4M3 reaches."""
    for plan, dtype, top, octaves in (
        (MXFP4, torch.float8_e4m3fn, 384.0, 14), (MXFP8, torch.float8_e4m3fn, 448.0, 0),
        (replace(MXFP4, element=get_format("mxfp6_e3m2").element), torch.float8_e4m3fn, 448.0, 9),
        (replace(MXFP4, element=get_format("mxfp8_e5m2").element), torch.float8_e5m2, 57344.0, 0),
    ):  # fmt: skip
        levels = torch.tensor(plan.element.levels())
        for dim, depth in ((-1, octaves), (-2, octaves), (-1, octaves + 1)):
            codes = levels[torch.arange(4 * 64) % len(levels)].view(4, 64)
            codes[:, [0, 32]] = plan.element.max
            blocks = (
                torch.tensor([[2.0**40, 2.0 ** (40 - depth)]]).expand(4, 2) * torch.exp2(torch.arange(4.0))[:, None]
            )
            values = codes * blocks.repeat_interleave(32, 1)
            layout = Layout(plan, (4, 64) if dim == -1 else (64, 4), dim, blocks=True)
            turned = values if dim == -1 else values.T
            q = QTensor(turned, blocks if dim == -1 else blocks.T, None, None, layout)
            found = q.to("float8")
            assert found.codes.dtype == dtype and found.codes.float().abs().amax(1).tolist() == [top] * 4
            assert found.codes.is_contiguous() and found.block_scale.shape == (4, 1)
            assert inexact(q) == (found.dequantize() != turned).sum()
            assert (inexact(q) == 0) == (depth <= octaves)
            tile = replace(plan, block=2 * 32)
            both = replace(
                q,
                layout=replace(layout, plan=tile, rows=2),
                block_scale=q.block_scale[1::2] if dim == -1 else q.block_scale[:, 1::2],
            )
            assert (
                both.to("float8").block_scale.flatten().tolist() == found.block_scale[[1, 1, 3, 3]].flatten().tolist()
            )
            grouped = q.to("float8_128")
            assert torch.equal(grouped.codes.float(), found.codes.float()) and grouped.block_scale.shape == (1, 4)


def test_a_nan_among_the_block_scales_makes_its_line_nan() -> None:
    x = matrix(4, 256)
    x[1, 40] = float("nan")
    q = quantize(x, Layout(MXFP4, (4, 256), storage="packed"))
    for storage, lines in (("float8", slice(0, 256)), ("float8_128", slice(0, 128))):
        found = q.to(storage).dequantize()
        assert found[1, lines].isnan().all() and found[[0, 2, 3]].isfinite().all()
    assert q.to("float8_128").dequantize()[1, 128:].isfinite().all()


def test_extreme_block_scales_go_into_float8() -> None:
    for exponent in (-127, -126, 100, 120, 127):
        blocks = torch.full((1, 2), 2.0**exponent)
        codes = torch.ones(1, 64)
        q = QTensor(codes * blocks[0, 0], blocks, None, None, Layout(MXFP4, (1, 64), blocks=True))
        assert torch.equal(q.to("float8").dequantize(), q.dequantize()) and inexact(q) == 0
        wide = replace(q, layout=replace(q.layout, plan=MXFP8))
        assert torch.equal(wide.to("float8").dequantize(), q.dequantize())


@pytest.mark.parametrize(("lines", "length"), [(5, 160), (130, 384), (300, 128)])
def test_groups_of_128_share_a_scale(lines: int, length: int) -> None:
    """A ragged last group too; 128x128 tiles keep one scale each."""
    for dim in (-1, -2):
        q, _ = made(Layout(MXFP4), dim, lines, length)
        found = q.to("float8_128")
        values = q.codes if dim == -1 else q.codes.T
        scales = q.block_scale if dim == -1 else q.block_scale.T
        for group in range(-(-length // 128)):
            expected = (scales[:, 4 * group : 4 * group + 4].amax(1) / 64).clamp_min(2.0**-126)  # where all are zero
            assert torch.equal(found.block_scale[group], expected)
            part = slice(128 * group, 128 * group + 128)
            assert torch.equal(found.codes[:, part].float(), values[:, part] / expected[:, None])
    if length % 128:
        return
    for dim in (-1, -2):
        for plan, rows in ((FP8_128, 1), (replace(FP8_128, block=128 * 128), 128)):
            shape = (lines, length) if dim == -1 else (length, lines)
            x = matrix(*shape)
            layout = Layout(plan, shape, dim, "float8_128", rows)
            found, expected = quantize(x, layout), quantize(x, layout.stored("float32"))
            assert torch.equal(found.dequantize(), expected.dequantize())
            wanted = (length // 128, lines) if rows == 1 else (-(-lines // rows), length // 128)
            assert found.block_scale.shape == wanted and found.block_scale.is_contiguous()
            assert torch.equal(found.to("float32").codes, expected.codes)


# ------------------------------------------------------------------------------------------------------------ refusals

TILES = Layout(replace(NVFP4, block=256), (32, 32), rows=16)
BAD = {
    "another storage": (lambda: Layout(MXFP4).stored("fp4"), "there is no such storage; use float32, bfloat16, int8"),
    "another dim": (lambda: Layout(MXFP4, dim=0), "blocks lie along dim -1 or -2; got 0"),
    "integers of minifloats": (lambda: Layout(MXFP4).stored("int8"), "int8 holds integer codes without block scales"),
    "integers under a learned scale": (
        lambda: Layout(replace(QUEST, rule="learned", per_tensor=True)).stored("int8"),
        "a NaN has no integer, and a learned scale",
    ),
    "integers with zeros that they lack": (
        lambda: Layout(replace(QUEST, element=get_format("int8").element, sparsity="2:4")).stored("int8"),
        "sparsity makes codes zero, which integers stored less a half",
    ),
    "a plan of too many bits": (
        lambda: Layout(FP8_128).stored("bfloat16"),
        "more than 8 significant bits; use float32",
    ),
    "packed tiles": (lambda: TILES.stored("packed"), "tiles of 16 rows are not packed"),
    "swizzled tiles": (lambda: TILES.stored("swizzled"), "tiles of 16 rows are not packed; give each row a block"),
    "packed float32 scales": (lambda: Layout(FP8_128).stored("packed"), "do not hold every code and scale"),
    "swizzled integers": (
        lambda: Layout(QUEST).stored("swizzled"),
        "take e2m1/32/e8m0, e2m1/16/e4m3, e4m3/32/e8m0; found other codes/line",
    ),
    "float8 of integers": (
        lambda: Layout(QUEST).stored("float8"),
        "float8 holds minifloat codes of at most 3 mantissa",
    ),
    "float8 of E4M3 scales": (lambda: Layout(NVFP4).stored("float8"), "scales in minifloat are no powers of two"),
    "groups of a line": (
        lambda: Layout(FP8).stored("float8_128"),
        "block scales are not those of 128 elements or less",
    ),
    "groups of float32 scales": (
        lambda: Layout(replace(FP8_128, block=32)).stored("float8_128"),
        "must be float32 of E4M3 codes, in blocks of 128 or 128x128",
    ),
    "codes of a float": (lambda: Layout(None).stored("packed"), "it is not quantised; use float32 or bfloat16"),
    "rounding a float": (
        lambda: quantize(matrix(4, 4), Layout(None, (4, 4))).to("bfloat16"),
        "not quantised, so another form would round it",
    ),
    "packing without scales": (
        lambda: quantize(matrix(4, 32), Layout(MXFP4, (4, 32))).to("packed"),
        "not kept beside the values; quantise with",
    ),
    "packing a NaN under a learned scale": (
        lambda: quantize(
            matrix(4, 32) / 0,
            Layout(replace(QUEST, rule="learned", per_tensor=True), (4, 32), storage="packed"),
            learned=torch.tensor(0.3),
        ),
        r"bfloat16 \(4, 32\) cannot become packed: it holds a NaN, which has no bits under a learned scale",
    ),
    "undoing float8": (
        lambda: quantize(matrix(4, 32), Layout(MXFP4, (4, 32), storage="float8")).to("packed"),
        "float8 may have rounded its codes",
    ),
    "telling codes from products": (
        lambda: quantize(matrix(4, 128), Layout(FP8_128, (4, 128), blocks=True)).to("float8_128"),
        "codes cannot be told from their product with float32 scales",
    ),
    "another dim's codes": (
        lambda: quantize(matrix(32, 32), Layout(MXFP4, (32, 32))).to(Layout(MXFP4, (32, 32), -2)),
        r"it lies along dim -1; asked for \(32, 32\) along dim -2",
    ),
    "a mask from nowhere": (
        lambda: quantize(matrix(4, 32), Layout(MXFP4, (4, 32))).to(
            Layout(replace(MXFP4, mask=Mask("inside", 6)), (4, 32))
        ),
        "it has no such mask",
    ),
    "narrower codes": (
        lambda: quantize(matrix(4, 32), Layout(MXFP8, (4, 32), blocks=True)).to(Layout(MXFP4, (4, 32))),
        "codes and blocks are not among those of the target's plan",
    ),
    "larger blocks": (
        lambda: quantize(matrix(4, 64), Layout(MXFP4, (4, 64), blocks=True)).to(
            Layout(replace(MXFP4, block=64), (4, 64))
        ),
        "codes and blocks are not among those of the target's plan",
    ),
    "tensors of another layout": (
        lambda: QTensor.of(Layout(MXFP4, (4, 32), storage="packed"), [torch.zeros(4, 16)]),
        r"storage 'packed' has tensors \[\(\(4, 16\), torch.uint8\), .*; got \[\(\(4, 16\), torch.float32\)\]",
    ),
    "a matrix of another shape": (
        lambda: quantize(matrix(4, 32), Layout(MXFP4, (4, 64))),
        r"the layout is of \(4, 64\); got \(4, 32\)",
    ),
    "counting packed codes": (
        lambda: inexact(quantize(matrix(4, 32), Layout(MXFP4, (4, 32), storage="packed"))),
        "it is no float",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_would_lose_bits_is_refused_by_name(name: str) -> None:
    operation, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        operation()
