"""scripts/verify_numerics.py: what it calls met is met, and a quantiser whose scale is 1% off turns its rows red."""

import csv
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from qtrain.quant import quantizer
from qtrain.quant.quantizer import QuantizedTensor
from qtrain_kernels import qtensor, reference
from qtrain_kernels.plans import Mask
from qtrain_kernels.qtensor import QTensor, Side

SCRIPT = Path(__file__).parents[1] / "scripts" / "verify_numerics.py"
FEW = ["--samples", "8e6"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Afresh, with nothing measured yet."""
    spec = importlib.util.spec_from_file_location("verify_numerics", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "verify_numerics", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def small(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Gradients of 64 tokens and features, 64 draws."""
    for name, value in {"SIZE": 64, "DRAWS": 64, "TRIALS": 4}.items():
        monkeypatch.setattr(script, name, value)
    return script


def verdicts(shown: str) -> dict[str, str]:
    lines = [line.strip("| ").split(" | ") for line in shown.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[-1] for cells in lines[1:]}


ROWS = {
    "QuEST int4: squared error": "ok",
    "QuEST int1: misalignment": "ok",
    "RTN absmax, MXFP4: misalignment": "known: 9.44e-3",
    "NVFP4 SR 1x16: squared error": "ok",
    "NVFP4 MS-EDEN per 16, N(0, 1): squared error": "known: 9.33e-3",
    "NVFP4 RTN: effective bits": "ok",
}


@pytest.mark.parametrize(("only", "verdict"), ROWS.items())
def test_rows_hold(script: ModuleType, capsys: pytest.CaptureFixture[str], only: str, verdict: str) -> None:
    assert script.main([*FEW, "--only", only]) == 0
    assert list(verdicts(capsys.readouterr().out).values()) == [verdict]


@pytest.mark.parametrize("only", ROWS)
@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_a_scale_one_percent_off_fails(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    only: str,
    factor: float,
) -> None:
    dequantize = QuantizedTensor.dequantize
    monkeypatch.setattr(QuantizedTensor, "dequantize", lambda tensor: dequantize(tensor) * factor)
    fake_quantize = reference.fake_quantize
    monkeypatch.setattr(reference, "fake_quantize", lambda *arguments: fake_quantize(*arguments) * factor)
    assert script.main([*FEW, "--only", only]) == 1
    shown = capsys.readouterr().out
    assert list(verdicts(shown).values()) == ["FAILS"] and "1 rows, 1 fail: " in shown


@pytest.mark.parametrize(("factor", "status"), [(1.0, 0), (1.01, 1)])
def test_a_mask_one_percent_off_fails(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, factor: float, status: int
) -> None:
    mask_of = quantizer.gradient_mask

    def scaled(*arguments: object) -> Mask:
        mask = mask_of(*arguments)  # pyright: ignore[reportArgumentType]
        assert mask is not None
        return Mask(mask.kind, mask.limit * factor)

    monkeypatch.setattr(quantizer, "gradient_mask", scaled)
    assert script.main([*FEW, "--only", "QuEST int2: share masked"]) == status


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, "ok"), (1.01, "FAILS")])
def test_a_gradient_one_percent_off_stops_concentrating(
    small: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    factor: float,
    verdict: str,
) -> None:
    quantize = qtensor.quantize_side

    def scaled(x: Tensor, side: Side, backend: str) -> tuple[QTensor, QTensor | None]:
        exact, packed = quantize(x, side, backend)
        return replace(exact, codes=exact.codes * factor), packed

    monkeypatch.setattr(qtensor, "quantize_side", scaled)
    claim = "concentration of tetrajet_v2_baseline, input gradient: slope"
    small.main(["--only", claim])
    assert verdicts(capsys.readouterr().out) == {claim: verdict}


def test_a_biased_gradient_flattens_by_its_bias(small: ModuleType) -> None:
    """Of g + bias + noise, drawn independently: the slope of the mean squared errors, and the squared bias itself."""
    noise = torch.randn(256, 4096, generator=torch.Generator().manual_seed(0)) / 64
    slope, bias, variance = small._concentration(noise)
    assert (slope, variance) == (pytest.approx(-1, abs=0.01), pytest.approx(1, rel=0.01))
    assert abs(bias) < 3 * (2 / 4096) ** 0.5 / 256
    slope, bias, variance = small._concentration(noise + 0.1 / 64)
    expected = [1 / size + 0.01 for size in (1, 4, 16, 64, 256)]
    change = torch.tensor(expected).log2() @ torch.tensor([-4.0, -2, 0, 2, 4]) / 40
    assert (slope, variance) == (pytest.approx(change.item(), abs=0.02), pytest.approx(1.01, rel=0.01))
    assert bias == pytest.approx(0.01, rel=0.15)


