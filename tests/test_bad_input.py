"""What no kernel can work on is refused by name, before any memory is read, and what is empty gives the empty result:
every operation of every backend. Triton's run in its interpreter, in a process of their own (as in test_triton.py)."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import passed_in_the_interpreter
from torch import Tensor

from qtrain_kernels import cpu, gpu, reference
from qtrain_kernels.formats import get_format
from qtrain_kernels.gemm import TABLE, fp8_matmul, int8_matmul, multiply, resolve
from qtrain_kernels.plans import Mask, Packed, Plan, Rotation
from qtrain_kernels.qtensor import Layout, QTensor, Side, quantize

ROOT = Path(__file__).parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KEY = torch.tensor([5, -6], dtype=torch.int32)
MXFP4 = Plan(get_format("mxfp4").element, "e8m0", 32, "std", mask=Mask("inside", 6.0))
DRAWN = replace(MXFP4, rule="floor_three_quarters", rounding="stochastic", mask=None)
NVFP4 = Plan(get_format("nvfp4").element, "minifloat", 16, "absmax", scale_element=get_format("nvfp4").scale_element)
QUEST = Plan(get_format("int4").element, "float32", None, "gaussian")
LUQ = replace(QUEST, rule="absmax", element=get_format("int4_sym").element, per_tensor=True)
X = torch.ones(4, 32, 1)
M = X[:, :, 0]
BYTES = torch.zeros(64, dtype=torch.uint8)


@pytest.fixture(params=[gpu] if INTERPRETED else [cpu])
def kernels(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


def bfloat16(k: Any, x: Tensor, plan: Plan, **rest: Any) -> Any:
    return k.quantize(x, Side(Layout(plan, (x.shape[0], x.shape[-1]), storage="bfloat16"), **rest))


BAD: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a vector": (lambda k: bfloat16(k, M[0], MXFP4), r"the layout is of \(32, 32\); got \(32,\)"),
    "another shape": (
        lambda k: k.quantize(M, Side(Layout(MXFP4, (8, 32)))), r"the layout is of \(8, 32\); got \(4, 32\)",
    ),
    "a matrix to rotate": (lambda k: k.rotate(M, Rotation(32)), r"is \(outer, span, inner\); got \(4, 32\)"),
    "integers": (
        lambda k: bfloat16(k, M.int(), MXFP4),
        r"(an operand is float|takes float32 or bfloat16); got torch.int32; convert it with x",
    ),
    "integers to rotate": (lambda k: k.rotate(X.int(), Rotation(32)), "an operand is float; got torch.int32"),
    "meta": (lambda k: bfloat16(k, M.to("meta"), MXFP4), r"(got a tensor on meta|cannot run on meta).*move"),
    "meta to rotate": (lambda k: k.rotate(X.to("meta"), Rotation(32)), r"(got a tensor on meta|cannot run on meta)"),
    "a broken block": (lambda k: bfloat16(k, torch.ones(3, 40), MXFP4), r"\(3, 40\); pad it"),
    "a broken rotation": (lambda k: k.rotate(torch.ones(3, 100, 1), Rotation(32)), r"\(3, 100, 1\); pad it with zeros"),
    "no key": (lambda k: bfloat16(k, M, DRAWN), r"'stochastic' draws random bits; got no key; give \(2,\) int32"),
    "half a key": (lambda k: bfloat16(k, M, DRAWN, key=KEY[:1]), r"a key is \(2,\) int32; got \(1,\) torch.int32"),
    "a key in int64": (lambda k: bfloat16(k, M, DRAWN, key=KEY.long()), r"a key is \(2,\) int32; got .* torch.int64"),
    "a key elsewhere": (lambda k: bfloat16(k, M, DRAWN, key=KEY.to("meta")), "key is on meta, x on cpu; move it"),
    "few signs": (
        lambda k: bfloat16(k, M, MXFP4, rotation=Rotation(32, torch.ones(16))),
        r"a rotation of 32 takes as many signs; got \(16,\)",
    ),
    "few signs to rotate": (
        lambda k: k.rotate(X, Rotation(32, torch.ones(16))), r"a rotation of 32 takes as many signs; got \(16,\)",
    ),
    "a mask of floats": (
        lambda k: k.unrotate(X, Rotation(32), torch.ones(4, 32, 1), torch.float32),
        r"a mask is uint8 of \(4, 32, 1\); got \(4, 32, 1\) torch.float32",
    ),
    "a short mask": (
        lambda k: k.unrotate(X, Rotation(32), torch.ones(4, 16, 1, dtype=torch.uint8), torch.float32),
        r"a mask is uint8 of \(4, 32, 1\); got \(4, 16, 1\) torch.uint8",
    ),
    "too few codes": (
        lambda k: k.unpack(Packed(BYTES[:63], BYTES[:4]), X.shape, MXFP4, torch.bfloat16),
        "128 fields of 4 bits take 64 bytes; got 63",
    ),
    "too few packed scales": (
        lambda k: k.unpack(Packed(BYTES, BYTES[:3]), X.shape, MXFP4, torch.bfloat16),
        r"\(4, 32, 1\) values have 4.0 block scales; got 3",
    ),
    "no packed scales": (
        lambda k: k.unpack(Packed(BYTES, None), X.shape, MXFP4, torch.bfloat16), "have 4.0 block scales; got none",
    ),
    "fields of three bits": (lambda k: k.split(BYTES, 3, 9), "a field has 1, 2, 4, 8 bits; asked for 3"),
    "fields in int64": (lambda k: k.split(BYTES.long(), 4, 9), "packed fields are uint8; got torch.int64"),
    "too few fields": (lambda k: k.split(BYTES, 1, 513), "513 fields of 1 bits take 65 bytes; got 64"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name: str, kernels: ModuleType) -> None:
    operation, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        operation(kernels)


@pytest.mark.skipif(INTERPRETED, reason="of the C++ kernels")
def test_memory_that_was_given_back_is_not_read() -> None:
    x = torch.ones(4, 32)
    x.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"a tensor of \(4, 32\) has no memory: its storage was freed"):
        bfloat16(cpu, x, MXFP4)


FLOATS, INTEGERS = torch.ones(4, 32), torch.ones(32, 8, dtype=torch.int8)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def in_fp8(left: Tensor, right: Tensor) -> Tensor:
    return fp8_matmul(left, torch.ones(len(left), 1), right, torch.ones(1, right.shape[1]), fast=False)


BAD_PRODUCTS: dict[str, tuple[Callable[[], Any], str]] = {
    "floats as integers": (lambda: int8_matmul(FLOATS, INTEGERS), "left must be a matrix in torch.int8; got .*float"),
    "a vector": (lambda: int8_matmul(INTEGERS.T, INTEGERS[:, 0]), r"right must be a matrix in torch.int8; got \(32,\)"),
    "another contraction": (lambda: int8_matmul(INTEGERS, INTEGERS), r"\(32, 8\) and right \(32, 8\) share no contrac"),
    "another device": (lambda: int8_matmul(INTEGERS.T, INTEGERS.to("meta")), "right is on meta, left on cpu; move it"),
    "a third": (lambda: int8_matmul(INTEGERS.T, INTEGERS, 0.3), "offsets of integer codes are 0 or 1/2; got 0.3 and 0"),
    "floats as FP8": (lambda: in_fp8(FLOATS, FLOATS.T.to(E4M3)), "left must be a matrix in torch.float8.*; got .*32"),
    "E5M2 on the right": (lambda: in_fp8(FLOATS.to(E4M3), FLOATS.T.to(E5M2)), "right must be in float8_e4m3fn: CUDA"),
    "another contraction in FP8": (
        lambda: in_fp8(FLOATS.to(E4M3), FLOATS.to(E4M3)), r"\(4, 32\) and right \(4, 32\) share no",
    ),
}  # fmt: skip


def quantised(plan: Plan | None, dim: int) -> QTensor:
    return quantize(torch.ones(32, 32), Layout(plan, (32, 32), dim, blocks=plan is not None and plan.block is not None))


def product(row: str, left: Plan | None, right: Plan | None) -> Tensor:
    return multiply(TABLE[row], quantised(left, -1), quantised(right, -2), torch.bfloat16)


NVFP4_BY_MXFP4 = {  # what each row says of an NVFP4 operand beside one of MXFP4
    "int8": "left: .*int8 holds integer codes without block scales",
    "mxfp4": "left: .*FP4 and MX units take .*; found e2m1/32/e4m3",
    "nvfp4": "right: .*FP4 and MX units take .*; found e2m1/16/e8m0",
    "mxfp8": "left: .*FP4 and MX units take .*; found e4m3/32/e4m3",
    "fp8": "left: .*block scales in minifloat are no powers of two",
    "fp8_fast": "left: .*block scales in minifloat are no powers of two",
    "fp8_block": "left: .*block scales in minifloat must be float32 of E4M3 codes, in blocks of 128 or 128x128",
}
BAD_PRODUCTS |= {
    f"{row} of NVFP4 and MXFP4": (partial(product, row, NVFP4, MXFP4), f"product '{row}' does not take .*: {reason}")
    for row, reason in NVFP4_BY_MXFP4.items()
}
BAD_PRODUCTS |= {
    f"{row} of what is not quantised": (partial(product, row, None, None), "left: .*not quantised; use float32 or bfl")
    for row in NVFP4_BY_MXFP4
}
BAD_PRODUCTS |= {
    f"{setting} on {device}": (
        partial(resolve, setting, Layout(plan), Layout(plan), device, capability),
        f"gemm '{setting}' cannot run on {device}: {reason}; ask for gemm 'auto'",
    )
    for setting, plan, device, capability, reason in (
        (
            "fp4",
            replace(MXFP4, rule="floor"),
            "cpu",
            None,
            "mxfp4 needs a CUDA device of compute capability 10.0 to 10.9; found cpu; mxfp8 .*",
        ),
        ("fp4", NVFP4, "cuda", (9, 0), "nvfp4 needs a CUDA device of compute capability 10.0 or later; found 9.0"),
        ("fp8", MXFP4, "cuda", (8, 0), ".*; fp8 needs a CUDA device of compute capability 8.9 or later; found 8.0"),
        ("fp8", MXFP4, "mps", None, ".*; fp8 needs a CUDA device of compute capability 8.9 or later; found mps"),
    )
}


@pytest.mark.skipif(INTERPRETED, reason="the products are torch's")
@pytest.mark.parametrize("name", BAD_PRODUCTS)
def test_products_that_no_unit_takes_are_refused_by_name(name: str) -> None:
    operation, message = BAD_PRODUCTS[name]
    with pytest.raises(ValueError, match=message):
        operation()


@pytest.mark.skipif(INTERPRETED, reason="the products are torch's")
@pytest.mark.parametrize(("rows", "contraction"), [(0, 32), (4, 0)])
def test_products_of_nothing_are_zeros(rows: int, contraction: int) -> None:
    left, right = torch.ones(rows, contraction), torch.ones(contraction, 16)
    found = in_fp8(left.to(E4M3), right.to(E4M3))
    assert torch.equal(found, torch.zeros(rows, 16, dtype=torch.bfloat16))
    assert torch.equal(int8_matmul(left.to(torch.int8), right.to(torch.int8)), torch.zeros(rows, 16))


@pytest.mark.skipif(INTERPRETED, reason="Triton's kernels take no other")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_floats_are_worked_on_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(4, 32).to(dtype)
    assert all(map(alike, bfloat16(cpu, x, MXFP4), bfloat16(reference, x, MXFP4)))


@pytest.mark.skipif(not INTERPRETED, reason="the C++ kernels work on them in float32")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_tritons_kernels_name_the_floats_they_take(dtype: torch.dtype) -> None:
    for operation in (lambda x: bfloat16(gpu, x[:, :, 0], MXFP4), lambda x: gpu.rotate(x, Rotation(32))):
        with pytest.raises(ValueError, match=rf"takes float32 or bfloat16; got {dtype}; convert it with x.float"):
            operation(X.to(dtype))


def test_what_has_no_rows_gives_the_empty_result(kernels: ModuleType) -> None:
    """Every operation, along either dim, equal in shape and dtype to the reference's."""
    for plan in (MXFP4, DRAWN, NVFP4, QUEST, LUQ):
        for shape, dim in (((0, 32), -1), ((0, 5), -2)):
            if dim == -2 and plan.mask is not None:
                continue
            layout = Layout(plan, shape, dim, blocks=plan.block is not None)
            side = Side(layout, Rotation(32, torch.ones(32)), KEY, packed=True)
            x = torch.empty(shape)
            assert all(map(alike, kernels.quantize(x, side), reference.quantize(x, side))), (plan, shape, dim)
            side = replace(side, layout=replace(layout, plan=replace(plan, mask=None)), packed=False)
            found, wanted = (module.fake_quantize(x, side, torch.bfloat16) for module in (kernels, reference))
            assert alike(found, wanted)
    for shape in ((0, 32, 1), (0, 32, 5)):
        x, rotation, mask = torch.empty(shape), Rotation(32, torch.ones(32)), torch.empty(shape, dtype=torch.uint8)
        for module in (kernels, reference):
            assert alike(module.rotate(x, rotation), torch.empty(shape))
            assert alike(module.unrotate(x, rotation, mask, torch.bfloat16), torch.empty(shape, dtype=torch.bfloat16))
            assert module.split(BYTES[:0], 4, 0).shape == (0,)
    packed = reference.pack(torch.empty(0, 32, 1), torch.empty(0, 1, 1), MXFP4)
    assert kernels.unpack(packed, torch.Size((0, 32, 1)), MXFP4, torch.bfloat16).shape == (0, 32, 1)


def alike(a: Any, b: Any) -> bool:
    """Both the same number or None; or equal in shape, dtype and values."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    return a == b


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter() -> None:
    passed, shown = passed_in_the_interpreter(__file__)
    assert passed == len(BAD) + 3, shown
