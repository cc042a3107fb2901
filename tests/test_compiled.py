"""Compiled code, C++ on CPU, equals the reference bit for bit for every plan, shape, dtype and rotation; and what
backend and GEMM run where."""

import logging
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from qtrain.config.settings import Backend, GemmKind
from qtrain_kernels import cpu, dispatch, gpu, reference
from qtrain_kernels.formats import get_format
from qtrain_kernels.gemm import SETTINGS
from qtrain_kernels.plans import SCALE_RULES, Mask, Plan, Rotation
from qtrain_kernels.qtensor import Layout, Side, float_storage

KEY = torch.tensor([5, -6], dtype=torch.int32)
E2M1 = get_format("mxfp4").element
E4M3, UE5M3 = (get_format(name).scale_element for name in ("nvfp4", "e2m1/16/ue5m3"))
NVFP4 = Plan(E2M1, "minifloat", 16, "absmax", scale_element=E4M3)
PLANS = {
    "quartet forward": Plan(E2M1, "e8m0", 32, "std", "nearest", Mask("inside", 6.0)),
    "quartet backward": Plan(E2M1, "e8m0", 32, "floor_three_quarters", "stochastic"),
    "least error": Plan(E2M1, "e8m0", 32, "mse", "nearest"),
    "best phase": Plan(E2M1, "e8m0", 32, "mse_phase", "nearest", Mask("inside", 6.0)),
    "mxfp8": Plan(get_format("mxfp8_e4m3").element, "e8m0", 32, "rceil"),
    "nvfp4": replace(NVFP4, mask=Mask("error", 1.0)),
    "nvfp4 tile": replace(NVFP4, block=256),
    "nvfp4 ue5m3": replace(NVFP4, scale_element=UE5M3, rounding="stochastic", rule="absmax_headroom"),
    "four over six": replace(NVFP4, rule="four_over_six"),
    "ms-eden": replace(NVFP4, rule="absmax_fitted", rounding="eden", correction=16),
    "ms-eden 128": replace(NVFP4, rule="absmax_fitted", rounding="eden", correction=128),
    "quest": Plan(get_format("int4").element, "float32", None, "gaussian", "nearest", Mask("error", 0.5)),
    "quest sparse": Plan(
        get_format("int4").element, "float32", None, "gaussian", mask=Mask("error", 0.5), sparsity="4:8"
    ),
    "2:4": Plan(get_format("mxfp4").element, "e8m0", 32, "floor", sparsity="2:4"),
    "fp8 block": Plan(get_format("fp8_e4m3").element, "float32", 128, "absmax"),
    "float16 block": Plan(get_format("int4_sym").element, "float16", 32, "absmax", mask=Mask("within", 7.0)),
    "bfloat16 block": Plan(get_format("int4").element, "bfloat16", 128, "gaussian", "stochastic"),
    "luq": Plan(get_format("e3m0/tensor/float32").element, "float32", None, "absmax", "stochastic", per_tensor=True),
    "sawb": Plan(get_format("int4_sym").element, "float32", None, "sawb", per_tensor=True),
    "even": Plan(E2M1, "e8m0", 32, "even", "stochastic"),
    "ceil": Plan(get_format("mxint8").element, "e8m0", 32, "ceil"),
    "round": Plan(get_format("mxfp6_e3m2").element, "e8m0", 32, "round"),
    "std and round": Plan(E2M1, "e8m0", 32, "std_round", mask=Mask("within", 3.0)),
    "gaussian": Plan(E2M1, "e8m0", 32, "gaussian", mask=Mask("error", 0.5)),
    "quest one bit": Plan(get_format("int1").element, "float32", None, "gaussian", mask=Mask("within", 0.65)),
}
SIGNS = torch.tensor([1.0, -1.0, -1.0, 1.0] * 8)


def hard_input(shape: tuple[int, int, int]) -> Tensor:
    """Gaussians over many octaves, with whole zero, subnormal and huge blocks, and ties."""
    generator = torch.Generator().manual_seed(sum(shape))
    outer = shape[0]
    octaves = torch.exp2(torch.randint(-20, 20, (outer, 1, 1), generator=generator).float())
    x = torch.randn(shape, generator=generator) * octaves
    x[0] = 0
    if outer > 4:
        x[1] *= 1e-42
        x[2] = x[2].clamp(-1, 1) * 3e38
        x[3] = torch.round(x[3] * 4) / 4
    return x


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal bits, NaN included."""
    if a is None or b is None:
        return a is b
    bits = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(bits), b.view(bits))


def alike(a: Tensor | float | None, b: Tensor | float | None) -> bool:
    """Equal bits, and NaN in the same places."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return bool(a == b)
    return same(one_nan(a), one_nan(b))


