"""Benchmarks count what they say, withhold what is wrong, and their JSON becomes the tables of kernels/README.md."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import qtrain

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "kernels" / "bench"
RESULTS = BENCH / "results"
RESULT = {
    "name": "things",
    "rows": [{"case": "a", "ms": 1234.5, "none": None}, {"case": "b", "ms": 0.012345, "equal": 1.0, "none": None}],
    "machine": {"device": "Abacus", "versions": {"torch": "2.13.0"}, "commit": "0123456789abcdef"},
}
TABLE = """**things**, Abacus, torch 2.13.0, commit 01234567

| case | ms | equal |
|---|---|---|
| a | 1234 |  |
| b | 0.0123 | 1 |
"""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The modules of kernels/bench, which import each other by name."""
    monkeypatch.syspath_prepend(BENCH)
    import harness
    import peaks
    import table

    return SimpleNamespace(harness=harness, peaks=peaks, table=table)


def run(*arguments: object) -> str:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_a_result_becomes_a_table(bench: SimpleNamespace, tmp_path: Path) -> None:
    assert bench.table.markdown(RESULT) == TABLE
    for name in ("b", "a"):
        (tmp_path / f"{name}.json").write_text(json.dumps(RESULT | {"name": name}))
    document = tmp_path / "page.md"
    document.write_text("before\n<!-- results: begin -->\nold\n<!-- results: end -->\nafter\n")
    for _ in range(2):
        run(BENCH / "table.py", tmp_path / "b.json", tmp_path / "a.json", "--into", document)
        tables = "\n".join(TABLE.replace("things", name) for name in ("a", "b"))
        assert document.read_text() == (f"before\n<!-- results: begin -->\n\n{tables}\n<!-- results: end -->\nafter\n")
    with pytest.raises(ValueError, match="there are no lines '<!-- results: begin -->'"):
        bench.table.put_into("nothing", TABLE)


def test_the_readme_shows_the_committed_results(bench: SimpleNamespace) -> None:
    text = (ROOT / "kernels" / "README.md").read_text()
    results = list(RESULTS.glob("*.json"))
    assert bench.table.put_into(text, bench.table.tables(results)) == text, (
        "python kernels/bench/table.py kernels/bench/results/*.json --into kernels/README.md"
    )
    for path in results:
        rows = json.loads(path.read_text())["rows"]
        assert all(row.get("equal", 1) == 1 for row in rows), path


def test_a_wrong_kernel_has_no_speed(bench: SimpleNamespace) -> None:
    row = {"case": "a", "ms": 1.0, "x reference": 9.0, "SQNR dB": 20.0, "equal": 1.0}
    assert bench.harness.checked(row, "case", "SQNR dB") == row
    row |= {"equal": 0.999}
    assert bench.harness.checked(row, "case", "SQNR dB") == {"case": "a: WRONG", "SQNR dB": 20.0, "equal": 0.999}
    nan = torch.tensor([1.0, float("nan"), 3.0, 4.0])
    assert bench.harness.share_equal(nan, torch.tensor([1.0, float("nan"), float("nan"), 4.0])) == 0.75


