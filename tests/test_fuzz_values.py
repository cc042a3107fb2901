"""Values, shapes and memory of all kinds through every number format, scale rule and rounding: the compiled backend
gives the bits of the reference, or both refuse by name. Slow: run with -m slow.

What fails is shrunk by hypothesis and printed as a command that does it again.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from test_compiled import alike, sides
from torch import Tensor

import qtrain
from qtrain.config.recipe import QuantSpec
from qtrain.config.settings import parse
from qtrain.errors import UserError
from qtrain.quant.quantizer import Quantizer
from qtrain_kernels import cpu, reference
from qtrain_kernels.formats import FORMATS, get_format
from qtrain_kernels.plans import SCALE_RULES, Rotation, check_scale

PARTS, EXAMPLES = 12, 200
VALUES = 1_000_000  # in all parts together, at least
OTHERS = (
    "fp8_e3m4", "fp6_e1m4", "e4m3/128/float32", "e4m3/128x128/float32", "e2m1/16x16/e4m3", "e2m1/32x32/e8m0",
    "e2m1/16/ue5m3", "int4_sym/tensor/float32", "e3m0/tensor/float32", "int8/tensor/float32", "int4_sym/64/float32",
    "e1m2/16/e4m3",
)  # fmt: skip


def _fits(name: str, rule: str) -> bool:
    try:
        check_scale(get_format(name), rule)
    except ValueError:
        return False
    return rule != "learned"  # a parameter of a layer, not a function of the values


def _specs() -> list[tuple[str, str | None, str]]:
    """(format, scale rule, rounding): each format by its default rule, each rule with two formats."""
    found: list[tuple[str, str | None, str]] = []
    for name in (*FORMATS, *OTHERS):
        found += [(name, None, "nearest"), (name, None, "stochastic")]
    for rule in SCALE_RULES:
        fitting = [name for name in (*FORMATS, *OTHERS) if _fits(name, rule)]
        found += [(name, rule, "nearest") for name in fitting[:2]]
    return [*found, ("nvfp4", "absmax_fitted", "eden")]


SPECS = _specs()
# Bits of float32: zeros, ones, a tie of E2M1, the largest codes, the edges of normal and subnormal numbers, of bfloat16
# and of E8M0's range, infinities, NaNs with payloads.
SPECIAL = (
    0x00000000, 0x80000000, 0x3F800000, 0xBF800000, 0x40200000, 0x40C00000, 0x43E00000, 0x00000001, 0x80000001,
    0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F7F0000, 0x00010000, 0x00400000, 0x7F800000, 0xFF800000,
    0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x7E800000, 0x3F7FFFFF,
)  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Case:
    """palette: bits of float32 that all values are taken from, in an order that seed gives; where there is none, the
    values are any bits (octaves None), or normal ones over so many octaves. memory: how the tensor lies in it."""

    spec: tuple[str, str | None, str]
    shape: tuple[int, ...]
    palette: tuple[int, ...] = ()
    octaves: int | None = None
    seed: int = 0
    dtype: str = "float32"
    memory: str = "whole"
    rotation: str | None = None

    @property
    def command(self) -> str:
        return f'PYTHONPATH=.:kernels:tests python -c "from test_fuzz_values import *; check({self!r})"'


MEMORIES = ("whole", "transposed", "every second", "an offset", "expanded", "backwards")


def tensor_of(case: Case) -> Tensor:
    draw, count = np.random.default_rng(case.seed), math.prod(case.shape)
    if case.palette:
        values = draw.choice(np.array(case.palette, dtype=np.uint32), count).view(np.float32)
    elif case.octaves is None:
        values = draw.integers(0, 2**32, count, dtype=np.uint32).view(np.float32)
    else:
        values = draw.normal(size=count) * np.exp2(draw.integers(-case.octaves, case.octaves + 1, count))
        values = np.clip(values, -3e38, 3e38).astype(np.float32)
    return in_memory(torch.from_numpy(values.copy()).to(DTYPES[case.dtype]).reshape(case.shape), case.memory)


def in_memory(x: Tensor, how: str) -> Tensor:
    """The same values, but for `expanded`, whose rows are all the first."""
    if how == "transposed" and x.ndim > 1:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == "every second":
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    if how == "an offset":
        return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)
    if how == "expanded" and x.ndim > 1 and x.shape[0]:
        return x[:1].expand_as(x)
    if how == "backwards" and x.ndim > 1:
        return x.flip(0)
    return x


@st.composite
def cases(draw: st.DrawFn) -> Case:
    spec = draw(st.sampled_from(SPECS))
    multiple = get_format(spec[0]).block_size or 1
    columns = st.one_of(
        st.integers(1, 4).map(lambda n: n * multiple * (32 if multiple < 8 else 1)), st.integers(0, 300)
    )
    lead = st.one_of(st.tuples(st.integers(0, 70)), st.just(()), st.tuples(st.integers(0, 4), st.integers(0, 9)))
    palette = st.one_of(st.sampled_from(SPECIAL), st.integers(0, 2**32 - 1))
    kind = draw(st.sampled_from(["palette", "bits", "octaves"]))
    return Case(
        spec=spec,
        shape=(*draw(lead), draw(columns)),
        palette=tuple(draw(st.lists(palette, min_size=1, max_size=8))) if kind == "palette" else (),
        octaves=draw(st.integers(0, 120)) if kind == "octaves" else None,
        seed=draw(st.integers(0, 2**31)),
        dtype=draw(st.sampled_from(list(DTYPES))),
        memory=draw(st.sampled_from(MEMORIES)),
        rotation=draw(st.sampled_from([None, None, "hadamard16", "hadamard32", "hadamard128"])),
    )


def outcome(case: Case, x: Tensor, backend: str) -> Tensor | str:
    name, scale, rounding = case.spec
    try:
        return qtrain.fake_quantize(
            x, name, scale=scale, rounding=rounding, rotation=case.rotation, seed=case.seed, backend=backend
        )
    except UserError as error:
        return str(error)


def check(case: Case) -> str:
    """What was found: `equal` or `refused`. AssertionError where the backends differ."""
    x = tensor_of(case)
    expected, found = (outcome(case, x, backend) for backend in ("reference", "compiled"))
    if isinstance(expected, str) or isinstance(found, str):
        assert isinstance(expected, str) and isinstance(found, str), (expected, found)
        assert len(expected) > 20, f"a refusal is a sentence; got {expected!r}"
        return "refused"
    assert expected.shape == x.shape and expected.dtype == x.dtype
    assert bits_alike(expected, found), "the values differ"
    check_stored(case, x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))
    return "equal"


def check_stored(case: Case, x: Tensor) -> None:
    """Codes, scales, masks and packed bytes, in every storage that the C++ writes."""
    if x.dtype not in (torch.float32, torch.bfloat16) or not x.numel():
        return
    name, scale, rounding = case.spec
    spec = parse(QuantSpec, {"format": name, "scale": scale, "rounding": rounding, "rotation": case.rotation})
    plan, size = Quantizer.build(spec, "reference").plan, int((case.rotation or "hadamard0").removeprefix("hadamard"))
    assert plan is not None
    if get_format(name).rows > 1:  # tiles, which Layout holds in another order
        return
    for side in sides(plan, x, -1, Rotation(size) if size else None):
        for ours, theirs in zip(cpu.quantize(x, side), reference.quantize(x, side), strict=True):
            assert alike(ours, theirs), side.layout


def bits_alike(a: Tensor, b: Tensor) -> bool:
    """Equal bits, and NaN in the same places."""
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    a, b = (torch.where(x.isnan(), torch.nan, x) for x in (a.contiguous(), b.contiguous()))
    return torch.equal(a.view(bits), b.view(bits))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_backend_gives_the_bits_of_the_reference_or_refuses(
    part: int, capsys: pytest.CaptureFixture[str]
) -> None:
    counted: Counter[str] = Counter()

    @hypothesis.seed(part)
    @hypothesis.settings(
        max_examples=EXAMPLES, database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(cases())
    def examples(case: Case) -> None:
        hypothesis.note(case.command)
        counted[check(case)] += 1
        counted["values"] += math.prod(case.shape)

    examples()
    with capsys.disabled():
        print(f"part {part}: {dict(counted)}")
    assert counted["values"] >= VALUES / PARTS
    assert counted["equal"] >= EXAMPLES / 4