def one_nan(x: Tensor) -> Tensor:
    """The sign and the payload of a NaN are no promise."""
    return torch.where(x.isnan(), torch.tensor(float("nan"), dtype=x.dtype), x) if x.is_floating_point() else x


def matrices(plan: Plan) -> list[tuple[Tensor, int]]:
    """With the dim to quantise: whole and broken vectors of lines, at any number of lanes; lines that no number of
    lanes divides; with infinities and NaN where there are many."""
    span = plan.span or 96
    rows = [(1, span), (6, span), (131, span), (5, 3 * span if plan.span else 192)]
    columns = [(5 * span if plan.span else span, 33), (2 * span if plan.span else span, 64)]
    if plan.span is None and plan.sparsity is None:
        rows += [(7, 100), (3, 1)]
        columns += [(37, 18)]
    found = []
    for shape, dim in (*((shape, -1) for shape in rows), *((shape, -2) for shape in columns)):
        x = hard_input((*shape, 1))[:, :, 0]
        if shape[0] > 5 and dim == -1:
            x[4, 0], x[5, -1] = float("nan"), float("inf")
        found.append((x, dim))
    return found


def sides(plan: Plan, x: Tensor, dim: int, rotation: Rotation | None) -> list[Side]:
    """Into every storage that the C++ writes, and packed beside the first."""
    storages = ["float32", float_storage(plan, torch.bfloat16), "int8", "packed", "float8_128"]
    shape = (x.shape[0], x.shape[1])
    layouts = [
        Layout(plan, shape, dim, storage, blocks=plan.block is not None and storage in ("float32", "bfloat16"))
        for storage in dict.fromkeys(storages)
        if Layout(plan).lacks(storage) is None
    ]
    packs = Layout(plan).lacks("packed") is None
    return [
        Side(layout, rotation, KEY, packed=packs and layout.storage == "float32")
        for layout in layouts
        if layout.held is layout
    ]


def assert_equal(x: Tensor, side: Side) -> None:
    expected, found = (module.quantize(x, side) for module in (reference, cpu))
    assert len(expected) == len(found) and all(map(alike, expected, found)), (x.shape, x.dtype, side.layout)


@pytest.mark.parametrize("name", PLANS)
def test_cpp_equals_the_reference(name: str) -> None:
    plan = PLANS[name]
    for x, dim in matrices(plan):
        for given, rotation in ((x, None), (x.bfloat16(), Rotation(32, SIGNS)), (x.mT.contiguous().mT, Rotation(16))):
            if rotation and x.shape[dim] % rotation.size:
                continue
            for side in sides(plan, given, dim, rotation):
                assert_equal(given, side)
            if given.dtype == torch.bfloat16:
                side = Side(Layout(replace(plan, mask=None), (x.shape[0], x.shape[1]), dim), rotation, KEY)
                expected, found = (module.fake_quantize(given, side, torch.bfloat16) for module in (reference, cpu))
                assert alike(expected, found), (x.shape, dim)


def test_tiles_of_rows_and_learned_scales_are_the_references() -> None:
    x = hard_input((45, 64, 1))[:, :, 0]
    for name, rows in (("nvfp4 tile", 16), ("fp8 block", 1), ("four over six", 1)):
        for dim in (-1, -2)[: 1 + (rows > 1)]:
            layout = Layout(PLANS[name], (45, 64) if rows > 1 else (45, 128), dim, rows=rows, blocks=True)
            for rotation in (None, Rotation(32, SIGNS))[: 1 + (dim == -1)]:
                given = x if rows > 1 else torch.cat((x, -x), 1)
                assert_equal(given, Side(layout, rotation, KEY))
    learned = replace(PLANS["quest"], rule="learned", per_tensor=True)
    assert_equal(x, Side(Layout(learned, (45, 64)), None, None, torch.tensor(0.3)))


