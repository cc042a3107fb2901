"""What waits for the backward is in the bits of its format, comes back unchanged, and takes the bytes it claims."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from test_compiled import KEY, PLANS, alike, hard_input
from torch import Tensor, nn

import qtrain
from qtrain_kernels import cpu, qtensor, reference
from qtrain_kernels.formats import get_format
from qtrain_kernels.plans import Packed, Plan, can_pack, field_width
from qtrain_kernels.qtensor import Layout, Side

PACKED = {name: plan for name, plan in PLANS.items() if can_pack(plan)}
E2M1_BYTES = {  # low nibble first; OCP Microscaling Formats v1.0, table 5: sign, two bits of exponent, one of mantissa
    (0.0, 0.5): 0x10, (1.0, 1.5): 0x32, (2.0, 3.0): 0x54, (4.0, 6.0): 0x76,
    (-0.0, -0.5): 0x98, (-1.0, -1.5): 0xBA, (-2.0, -3.0): 0xDC, (-4.0, -6.0): 0xFE,
}  # fmt: skip


def test_codes_and_scales_have_the_bits_of_the_standard() -> None:
    plan = Plan(get_format("mxfp4").element, "e8m0", 32, "floor")
    codes = torch.tensor([code for pair in E2M1_BYTES for code in pair] * 2).view(1, 32, 1)
    for exponent, byte in ((-127, 0), (-126, 1), (0, 127), (3, 130), (125, 252)):
        scale = torch.full((1, 1, 1), 2.0**exponent)
        packed = reference.pack(codes * scale, scale, plan)
        assert packed.codes.tolist() == [*E2M1_BYTES.values()] * 2
        assert packed.scales is not None and packed.scales.tolist() == [byte]
    nan = torch.full((1, 1, 1), float("nan"))
    packed = reference.pack(codes * nan, nan, plan)
    assert packed.scales is not None and packed.scales.tolist() == [255]


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_eight_bits_are_those_of_torch(name: str) -> None:
    element = get_format(name).element
    plan = Plan(element, "float32", None, "absmax")
    codes = torch.tensor([*element.levels(), -0.0]).view(1, -1, 1)
    dtype = torch.float8_e4m3fn if name == "fp8_e4m3" else torch.float8_e5m2
    for module in (reference, cpu):
        assert torch.equal(module.pack(codes, None, plan).codes, codes.view(-1).to(dtype).view(torch.uint8))


@pytest.mark.parametrize("name", ["nvfp4", "e2m1/16/ue5m3"])
def test_scales_have_their_bytes(name: str) -> None:
    fmt = get_format(name)
    assert fmt.scale_element is not None
    plan = Plan(fmt.element, "minifloat", 16, "absmax", scale_element=fmt.scale_element)
    values = [*fmt.scale_element.magnitudes(), float("nan")]
    scales = torch.tensor(values).view(-1, 1, 1)
    for module in (reference, cpu):
        packed = module.pack(scales.expand(-1, 16, 1).contiguous(), scales, plan)
        assert packed.scales is not None and packed.scales.tolist() == list(range(len(values)))
    if name == "nvfp4":
        assert torch.equal(torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float(), scales[:127, 0, 0])


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_scales_of_16_bits_are_kept_in_them(kind: Any) -> None:
    """As numpy and the upper half of a float32 have them."""
    bits = np.arange(1, 0x7C00 if kind == "float16" else 0x7D00, 7, dtype=np.uint16)
    by_numpy = bits.view(np.float16).astype(np.float32) if kind == "float16" else (bits.astype(np.uint32) << 16)
    scales = torch.from_numpy(by_numpy.view(np.float32)).view(-1, 1)
    layout = Layout(Plan(get_format("int4_sym").element, kind, 32, "absmax"), (len(scales), 32), storage="packed")
    for module in (reference, cpu):
        codes, found, *_ = module.quantize(scales.expand(-1, 32) * 7, Side(layout))
        assert codes is not None and found is not None and (codes == 0xEE).all()  # 7 is the last of 15 levels
        assert np.array_equal(found.view(torch.int16).numpy().view(np.uint16)[:, 0], bits)


@pytest.mark.parametrize("name", ["int4/32/float32", "int1/16/float32", "int8_sym/64/float32", "e2m1/16/float32"])
def test_codes_under_given_float32_scales_come_back(name: str) -> None:
    """Of scales of either sign, from subnormals up: the products as numpy rounds them; the codes wherever products are
    normal."""
    fmt = get_format(name)
    plan, levels = Plan(fmt.element, "float32", fmt.block_size, "learned"), torch.tensor(fmt.element.levels())
    generator = torch.Generator().manual_seed(0)
    codes = levels[torch.randint(len(levels), (600, fmt.block_size), generator=generator)]
    scales = torch.randn(600, 1, generator=generator) * torch.exp2(torch.arange(600.0).view(-1, 1) % 260 - 149)
    values = torch.from_numpy(codes.numpy() * scales.numpy())
    packed = reference.pack(values[..., None], scales[..., None], plan)
    assert packed.scales is not None and torch.equal(packed.scales, scales.flatten())
    ones = Packed(packed.codes, torch.ones(600))
    for module in (reference, cpu):
        assert torch.equal(module.unpack(packed, values[..., None].shape, plan, torch.float32)[..., 0], values)
        found = module.unpack(ones, values[..., None].shape, plan, torch.float32)[..., 0]
        assert ((found == codes) | (scales.abs() < 2.0**-120)).all()


@pytest.mark.parametrize("name", PACKED)
def test_packed_values_come_back(name: str) -> None:
    plan = PACKED[name]
    integers = plan.block is None and plan.element.mantissa_bits is None
    dtypes = [torch.float32, *([torch.bfloat16] if plan.exact_in_bfloat16 else []), *([torch.int8] if integers else [])]
    span = plan.span or 96
    odd = [(7, 101, 1)] if plan.span is None and plan.sparsity is None else []
    for shape, finite in product([(6, span, 1), (131, span, 1), *odd], (True, False)):
        x = hard_input(shape)
        if finite:
            x = x.clamp(-8, 8)  # one huge value would flush all else under a tensor scale
        else:
            x[4, 0], x[5, -1] = float("nan"), float("inf")
        scale = reference.tensor_scale(x, plan)
        for dtype in dtypes:
            values, blocks, mask = reference.operand(x, scale, KEY, plan, dtype)
            assert not finite or (values != 0).float().mean() > 0.2
            expected, found = (module.pack(values, blocks, plan) for module in (reference, cpu))
            assert all(map(alike, expected, found)), (shape, dtype)
            assert expected.codes.numel() == -(-x.numel() * field_width(plan.element) // 8)
            # what a NaN of the tensor scale will make NaN again is any code
            free = torch.as_tensor(scale).isnan() if blocks is None else torch.tensor(False)
            for module in (reference, cpu):
                back = module.unpack(expected, values.shape, plan, dtype)
                assert back.dtype == dtype
                assert ((back == values) | (back.isnan() & values.isnan()) | free).all(), (shape, dtype, module)
            if mask is not None:
                bits = reference.join(mask, 1)
                assert torch.equal(cpu.join(mask, 1), bits) and bits.numel() == -(-mask.numel() // 8)
                for module in (reference, cpu):
                    assert torch.equal(module.split(bits, 1, mask.numel()).view(mask.shape), mask)


def test_tensors_that_lie_apart_are_read_as_they_are() -> None:
    """A hook on saved tensors may give back views."""
    plan = PLANS["quartet forward"]
    values, blocks, _ = reference.operand(hard_input((64, 32, 1)).clamp(-8, 8), 1.0, None, plan, torch.bfloat16)
    assert blocks is not None

    def apart(x: Tensor) -> Tensor:
        return torch.stack((x, torch.zeros_like(x)), -1)[..., 0]

    packed = cpu.pack(apart(values), apart(blocks), plan)
    assert all(map(alike, packed, cpu.pack(values, blocks, plan)))
    assert packed.scales is not None
    strided = Packed(apart(packed.codes), apart(packed.scales))
    assert torch.equal(cpu.unpack(strided, values.shape, plan, torch.bfloat16), values)
    assert torch.equal(cpu.split(apart(packed.codes), 4, 64), cpu.split(packed.codes, 4, 64))


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [0, 1, 7, 64, 9001])
def test_fields_join_and_split(width: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = torch.randint(2**width, (count,), generator=torch.Generator().manual_seed(count)).to(torch.uint8)
    by_hand = [
        sum(int(field) << (at * width) for at, field in enumerate(fields[first : first + 8 // width]))
        for first in range(0, count, 8 // width)
    ]
    for threads in (1, 3):
        monkeypatch.setattr(cpu, "_threads", lambda x, threads=threads: threads)
        for module in (reference, cpu):
            assert module.join(fields, width).tolist() == by_hand
            assert torch.equal(module.split(module.join(fields, width), width, count), fields)


def test_what_cannot_come_back_is_not_packed() -> None:
    sparse = PLANS["quest sparse"]  # zeros, which its grid lacks
    float32_blocks = PLANS["fp8 block"]
    e1m0 = get_format("e2m1/16/e1m0")  # a zero scale stands as 1, which its scales lack: 0 and 2
    no_one = Plan(e1m0.element, "minifloat", 16, "absmax", scale_element=e1m0.scale_element)
    assert not any(map(can_pack, (sparse, float32_blocks, no_one)))
    values, _, _ = reference.operand(hard_input((6, 96, 1)), torch.ones(6, 1, 1), None, sparse, torch.float32)
    back = reference.unpack(reference.pack(values, None, sparse), values.shape, sparse, torch.float32)
    assert not torch.equal(back, values)


def step(recipe: Any, seed: int = 0) -> tuple[dict[str, Tensor], float]:
    """Gradients of a layer of 128 by 128 at 64 tokens; and the bytes it saves per element of its input."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(128, 128, bias=False))
    qtrain.convert(model, recipe, skip=())
    qtrain.set_step(model, 0)
    x = torch.randn(64, 128).requires_grad_()
    sizes: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() != model.get_parameter("0.weight").data_ptr():  # which is there anyway
            sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = model(x)
    y.square().sum().backward()
    weight = model[0].weight
    assert x.grad is not None and isinstance(weight.grad, Tensor)
    keys = 9 * 2 * 4
    return {"x": x.grad, "w": weight.grad}, (sum(sizes) - keys) / x.numel()