def test_functions_run_in_turns(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA as often in a row as fills 20 ms, of which one call's share is the time."""
    clock, called = [0.0], []

    def taking(name: str, seconds: float) -> object:
        def function() -> None:
            called.append(name)
            clock[0] += seconds

        return function

    monkeypatch.setattr(bench.harness.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for device, in_a_row in (("cpu", 1), ("cuda", 7)):
        called.clear()
        times = bench.harness.in_turns({"short": taking("short", 0.003), "long": taking("long", 3.0)}, 2, device)
        assert times == {"short": pytest.approx([0.003] * 2), "long": pytest.approx([3.0] * 2)}
        assert called == ["short", "long"] * 2 + (["short"] * in_a_row + ["long"]) * 2
        assert bench.harness.ratio(times, "long", "short") == pytest.approx(1000)


def test_operations_are_counted_in_the_precision_that_multiplies_them(bench: SimpleNamespace) -> None:
    each = 2.0 * 10 * 256 * 128
    for recipe, gemm, wanted in (
        (None, "auto", {"bfloat16": 3 * each}),
        ("quest", "auto", {"int8": each, "bfloat16": 2 * each}),
        ("quartet", "auto", {"bfloat16": 3 * each}),
        ("quartet", "fp8", {"fp8": 3 * each}),
    ):
        model = nn.Sequential(nn.Linear(256, 128, bias=False))
        if recipe is not None:
            qtrain.convert(model, recipe, skip=(), gemm=gemm, backend="reference")  # pyright: ignore
        assert bench.harness.gemm_flops(model[0], 10, "cpu") == wanted, recipe
    assert bench.harness.gemm_flops(nn.SiLU(), 10, "cpu") == {}


def test_use_of_a_peak_is_of_the_precision_in_use(bench: SimpleNamespace) -> None:
    """Half of the operations at twice the speed: at the peak, three quarters of bfloat16's time."""
    flops = {"bfloat16": 989.5e12, "fp8": 989.5e12}
    found = bench.peaks.utilisation(flops, 3.0, "NVIDIA H100 80GB HBM3")
    assert found == {"of bfloat16 peak": pytest.approx(2 / 3), "of peak in use": pytest.approx(1.5 / 3)}
    assert bench.peaks.shares(flops) == {"FLOPs in bfloat16": 0.5, "FLOPs in fp8": 0.5}
    nothing = {"of bfloat16 peak": None, "of peak in use": None}
    for name in ("NVIDIA A100-SXM4-80GB", "a CPU", "NVIDIA GB200", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"):
        assert bench.peaks.utilisation(flops, 3.0, name) == nothing, "no FP8, or no data sheet"
    names = {"NVIDIA H100 PCIe": 756.5, "NVIDIA H100 NVL": 835.5, "NVIDIA H200": 989.5, "NVIDIA B200": 2250.0}
    assert {name: bench.peaks.peaks_of(name)["bfloat16"] for name in names} == names


def test_the_readme_shows_the_peaks(bench: SimpleNamespace) -> None:
    text = (ROOT / "kernels" / "README.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| [ABH]\d+", line)]
    shown = {name: [float(value) for value in values if value != "none"] for name, *values in rows}
    for name, peaks in bench.peaks.PEAKS.items():
        (found,) = (values for row, values in shown.items() if name in re.split(", | \\(.*", row))
        assert found == list(peaks.values()), name


def test_a_benchmark_writes_its_table_and_names_the_machine(tmp_path: Path) -> None:
    """The one of every operation, whose bytes are known: 2 an element in, 2 out, and a mask's."""
    shown = run(
        BENCH / "bench_kernels.py", "--device", "cpu", "--rows", 128, "--columns", 128, "--rounds", 1, "--threads", 1,
        "--out", tmp_path,
    )  # fmt: skip
    (path,) = tmp_path.glob("*.json")
    assert re.fullmatch(r"kernels-128x128-1-threads-of-[a-z0-9-]+\.json", path.name)
    rows = {row["operation"]: row for row in json.loads(path.read_text())["rows"]}
    assert f"| {next(iter(rows))} |" in shown and all(row["equal"] == 1 and row["ms"] > 0 for row in rows.values())
    assert rows["operand, MXFP4 std, clip, columns"]["bytes an element"] == 2 + 2 + 1
    assert rows["operand, MXFP4 std, clip, rows"]["bytes an element"] == 2 + 2 + 1 + 4 / 32
    assert rows["pack, MXFP4 std, clip"]["bytes an element"] == 2 + 4 / 32 + 1 / 2 + 1 / 32
    assert 12 < rows["operand, NVFP4, rows"]["SQNR dB"] < 22