@pytest.mark.parametrize("size", [2, 16, 32, 128, 512])
@pytest.mark.parametrize("inner", [1, 21, 32])
def test_cpp_turns_as_the_reference(size: int, inner: int) -> None:
    rotation = Rotation(size, torch.tensor([1.0, -1.0]).repeat(size // 2))
    x = hard_input((7, 2 * size, inner))
    mask = (x > 0).to(torch.uint8)
    for given in (x, x.bfloat16()):
        assert alike(reference.rotate(given, rotation), cpu.rotate(given, rotation))
        for passes, scales in product(
            (mask, reference.join(mask.view(-1), 1), None), ((), (16 / 9, torch.tensor(0.3)), (0.3, 1e30, 1e30))
        ):
            for dtype in (torch.float32, torch.bfloat16):
                expected = reference.unrotate(given, rotation, passes, dtype, scales)
                assert alike(expected, cpu.unrotate(given, rotation, passes, dtype, scales)), (given.dtype, dtype)


def test_threads_and_empty_tensors_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, nvfp4 = PLANS["quartet backward"], PLANS["nvfp4"]
    x = hard_input((150, 32, 1))[:, :, 0]
    low, high = x.clone(), x.clone()
    low[0, 0], high[149, 31] = -1e38, 1e38
    for threads in (1, 3):
        monkeypatch.setattr(cpu, "_threads", lambda x, threads=threads: threads)
        assert_equal(x, Side(Layout(plan, (150, 32), blocks=True), Rotation(32), KEY, packed=True))
        assert_equal(x[:0], Side(Layout(plan, (0, 32), blocks=True), Rotation(32), KEY))
        for given in (low, high):  # whichever thread has the largest
            assert_equal(given, Side(Layout(nvfp4, (150, 32), blocks=True), Rotation(32)))


@pytest.mark.parametrize("name", ["quartet backward", "nvfp4", "ms-eden 128", "quest"])
def test_the_default_dtype_and_device_change_nothing(name: str) -> None:
    plan = PLANS[name]
    x = hard_input((6, max(plan.span or 0, 96), 1))[:, :, 0]
    for dtype, device in ((torch.float64, "cpu"), (torch.bfloat16, "cpu"), (torch.float32, "meta")):
        cpu._job.cache_clear()
        for side in sides(plan, x, -1, Rotation(32, SIGNS)):
            expected = reference.quantize(x, side)
            torch.set_default_dtype(dtype)
            try:
                with torch.device(device):
                    found = cpu.quantize(x, side)
            finally:
                torch.set_default_dtype(torch.float32)
            assert all(map(alike, expected, found)), (dtype, device)


@pytest.mark.parametrize("name", ["quest", "ms-eden 128", "nvfp4"])
def test_lines_that_are_too_long_for_a_tile_are_the_references(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu._job.cache_clear()
    monkeypatch.setattr(cpu, "LONGEST", 64)
    x = hard_input((64, 256, 1))[:, :, 0]
    for side in sides(PLANS[name], x, -1, Rotation(128)):
        assert_equal(x, side)
    cpu._job.cache_clear()


def compile_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """cpu.py forgets, for one test, what it has loaded."""
    for name, each in vars(cpu).copy().items():
        if hasattr(each, "cache_clear"):
            monkeypatch.setattr(cpu, name, cache(each.__wrapped__))


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="vector instructions of x86")
@pytest.mark.parametrize(("capability", "flag"), [("AVX2", "-mno-avx512f"), ("DEFAULT", "-mno-avx")])
def test_fewer_lanes_change_nothing(
    capability: str, flag: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What ATEN_CPU_CAPABILITY asks of torch, the C++ kernels keep too."""
    compile_afresh(monkeypatch)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    commands: list[list[str]] = []
    run = subprocess.run
    monkeypatch.setattr(cpu.subprocess, "run", lambda command, **rest: commands.append(command) or run(command, **rest))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("quartet backward", "four over six", "ms-eden", "quest"):
        plan = PLANS[name]
        for x, dim in matrices(plan)[2:5]:
            for side in sides(plan, x, dim, None):
                assert_equal(x, side)
    for size, inner in product((4, 32), (1, 24)):
        x, rotation = hard_input((3, 64, inner)), Rotation(size, None)
        for mask in (passes := (x > 0).to(torch.uint8), reference.join(passes.view(-1), 1)):
            arguments = x, rotation, mask, torch.float32, (0.3, 1e30)
            assert alike(reference.unrotate(*arguments), cpu.unrotate(*arguments)), (size, inner)
    for name in ("nvfp4", "float16 block", "quest"):
        plan = PLANS[name]
        x = hard_input((9, plan.span or 96, 1))
        values, blocks, _ = reference.operand(x, reference.tensor_scale(x, plan), KEY, plan, torch.bfloat16)
        packed = reference.pack(values, blocks, plan)
        back = [module.unpack(packed, values.shape, plan, torch.bfloat16) for module in (reference, cpu)]
        assert alike(*back), name
    assert all(flag in command for command in commands if "-shared" in command) and len(commands) > 4


def test_code_for_other_instructions_is_compiled_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A home folder that two machines share holds the code of both."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for flags, processor in (
        (cpu.flags(), "flags: avx2"), (cpu.flags(), "flags: avx2 avx512f"), ((*cpu.flags(), "-O1"), "flags: avx2"),
    ):  # fmt: skip
        compile_afresh(monkeypatch)
        monkeypatch.setattr(cpu, "flags", lambda flags=flags: flags)
        monkeypatch.setattr(cpu, "_processor", lambda processor=processor: processor)
        cpu.rotate(torch.ones(1, 2, 1), Rotation(2))
    assert len(list(tmp_path.rglob("*.so"))) == 3


@pytest.mark.parametrize("n", [1, 7, 32, 100, 256])
def test_random_signs_are_the_reference_s(n: int) -> None:
    for key in (KEY, torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32)):
        found = cpu.random_signs(n, key)
        assert torch.equal(found, reference.random_signs(n, key)) and found.dtype == torch.float32
    with pytest.raises(ValueError, match=r"a key is \(2,\) int32; got \(3,\) torch.int32"):
        cpu.random_signs(n, torch.zeros(3, dtype=torch.int32))


def test_what_does_not_fill_its_blocks_is_refused() -> None:
    x = torch.ones(3, 100)
    for operation in (
        lambda: cpu.rotate(x[:, :, None], Rotation(32)),
        lambda: cpu.quantize(x, Side(Layout(PLANS["quest"], (3, 100)), Rotation(32))),
        lambda: cpu.quantize(x, Side(Layout(PLANS["mxfp8"], (3, 100)))),
    ):
        with pytest.raises(ValueError, match=r"must fill blocks and rotations of 32; got \(3, 100(, 1)?\)"):
            operation()


def test_block_scales_that_nobody_asks_for_are_not_written() -> None:
    for name in ("quartet forward", "ms-eden 128", "nvfp4 tile", "fp8 block"):
        plan = PLANS[name]
        x = hard_input((8, plan.span or 32, 1))[:, :, 0]
        for module in (reference, cpu):
            layout = Layout(plan, (x.shape[0], x.shape[1]), blocks=True)
            values, blocks, *rest = module.quantize(x, Side(layout, None, KEY))
            found = module.quantize(x, Side(replace(layout, blocks=False), None, KEY))
            assert blocks is not None and found[1] is None
            assert alike(found[0], values) and all(map(alike, found[2:], rest))


def test_negative_views() -> None:
    x = hard_input((64, 96, 1))
    assert alike(cpu.rotate(torch._neg_view(x), Rotation(32)), cpu.rotate(-x, Rotation(32)))
    side = Side(Layout(PLANS["quest"], (64, 96)))
    found, wanted = (cpu.quantize(each[:, :, 0], side) for each in (torch._neg_view(x), -x))
    assert all(map(alike, found, wanted))


def test_a_compiler_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "flags", lambda: ("-std=c++17", "-not-a-flag"))
    cpu._library.cache_clear()
    with pytest.raises(RuntimeError, match=r"-not-a-flag.*cannot build cpu.cpp \(.*error"):
        cpu._library("#define ROTATE\n")


def test_every_e8m0_rule_and_every_mask_has_a_plan() -> None:
    rules = {rule for rule, kinds in SCALE_RULES.items() if "e8m0" in kinds}
    assert rules <= {plan.rule for plan in PLANS.values() if plan.scale_kind == "e8m0"}
    assert {plan.mask.kind for plan in PLANS.values() if plan.mask} == {"inside", "within", "error"}


def test_settings_name_the_backends_that_there_are() -> None:
    assert get_args(Backend) == dispatch.BACKENDS and get_args(GemmKind) == tuple(SETTINGS)


@pytest.fixture
def resolved() -> Iterator[None]:
    """Nothing remembered of what runs where, before or after."""
    for function in (dispatch.resolve, dispatch._lacks_kernel):
        function.cache_clear()
    yield
    for function in (dispatch.resolve, dispatch._lacks_kernel):
        function.cache_clear()


def test_auto_chooses_once_and_says_so(
    resolved: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_cpp_obstacle", lambda: "no C++ compiler was found; install g++ or set CXX")
    with caplog.at_level(logging.INFO, "qtrain"):
        assert dispatch.get("quantize", "auto", "cpu") is reference.quantize
        assert dispatch.get("quantize", "auto", "cpu") is reference.quantize
    assert [record.message for record in caplog.records] == [
        "quantisers on cpu run on backend reference: no C++ compiler was found; install g++ or set CXX"
    ]
    with pytest.raises(
        ValueError, match=r"'compiled' cannot run on cpu: no C\+\+ compiler .* ask for backend 'reference'"
    ):
        dispatch.get("quantize", "compiled", "cpu")
    with pytest.raises(ValueError, match=r"'triton' cannot run on cpu: .*move the tensor to cuda; or ask for"):
        dispatch.get("quantize", "triton", "cpu")
    with pytest.raises(ValueError, match="unknown backend 'cuda'; backends: auto, reference, compiled, triton"):
        dispatch.get("quantize", "cuda", "cpu")


def test_auto_on_cuda_is_triton(resolved: None, caplog: pytest.LogCaptureFixture) -> None:
    """And the reference, said once, for a plan or a rotation that Triton has no kernel for."""
    plan, wide = PLANS["mxfp8"], replace(PLANS["fp8 block"], block=16384)
    with caplog.at_level(logging.INFO, "qtrain"):
        assert dispatch.get("quantize", "auto", "cuda", plan, Rotation(256)) is gpu.quantize
        assert dispatch.get("join", "auto", "cuda") is gpu.join
        for _ in range(2):
            assert dispatch.get("quantize", "auto", "cuda", wide) is reference.quantize
        assert dispatch.get("rotate", "auto", "cuda", rotation=Rotation(512)) is reference.rotate
    assert [record.message for record in caplog.records] == [
        "quantisers on cuda run on backend triton",
        "backend auto takes the reference: backend 'triton' needs a block that is a power of two up to 256; got 16384",
        "backend auto takes the reference: backend 'triton' needs a rotation that is a power of two up to 256; got 512",
    ]
    assert dispatch.get("quantize", "triton", "cuda", wide) is gpu.quantize, "asked for by name, it refuses"


def test_auto_without_triton_is_the_reference(resolved: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtrain_kernels.gpu.HAS_TRITON", False)
    assert dispatch.get("quantize", "auto", "cuda") is reference.quantize
    with pytest.raises(ValueError, match="'triton' cannot run on cuda: triton is not installed; install it; or ask"):
        dispatch.get("quantize", "triton", "cuda")


def test_compiled_is_for_the_cpu_alone(resolved: None) -> None:
    with pytest.raises(
        ValueError, match=r"'compiled' cannot run on cuda: its C\+\+ is for the CPU; on cuda ask for 'auto'; or ask for"
    ):
        dispatch.get("quantize", "compiled", "cuda")
    assert dispatch.get("quantize", "auto", "mps") is reference.quantize


@pytest.mark.gpu
@pytest.mark.parametrize("name", PLANS)
def test_the_reference_on_cuda_equals_it_on_cpu(name: str) -> None:
    plan = PLANS[name]
    x = hard_input((65, plan.span or 96, 1))
    scale = reference.tensor_scale(x, plan)
    expected = reference.operand(x, scale, KEY, plan, torch.bfloat16)
    moved = scale.cuda() if isinstance(scale, Tensor) else scale
    found = reference.operand(x.cuda(), moved, KEY.cuda(), plan, torch.bfloat16)
    assert all(same(a, None if b is None else b.cpu()) for a, b in zip(expected, found, strict=True))