@pytest.mark.parametrize(
    ("recipe", "bytes_an_element"),
    [
        ("quartet", 4 / 8 + 1 / 32 + 1 / 8),  # codes, scales, mask
        ("quartet_ii", 4 / 8 + 1 / 16 + 4 / 8192),  # a float32 scale of all
        ("quest", 4 / 8 + 4 / 128 + 1 / 8),  # a float32 scale per row
        ({"name": "quest", "bits": 1}, 1 / 8 + 4 / 128 + 1 / 8),
    ],
)
def test_a_layer_keeps_the_bits_of_its_format(
    recipe: Any, bytes_an_element: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, size = step(recipe)
    assert size == pytest.approx(bytes_an_element)
    monkeypatch.setattr(qtensor.Layout, "saved", property(lambda layout: layout.stored(layout.storage)))
    whole, unpacked = step(recipe)
    assert unpacked >= size + 0.5  # int8 or bfloat16
    assert all(torch.equal(packed[name], whole[name]) for name in packed)


def test_bits_are_written_of_what_waits_for_the_backward_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The input of a forward that a backward follows, where that takes it as quantised."""
    asked: list[bool] = []
    quantize = cpu.quantize

    def counted(x: Tensor, side: Side) -> Any:
        asked.append(side.packed)
        assert not side.layout.blocks
        return quantize(x, side)

    monkeypatch.setattr(cpu, "quantize", counted)
    for recipe, wanted, count in (("quartet", [True], 7), ("nvidia_nvfp4", [], 6)):  # whose dgrad reuses the weight
        asked.clear()
        step(recipe)
        assert [each for each in asked if each] == wanted and len(asked) == count, recipe
    asked.clear()
    model = nn.Sequential(nn.Linear(128, 128, bias=False))
    qtrain.convert(model, "quartet", skip=(), backend="compiled")
    with torch.no_grad():
        model.eval()(torch.randn(4, 128))
    assert asked == [False, False]
