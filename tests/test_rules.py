"""Every scale rule, rounding, mask and sparsity of every backend, against float64; and what a backend does not know.

Triton's kernels run in its interpreter, which must be chosen before triton is imported: `test_in_the_interpreter` runs
this file once more in a process of its own.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, product
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import passed_in_the_interpreter, quantized
from oracles import rules as oracle
from oracles.recipes import USES, Draws
from torch import Tensor

from qtrain_kernels import cpu, gpu, reference
from qtrain_kernels.formats import get_format
from qtrain_kernels.plans import CARRY_ABOVE_SQRT2, ROUNDINGS, SCALE_RULES, Mask, Plan, Rounding, Row, ScaleRule

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = {"triton": gpu} if INTERPRETED else {"reference": reference, "compiled": cpu}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, which computes by numpy

KEY = (1374496523, -987654321)
FORMATS = {  # where the scale lies -> a format, and the rules that only another one takes
    "e8m0": ("mxfp4", {}),
    "minifloat": ("nvfp4", {}),
    "float32": ("e2m1/32/float32", {}),
    "float16": ("e2m1/32/float16", {"minmax": "int4_asym/32/float16"}),
    "bfloat16": ("e2m1/32/bfloat16", {"minmax": "int4_asym/32/bfloat16"}),
    "row": ("int4_sym", {"gaussian": "int4", "learned": "int4"}),
    "tensor": ("int4_sym/tensor/float32", {"gaussian": "int4/tensor/float32", "learned": "int4/tensor/float32"}),
}
OF_LINES = ("absmean", "sawb")  # one scale per row or tensor
MASKS = (None, ("inside", 0.6), ("within", 0.4), ("error", 0.04))  # limits in largest codes
SPARSITIES = (None, "2:4", "4:8")
LEARNED = 0.4


def rules() -> list[tuple[str, str]]:
    """(where the scale lies, rule), all that there are."""
    return [
        (kind, rule)
        for kind in FORMATS
        for rule, kinds in SCALE_RULES.items()
        if ("float32" if kind in ("row", "tensor") else kind) in kinds
        and not (kind == "float32" and rule in (*OF_LINES, "learned"))  # backends are not asked for learned blocks
        and not (INTERPRETED and rule == "minmax")  # which Triton's kernels do not know
    ]


def roundings(kind: str, rule: str) -> tuple[str, ...]:
    if rule in ("learned", "minmax"):
        return ("nearest",)
    return ("nearest", "stochastic", "eden") if kind == "minifloat" else ("nearest", "stochastic")


def setting(
    kind: str, rule: str, rounding: str, mask: tuple[str, float] | None, sparsity: str | None
) -> oracle.Setting:
    name = FORMATS[kind][1].get(rule, FORMATS[kind][0])
    grid = oracle.CENTRED if name.startswith("int4/") or name == "int4" else oracle.SYMMETRIC
    if kind not in ("row", "tensor"):
        grid = oracle.LEVELS if rule == "minmax" else oracle.E2M1
    limit = mask and (mask[0], mask[1] * max(grid))
    block = {"minifloat": 16, "row": None, "tensor": None}.get(kind, 32)
    fit = oracle.CENTRED_FIT if grid == oracle.CENTRED else 0.4870795
    return oracle.Setting(kind, rule, rounding, limit, sparsity, block, grid, fit, LEARNED)


def plan_of(asked: oracle.Setting) -> Plan:
    fmt = get_format(FORMATS[asked.kind][1].get(asked.rule, FORMATS[asked.kind][0]))
    return Plan(
        fmt.element,
        fmt.scale_kind,
        fmt.block_size,
        asked.rule,
        asked.rounding,  # pyright: ignore[reportArgumentType]
        asked.mask and Mask(*asked.mask),  # pyright: ignore[reportArgumentType]
        scale_element=fmt.scale_element,
        per_tensor=fmt.block == "tensor",
        correction=fmt.block_size if asked.rounding == "eden" else None,
        sparsity=asked.sparsity,  # pyright: ignore[reportArgumentType]
    )


EVERY = [
    setting(kind, rule, rounding, mask, sparsity)
    for kind, rule in rules()
    for rounding, mask, sparsity in product(roundings(kind, rule), MASKS, SPARSITIES)
    if rule != "minmax" or mask is sparsity is None  # zero points have neither
]


def every_pair() -> Iterator[oracle.Setting]:
    """Every rule with every rounding, masks and sparsities in turn: each plan is compiled."""
    masks, sparsities = cycle(MASKS), cycle(SPARSITIES)
    for kind, rule in rules():
        for rounding in roundings(kind, rule):
            bare = rule == "minmax"
            yield setting(kind, rule, rounding, *((None, None) if bare else (next(masks), next(sparsities))))


SOME = list(every_pair())


def matrix() -> Tensor:
    """(8, 64): Gaussians with a mean, over some octaves, and an outlier; no near-tie decides in float32."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(8, 64, generator=generator) + 0.3
    x[3, 5] = 9.0
    return x * torch.exp2(torch.randn(8, 1, generator=generator))


