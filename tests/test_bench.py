"""Benchmarks count what they say, withhold what is wrong, keep their rows whatever happens, and their JSON becomes the
tables of kernels/README.md. The first contact with a GPU runs here without one: in Triton's interpreter, and compiled
for sm_90 under a driver that launches nothing."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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


def run(*arguments: object, code: int = 0, **environment: str) -> str:
    """What a command prints. environment: variables beside those of this process."""
    paths = f"{ROOT}:{ROOT / 'kernels'}:{BENCH}"
    environment = {**os.environ, "PYTHONPATH": paths, **environment}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of each result in a folder, by the beginnings of the files' names."""
    found = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    return {"-".join(name.split("-")[:2]): result["rows"] for name, result in found.items()}


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
    assert rows["quantize, MXFP4 std, clip, columns"]["bytes an element"] == 2 + 2
    assert rows["quantize, MXFP4 std, clip, rows"]["bytes an element"] == 2 + 2 + 1 / 8
    assert rows["quantize and pack, MXFP4 std, clip"]["bytes an element"] == 2 + 2 + 1 / 8 + 1 / 2 + 1 / 32
    assert 12 < rows["quantize, NVFP4, rows"]["SQNR dB"] < 22


# --------------------------------------------------------------------------------------------------- rows that are kept


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(out=tmp_path, device="cpu", backend="auto", only="", budget=None, rehearse=False)