@pytest.mark.parametrize(("figure", "value", "met"), [
    ("2.77e-2", 0.027749, True), ("2.77e-2", 0.027756, True), ("2.77e-2", 0.027761, False),
    ("2.77e-2", 0.027639, False), ("0", 0.0, True), ("0", 2.9e-6, True), ("0", -3.1e-6, False),
    ("12.4e-3", 0.01245, True), ("12.4e-3", 0.01246, False), ("-1.00", -1.0049, True), ("-1.00", -0.9949, False),
    ("> 1", 1.0000031, True), ("> 1", 1.0000029, False), ("> -0.95", -0.9, True), ("> -0.95", -1.0, False),
])  # fmt: skip
def test_a_figure_is_met_within_half_a_digit_and_three_standard_errors(
    script: ModuleType, figure: str, value: float, met: bool
) -> None:
    error = 1e-6 if figure != "2.77e-2" else 3e-6
    assert script.meets(figure, script.Measured(value, error)) == met


@pytest.mark.parametrize(("published", "holds", "verdict"), [
    ("1.0", "", "ok"), ("2.0", "", "FAILS"), ("", "", "measured"),
    ("2.0", "1.0", "known: 1.0"), ("1.0", "2.0", "FAILS"),
])  # fmt: skip
def test_verdicts(script: ModuleType, published: str, holds: str, verdict: str) -> None:
    row = script.Row("claim", "source", script.Figure(published, holds, "why"), lambda samples: None)
    result = script.judge(row, script.Measured(1.01, 1e-3))
    assert (result.verdict, result.fails) == (verdict, verdict == "FAILS")


def test_the_standard_error_is_that_of_the_mean(script: ModuleType) -> None:
    assert script.estimate([1.0, 2.0, 3.0, 6.0]) == (3.0, pytest.approx((14 / 3) ** 0.5 / 2))


def test_every_difference_has_a_reason_and_every_claim_is_made_once(script: ModuleType) -> None:
    rows = script.rows()
    assert len({row.claim for row in rows}) == len(rows)
    for row in rows:
        assert bool(row.figure.holds) == bool(row.figure.reason)
        if row.figure.holds:
            assert not script.meets(row.figure.published, script.Measured(_number(row.figure.holds), 0.0)), row.claim


def _number(figure: str) -> float:
    return float(figure.removeprefix(">"))


def test_the_table_goes_to_a_file_as_printed(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.csv"
    assert script.main([*FEW, "--only", "scale rule ceil", "--csv", str(path)]) == 0
    (row,) = csv.DictReader(path.read_text().splitlines())
    shown = capsys.readouterr().out
    assert f"{float(row['measured']):.5g} ± {float(row['standard_error']):.1g}" in shown
    assert 1.97e-2 < float(row["measured"]) < 2.01e-2 and row["verdict"] == "ok"


def test_a_name_that_no_claim_has_is_an_error(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        script.main(["--only", "int9"])
    assert "no row's claim or source contains 'int9'" in capsys.readouterr().err


def test_only_looks_at_claims_and_sources_in_any_case(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The examples of the docstring and of the help text among them."""
    rows = [replace(row, measure=lambda samples: script.Measured(0.0, 1.0)) for row in script.rows()]
    monkeypatch.setattr(script, "rows", lambda: rows)

    def found(only: str) -> set[str]:
        script.main(["--only", only])
        return set(verdicts(capsys.readouterr().out))

    assert found("quartet_ii") == found("QUARTET_II") == {row.claim for row in rows if "quartet_ii" in row.claim}
    assert found("quartet_ii") and found("2505.14669") == {row.claim for row in rows if "2505.14669" in row.source}


def test_the_folder_of_the_table_must_exist(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        script.main(["--csv", str(tmp_path / "tables" / "results.csv")])
    shown = capsys.readouterr()
    assert "there is no folder" in shown.err and not shown.out, "before any row is measured"