def found(module: ModuleType, x: Tensor, plan: Plan) -> oracle.Quantised:
    """codes, scale and mask (8, 64) of a backend."""
    learned = torch.full(() if plan.whole else (len(x), 1), LEARNED) if plan.rule == "learned" else None
    q = quantized(module, x, plan, key=torch.tensor(KEY, dtype=torch.int32), learned=learned)
    scale = torch.as_tensor(q.tensor_scale).double() * (1.0 if q.block_scale is None else q.block_scale.double())
    passes = None if q.mask is None else q.mask.numpy()
    return oracle.Quantised(q.codes.double().numpy(), torch.as_tensor(scale).expand(x.shape).numpy(), passes)


def differences(module: ModuleType, asked: oracle.Setting) -> list[str]:
    """What of codes, scales and mask is not that of a float64 computation."""
    x = matrix()
    draws = Draws([KEY] * len(USES))
    expected = oracle.quantise(x.double().numpy(), asked, lambda shape: draws.uniform(USES[0], shape))
    got = found(module, x, plan_of(asked))
    if expected.mask is not None:
        assert 0 < expected.mask.mean() < 1, "a mask that passes all, or nothing, tests nothing"
    same = {
        "scales": np.allclose(got.scale, expected.scale, rtol=1e-6, atol=0, equal_nan=True),
        "codes": np.array_equal(got.codes, expected.codes, equal_nan=True),
        "mask": (got.mask is None and expected.mask is None)
        or (got.mask is not None and expected.mask is not None and np.array_equal(got.mask, expected.mask)),
    }
    return [what for what, is_same in same.items() if not is_same]


def name(asked: oracle.Setting) -> str:
    return "-".join([*asked[:3], asked.mask[0] if asked.mask else "all", asked.sparsity or "dense"])


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes seconds for each; it runs the selection below")
@pytest.mark.parametrize(("kind", "rule"), rules())
def test_the_reference_computes_every_rule_rounding_mask_and_sparsity(kind: str, rule: str) -> None:
    settings = [asked for asked in EVERY if (asked.kind, asked.rule) == (kind, rule)]
    found = {name(asked): differences(reference, asked) for asked in settings}
    assert settings and {setting: wrong for setting, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize("asked", SOME, ids=name)
def test_a_backend_computes_every_rule_with_every_rounding(backend: str, asked: oracle.Setting) -> None:
    assert differences(BACKENDS[backend], asked) == []


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the compiled kernels are of the process without the interpreter")
@pytest.mark.parametrize("asked", EVERY, ids=name)
def test_compiled_code_computes_every_rule_rounding_mask_and_sparsity(asked: oracle.Setting) -> None:
    assert differences(cpu, asked) == []


def test_nothing_is_left_out() -> None:
    assert {rule for _, rule in rules()} == set(SCALE_RULES)
    assert {(asked.kind, asked.rule, asked.rounding) for asked in SOME} == {
        (asked.kind, asked.rule, asked.rounding) for asked in EVERY
    }
    assert {asked.mask and asked.mask[0] for asked in SOME} == {None, *reference.KNOWS.masks}
    assert {asked.sparsity for asked in SOME} == {None, *reference.KNOWS.sparsities}
    for knows in (reference.KNOWS, cpu.KNOWS, gpu.KNOWS):
        for asked in SOME:
            if asked.rule == "minmax" and knows is gpu.KNOWS:
                with pytest.raises(ValueError, match="backend 'triton' knows no statistic 'range'"):
                    knows.check(plan_of(asked))
            else:
                knows.check(plan_of(asked))


E2M1 = get_format("mxfp4").element
NVFP4 = plan_of(setting("minifloat", "absmax", "nearest", None, None))
UNKNOWN = {
    r"scale rule \(e8m0\) 'new'": replace(NVFP4, scale_kind="e8m0", rule="new"),
    r"scale rule \(minifloat\) 'new'": replace(NVFP4, rule="new"),
    r"scale rule \(float32\) 'new'": replace(NVFP4, scale_kind="float32", rule="new"),
    r"scale rule \(float32\) 'learned'": replace(NVFP4, scale_kind="float32", rule="learned"),
    "rounding 'upwards'": replace(NVFP4, rounding="upwards"),  # pyright: ignore[reportArgumentType]
    "mask 'outside'": replace(NVFP4, mask=Mask("outside", 1.0)),  # pyright: ignore[reportArgumentType]
    "sparsity '1:4'": replace(NVFP4, sparsity="1:4"),  # pyright: ignore[reportArgumentType]
}


@pytest.mark.parametrize("module", [reference, cpu, gpu], ids=["reference", "compiled", "triton"])
@pytest.mark.parametrize("what", UNKNOWN)
def test_a_backend_refuses_what_it_does_not_know_by_name(module: ModuleType, what: str) -> None:
    """It would be absmax, round to nearest, mask by the error or prune 2:4 without a word."""
    x, key = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)), torch.tensor(KEY, dtype=torch.int32)
    with pytest.raises(ValueError, match=what):
        quantized(module, x, UNKNOWN[what], key=key)