def test_a_case_that_fails_costs_its_row_alone(
    bench: SimpleNamespace, options: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    """And all rows so far are in the file while the next case runs."""
    seen = []

    def failing() -> dict[str, float]:
        try:
            raise KeyError("cause")
        except KeyError as cause:
            raise RuntimeError("out of | memory\nin two lines") from cause

    def looking() -> dict[str, float]:
        seen.extend(read(options.out)["things-1"])
        return {"ms": 2.0}

    cases = [("good", lambda: {"ms": 1.0}), ("bad", failing), ("looking", looking)]
    assert bench.harness.run("things-1", "things", "case", cases, options) == 1
    good, bad = {"case": "good", "ms": 1.0}, read(options.out)["things-1"][1]
    assert seen == [good, bad] and read(options.out)["things-1"] == [*seen, {"case": "looking", "ms": 2.0}]
    assert bad["error"] == "RuntimeError: out of | memory in two lines <- KeyError: 'cause'"
    assert re.fullmatch(r"test_bench\.py:\d+", bad["at"])
    assert "out of \\| memory" in capsys.readouterr().out, "a table's cell ends at a bar"
    assert bench.harness.run("things-1", "things", "case", cases[:1], options) == 0


def test_what_is_wrong_or_left_out_is_an_exit_code(
    bench: SimpleNamespace, options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one(row: dict[str, object]) -> tuple[int, list[dict[str, Any]]]:
        cases = [("a", lambda: row), ("b", lambda: {"equal": 1.0})]
        code = bench.harness.run("things-1", "things", "case", cases, options)
        return code, read(options.out)["things-1"]

    right = {"case": "b", "equal": 1.0}
    assert one({"equal": 1.0, "ms": 3.0}) == (0, [{"case": "a", "equal": 1.0, "ms": 3.0}, right])
    wrong = {"case": "a: WRONG", "unequal": "result 2 of 2: 0.5", "equal": 0.5}
    assert one({"equal": 0.5, "ms": 3.0, "unequal": "result 2 of 2: 0.5"}) == (1, [wrong, right])
    options.only = "^b"
    assert one({"equal": 0.5}) == (0, [right])
    options.only = "nothing"
    assert bench.harness.run("things-1", "things", "case", [("a", dict)], options) == 1, "nothing was measured"

    options.only, options.budget, clock = "", 10.0, iter(range(0, 1000, 7))
    monkeypatch.setattr(bench.harness.time, "monotonic", lambda: next(clock))
    code, rows = one({"ms": 3.0})
    assert (code, rows[0]) == (1, {"case": "a", "ms": 3.0})
    assert rows[1] == {"case": "b", "error": "not measured: 10 s are over"}


def test_nothing_is_measured_on_a_device_that_no_longer_answers(
    bench: SimpleNamespace, options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.harness, "answers", lambda device: False)
    cases = [("a", lambda: {"ms": 1.0}), ("b", lambda: 1 / 0), ("c", lambda: {"ms": 2.0})]
    assert bench.harness.run("things-1", "things", "case", cases, options) == 1
    assert [row["case"] for row in read(options.out)["things-1"]] == ["a", "b", "the rest"]


def test_a_case_that_hangs_is_ended_after_the_budget(tmp_path: Path) -> None:
    code = (
        "import sys, time, harness; harness.GRACE_SECONDS = 0.5; options = harness.arguments(''); "
        "cases = [('quick', dict), ('hanging', lambda: time.sleep(250))]; "
        "harness.run('things-1', 'things', 'case', cases, options)"
    )
    run("-c", code, "--device", "cpu", "--budget", 1, "--out", tmp_path, code=1)
    assert read(tmp_path)["things-1"] == [{"case": "quick"}]


def test_equality_is_of_bits(bench: SimpleNamespace, options: argparse.Namespace) -> None:
    zeros, one = torch.zeros(4, dtype=torch.bfloat16), torch.ones(1, dtype=torch.uint8)
    negative = zeros.clone()
    negative[0] = -0.0
    assert bench.harness.equality([(one, one), (zeros, zeros)], options) == {"equal": 1.0}
    found = bench.harness.equality([(one, one), (zeros, negative)], options)
    assert found == {"equal": 0.75, "unequal": "result 2 of 2: 0.75"}
    with pytest.raises(ValueError, match=r"the result is \(4,\) torch.float32; the reference gives \(4,\) torch.bf"):
        bench.harness.equality([(zeros.float(), zeros)], options)
    options.rehearse = True
    assert bench.harness.equality([(zeros, negative)], options) == {"equal": None}


# -------------------------------------------------------------------------------------------------------- first contact

STAGES = """
import sys, first_contact
only = dict(zip(sys.argv[1::2], sys.argv[2::2]))
options = only.pop("options").split()
for stage, names in only.items():
    sys.argv = ["first_contact.py", stage, "--only", names, *options]
    assert first_contact.main() == 0, stage
"""  # in one process, to import once; on a GPU each stage has its own


def first_contact(options: str, stages: dict[str, str], folder: Path, **environment: str) -> str:
    """Runs the cases of stages whose names a regular expression finds."""
    asked = [each for pair in {"options": f"{options} --rounds 1 --out {folder}", **stages}.items() for each in pair]
    return run("-W", "ignore", "-c", STAGES, *asked, **environment)


def test_first_contact_in_the_interpreter(tmp_path: Path) -> None:
    stages = {
        "env": "", "peaks": "copy|bf|int8",
        "equal": "(quantize, NVFP4, rows|unrotate.*QuEST|quantize, INT4.* columns).* float32",
        "speed": "quantize, MXFP4, rows", "gemms": "int8_matmul", "few_rows": "int4_sym/32.* (8|64)x",
        "layers": "^bf|^quest", "training": "bf16",
    }  # fmt: skip
    small = "--device cpu --backend triton --sizes 32x128x128 --square 64 --seq-len 32 --layers 1"
    first_contact(small, stages, tmp_path, TRITON_INTERPRET="1")
    rows = read(tmp_path)
    assert set(rows) == {f"first-{stage}" for stage in stages}
    assert {row["fact"]: row["found"] for row in rows["first-env"]}["torch"].startswith(torch.__version__)
    shapes = {row["operation"].rpartition(", ")[2] for row in rows["first-equal"]}
    assert len(rows["first-equal"]) == 3 and shapes == {"37x384 float32", "384x37 float32"}
    assert all(row["equal"] == 1 for stage in ("equal", "speed", "layers") for row in rows[f"first-{stage}"])
    timed = [row for stage in ("peaks", "speed", "gemms", "few_rows", "layers") for row in rows[f"first-{stage}"]]
    assert len(timed) == 3 + 1 + 2 + 2 + 2 and all(row["ms"] > 0 for row in timed)
    assert all(row["relative error"] == 0 for row in rows["first-gemms"]), "the error of an exact product"
    assert [row["recipe"] for row in rows["first-training"]] == ["bf16"] and rows["first-training"][0]["tokens/s"] > 0
    assert "Triton's interpreter" in run(BENCH / "table.py", *tmp_path.glob("*.json"))


def test_first_contact_compiled_for_a_gpu(tmp_path: Path) -> None:
    """Every stage that launches kernels, by a driver that launches nothing; the compiled kernels stay in the cache."""
    stages = {
        "equal": "quantize, MXFP4, rows.*256",
        "speed": "quantize, MXFP4, rows",
        "few_rows": "int4_sym/32.* 1x",
        "layers": "^quartet, 1",
        "training": "",
    }
    cache = tmp_path / "cache"
    shown = first_contact(
        "--rehearse --seq-len 128 --layers 1", stages, tmp_path, TRITON_CACHE_DIR=str(cache), TRITON_INTERPRET="0"
    )
    rows = read(tmp_path)
    assert set(rows) == {f"first-{stage}" for stage in stages} and all(rows.values())
    for path in tmp_path.glob("*.json"):
        assert json.loads(path.read_text())["machine"]["device"] == "no device (compiled for sm_90)"
    assert all(row["equal"] is None for stage in ("equal", "speed", "layers") for row in rows[f"first-{stage}"])
    binaries = {path.stem for path in cache.rglob("*.cubin")}
    assert binaries == {"quantize_kernel", "quantize_both_kernel", "rotate_kernel", "unpack_kernel", "few_rows_kernel"}
    compiled, launches = map(int, re.findall(r"rehearsed: (\d+) kernels .* (\d+) launches", shown)[-1])
    assert 8 < compiled == len(list(cache.rglob("*.cubin"))) < launches
    assert [row["recipe"] for row in rows["first-training"]] == ["bf16", "quartet"]


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    """By make bench-gpu before anything is measured, with the interpreter that it was given, and nothing installed."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    command = ["make", "-s", "bench-gpu", f"PYTHON={python}", f"RESULTS={tmp_path / 'results'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and not list((tmp_path / "results").iterdir())
    assert re.search(
        r"the benchmarks need the package 'torch', which .* does not have; .* it lacks: torch, ", done.stderr
    )