@pytest.mark.parametrize("module", [reference, cpu, gpu], ids=["reference", "compiled", "triton"])
def test_an_unknown_scale_of_whole_lines_is_refused_by_name(module: ModuleType) -> None:
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    plan = Plan(get_format("int4_sym").element, "float32", None, "new")
    with pytest.raises(ValueError, match=r"scale rule \(line\) 'new'"):
        quantized(module, x, plan)
    with pytest.raises(ValueError, match=r"'learned'( has no scale of x|: a learned scale goes with)"):
        quantized(module, x, replace(plan, rule="learned"))


ADDED: dict[str, tuple[str, Row]] = {  # a format, and a rule that no table has
    "e8m0": ("mxfp4", lambda e, _: ScaleRule(
        "absmean", 3.0, divisor=e.max, increment=CARRY_ABOVE_SQRT2, candidates=(0.5, 4.0), outer=ScaleRule("std", 2.0),
    )),
    "minifloat": ("nvfp4", lambda e, scale: ScaleRule(
        "rms", 2.5, divisor=e.max, candidates=(1.25, 0.75), outer=ScaleRule(divisor=e.max * scale.max),
    )),
    "float32": ("int4/32/float32", lambda e, _: ScaleRule(
        "rms_absmean", 4.0, less=2.0, divisor=e.max, candidates=(0.9,),
    )),
    "float16": ("int4_sym/32/float16", lambda e, _: ScaleRule("rms", 2.5, divisor=e.max, candidates=(0.9, 1.1))),
    "bfloat16": ("int4/32/bfloat16", lambda e, _: ScaleRule("absmean", 3.0, divisor=e.max, candidates=(1.2,))),
    "row": ("int4_sym", lambda e, _: ScaleRule("std", 2.0, 1e-3, divisor=e.max)),
    "tensor": ("e3m0/tensor/float32", lambda e, _: ScaleRule(gain=0.75, divisor=e.max)),
}  # fmt: skip


def added(kind: str, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A plan under the rule that was added to the table."""
    fmt = get_format(ADDED[kind][0])
    monkeypatch.setitem(SCALE_RULES, "added", {fmt.scale_kind: ADDED[kind][1]})
    return Plan(
        fmt.element, fmt.scale_kind, fmt.block_size, "added", "stochastic", Mask("within", 0.5 * fmt.element.max),
        scale_element=fmt.scale_element, per_tensor=fmt.block == "tensor",
    )  # fmt: skip


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize("kind", ADDED)
def test_a_row_added_to_the_table_runs_in_a_backend(kind: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, x = added(kind, monkeypatch), matrix()
    expected, got = found(reference, x, plan), found(BACKENDS[backend], x, plan)
    for wanted, given in zip(expected, got, strict=True):
        np.testing.assert_array_equal(given, wanted)
    usual = found(reference, x, replace(plan, rule=get_format(ADDED[kind][0]).default_scale))
    assert (usual.scale != expected.scale).any()


@pytest.mark.skipif(INTERPRETED, reason="the reference has been looked at")
def test_a_row_added_to_the_table_means_what_its_numbers_say(monkeypatch: pytest.MonkeyPatch) -> None:
    x = matrix()
    lines = found(reference, x, added("row", monkeypatch)).scale[:, 0]
    np.testing.assert_allclose(lines, (2 * x.double().std(1, correction=0).numpy() + 1e-3) / 7, rtol=1e-6)


EDGES = {  # the largest magnitude of a block -> its scale, after IEEE 754; of codes up to 7
    "float16": {
        7 * (1 + 2.0**-11): 1.0,  # a tie, to the even mantissa
        7 * (1 + 3 * 2.0**-11): 1 + 2.0**-9,
        7 * 65519.0: 65504.0,
        7 * 65520.0: np.nan,  # would be infinite
        7 * 2.0**-24: 2.0**-24,  # the smallest subnormal
        7 * 2.0**-25: 0.0,
        0.0: 0.0,
    },
    "bfloat16": {7 * (1 + 2.0**-8): 1.0, 7 * (1 + 3 * 2.0**-8): 1 + 2.0**-6, 7 * 2.0**-140: 0.0, np.inf: np.nan},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "edges"), EDGES.items(), ids=EDGES)
def test_codes_are_relative_to_a_scale_of_16_bits(kind: str, edges: dict[float, float], backend: str) -> None:
    plan = Plan(get_format("int4_sym").element, kind, 32, "absmax")  # pyright: ignore[reportArgumentType]
    x = torch.zeros(len(edges), 32)
    x[:, 0], x[:, 1] = torch.tensor([*edges]), torch.tensor([*edges]) / 7 * 3.4999
    got = found(BACKENDS[backend], x, plan)
    np.testing.assert_array_equal(got.scale[:, 0], [*edges.values()])
    scale = np.array([*edges.values()])[:, None]
    codes = np.clip(np.rint(x.double().numpy() / np.where(scale == 0, 1.0, scale)), -7, 7)
    np.testing.assert_array_equal(got.codes, np.where(np.isnan(scale), np.nan, codes))


@pytest.mark.parametrize("module", [reference, cpu, gpu], ids=["reference", "compiled", "triton"])
def test_a_row_of_pieces_that_a_backend_lacks_is_refused_by_name(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    middle = ScaleRule("median")  # pyright: ignore[reportArgumentType]
    monkeypatch.setitem(SCALE_RULES, "middle", {"e8m0": lambda *_: middle})
    monkeypatch.setitem(SCALE_RULES, "outer", {"e8m0": lambda *_: ScaleRule(outer=middle)})
    monkeypatch.setitem(ROUNDINGS, "upwards", Rounding("up"))
    x = matrix()
    for rule, rounding, what in (
        ("middle", "nearest", "statistic 'median'"), ("outer", "nearest", "statistic 'median'"),
        ("floor", "upwards", "rounding 'up'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"knows no {what}"):
            quantized(module, x, Plan(E2M1, "e8m0", 32, rule, rounding))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rounding_that_draws_nothing_asks_for_no_key(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROUNDINGS, "also nearest", Rounding("nearest"))
    x, plan = matrix(), Plan(E2M1, "e8m0", 32, "floor")
    found = quantized(BACKENDS[backend], x, replace(plan, rounding="also nearest"))  # pyright: ignore[reportArgumentType]
    assert torch.equal(found.codes, quantized(reference, x, plan).codes)
    assert [ROUNDINGS[name].draws for name in ("nearest", "stochastic", "eden")] == [False, True, True]


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_in_the_interpreter() -> None:
    selected = "every_rule_with or runs_in_a_backend or asks_for_no_key or of_16_bits"
    passed, shown = passed_in_the_interpreter(__file__, "-k", selected)
    known = sum(asked.rule != "minmax" for asked in SOME)
    assert passed == known + len(ADDED) + len(EDGES) + 1, shown
