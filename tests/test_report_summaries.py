"""Runs side by side, from their summaries."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from report_runs import write_run

from qtrain.cli import start
from qtrain.errors import UserError
from qtrain.report.curves import plot_comparisons
from qtrain.report.gaps import plot_gaps
from qtrain.report.summaries import compare, compare_all, comparison_table, markdown, read_published, read_summaries
from qtrain.runs.table import (
    COLUMNS,
    INTEGERS,
    NUMBERS,
    REQUIRED,
    read_csv,
    read_run,
    read_table,
    record,
    recorded,
    run_directories,
    write_csv,
    write_table,
)


def write(root, name, seed, loss, **more):
    folder = root / f"{name}-{seed}"
    folder.mkdir(parents=True)
    row = {"status": "finished", "name": name, "recipe": name, "seed": seed, "val_loss": loss, "data_hash": "d",
           "tokens": 2000, "non_embedding_parameters": 100, **more}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(row))


@pytest.fixture
def runs(tmp_path):
    for seed, base in enumerate((1.0, 2.0, 3.0)):
        write(tmp_path, "bf16", seed, base)
        write(tmp_path, "quartet", seed, base + (0.10, 0.12, 0.14)[seed])
    write(tmp_path, "quest", 2, 3.5)
    write(tmp_path, "quest", 7, 9.0, status="running")
    return tmp_path


def test_gaps_are_paired_by_seed(runs):
    bf16, quartet, quest = compare(read_summaries(runs), "bf16")
    assert (bf16.name, quartet.name, quest.name) == ("bf16", "quartet", "quest")
    assert quartet.gap == pytest.approx(0.12)
    # Student's t at 2 degrees of freedom is 4.3027; the deviation of (0.10, 0.12, 0.14) is 0.02
    assert quartet.half_width == pytest.approx(4.3027 * 0.02 / math.sqrt(3), rel=1e-4)
    assert quest.gap == pytest.approx(0.5) and math.isnan(quest.half_width)
    assert quest.losses == {2: 3.5}, "an unfinished run is not used"
    assert "|  |  | 3.5000 | 3.5000 | +0.5000 |" in markdown([bf16, quartet, quest])
    assert "| quartet | 1.1000 | 2.1200 | 3.1400 | 2.1200 | +0.1200 ± 0.0497 |" in markdown([bf16, quartet, quest])


def test_csv_holds_one_row_a_run(runs, tmp_path):
    write_csv(read_summaries(runs), tmp_path / "results.csv")
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert [(row["name"], row["seed"]) for row in rows][:2] == [("bf16", "0"), ("bf16", "1")] and len(rows) == 7


def test_mistakes(runs, tmp_path):
    with pytest.raises(UserError, match=r"no run named 'fp32'.*bf16, quartet, quest"):
        compare(read_summaries(runs), "fp32")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="nowhere is no folder and no results file"):
        read_summaries(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds 0 runs"):
        read_summaries(tmp_path / "empty")
    write(runs, "other", 0, 1.0, data_hash="e")
    with pytest.raises(UserError, match="2 different corpora"):
        read_summaries(runs)


def test_of_two_runs_with_one_name_none_is_picked_in_silence(runs):
    (runs / "quartet-0").rename(runs / "quartet-0.old1")
    write(runs, "quartet", 0, 1.2)
    assert compare(read_summaries(runs), "bf16")[1].losses[0] == 1.2, "a run moved aside does not count"
    (runs / "again").mkdir()
    write(runs / "again", "quartet", 0, 1.3)
    with pytest.raises(UserError, match=r"several runs named 'quartet' of seed 0"):
        read_summaries(runs)


HEADER = ",".join(REQUIRED)
VALUES = "1.5,2.5,,192,3,100,600,10.5,c,d,e"


def test_a_results_file_reads_back_as_it_was_written(tmp_path):
    row = dict.fromkeys(COLUMNS, "x") | {column: number for number, column in enumerate(INTEGERS)} | {"seed": 2}
    row |= dict.fromkeys(NUMBERS, 0.1) | {"val_loss": 1 / 3, "val_bits_per_byte": 2e-300, "tokens_per_second": 1e9}
    row |= {"name": "Größe, 3", "status": "finished"}
    path = tmp_path / "results.csv"
    write_csv([row, row | {"seed": 3}], path)
    assert read_csv(path) == [row, row | {"seed": 3}]
    path.write_text(HEADER + "\n")
    assert read_csv(path) == []
    with pytest.raises(UserError, match=r"results\.csv holds no finished run"):
        read_summaries(path)


@pytest.mark.parametrize(("content", "message"), [
    ("", "results.csv is empty, not even a header"),
    (f"{HEADER}\na,r,0,{VALUES}\nb,r,1,{VALUES.replace('2.5', 'low')}\n",
     "results.csv, row 3: val_bits_per_byte is 'low', not a number"),
    (f"{HEADER}\na,r,zero,{VALUES}\n", "results.csv, row 2: seed is 'zero', not an integer"),
    (f"{HEADER}\na,r,0,{VALUES.replace('600', '6.5')}\n", "results.csv, row 2: flops is '6.5', not an integer"),
    (f"{HEADER}\na,r,0,{VALUES.replace('10.5', '')}\n", "results.csv, row 2: tokens_per_second is '', not a number"),
    (f"{HEADER}\n,r,0,{VALUES}\n", "results.csv, row 2: name is empty; a finished run has one"),
    (f"{HEADER}\na,,0,{VALUES}\n", "results.csv, row 2: recipe is empty; a finished run has one"),
    (f"{HEADER}\na,r,0,1.5\n", "results.csv, row 2 has fewer fields than the header"),
    (f"{HEADER}\na,r,0,{VALUES},more\n", "results.csv, row 2 has more fields than the header"),
    (f"{HEADER.replace('flops', 'flop')}\n", "lacks flops; it is no results file"),
    (b"\x89PNG\r\n\x1a\n\x00\xff", "results.csv is no text"),
    (b"\x00\x01\x02\n", "results.csv"),
])  # fmt: skip
def test_a_results_file_that_is_none_is_told_apart(tmp_path, content, message):
    path = tmp_path / "results.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as raised:
        read_csv(path)
    assert message in str(raised.value)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe"])
def test_a_summary_that_cannot_be_read_is_named(runs, content):
    (runs / "quartet-0" / "summary.json").write_bytes(content)
    with pytest.raises(UserError, match=r"quartet-0/summary\.json"):
        read_summaries(runs)


def test_the_folder_of_the_table_must_exist(runs, tmp_path, monkeypatch, capsys):
    """Said before anything is read or printed; with it, the table is written as it was read."""
    table = tmp_path / "tables" / "results.csv"
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", str(runs), "--csv", str(table)])
    assert start("compare") == 2
    told = capsys.readouterr()
    assert told.out == "" and re.search(r"there is no folder .*tables; make it", told.err)
    table.parent.mkdir()
    assert start("compare") == 0
    assert "| quartet | 1.1000 | 2.1200 | 3.1400 |" in capsys.readouterr().out
    assert len(table.read_text().splitlines()) == 8


def test_published_gaps_stand_beside_ours(runs, tmp_path):
    path = tmp_path / "published.csv"
    path.write_text("name,gap,source\nquartet,0.0801,a paper\nother,1.0,another\n")
    table = markdown(compare(read_summaries(runs), "bf16"), read_published(path)).splitlines()
    assert table[0].endswith("| gap to bf16 | published |") and table[1].count("---") == 7
    assert [line.split("|")[-2].strip() for line in table[2:]] == ["", "+0.080", ""]
    path.write_text("name,gap\nquartet,small\n")
    with pytest.raises(UserError, match=r"published\.csv, row 2: needs the columns name and gap, a number"):
        read_published(path)


def test_a_ladder_is_one_table_of_its_sizes_and_budgets(runs, tmp_path):
    for name, gap in (("bf16", 0.0), ("quartet", 0.3)):
        write(runs / "large", name, 0, 0.5 + gap, non_embedding_parameters=400, tokens=8000)
    write(runs / "alone", "quartet", 0, 0.5, non_embedding_parameters=800)
    rows = read_summaries(runs)
    lines = comparison_table(rows, "bf16").splitlines()
    assert lines[0] == "| run | model | parameters | tokens | per parameter | seeds | mean | gap to bf16 |"
    assert sum("| quartet |" in line for line in lines) == 2
    assert any("| 400 |" in line and "+0.3000" in line for line in lines)
    assert any("+0.1200 ± 0.0497" in line for line in lines), "each with the baseline of its own size"
    assert lines[-1] == "Left out, without a run of bf16: 800 parameters on 2k tokens."
    plot_comparisons(compare_all(rows, "bf16"), tmp_path / "gaps.png", {})
    assert (tmp_path / "gaps.png").stat().st_size > 1000
    with pytest.raises(UserError, match=r"no run named 'fp32'"):
        comparison_table(rows, "fp32")


def test_the_picture_holds_every_gap_at_its_place(runs, tmp_path, monkeypatch):
    """Read from what is drawn: seeds, means, intervals, published gaps, the axis that all of them fit."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: drawn.append(figure))
    comparisons = compare(read_summaries(runs), "bf16")
    plot_gaps(comparisons, tmp_path / "gaps.png", {"quartet": 0.04, "other": 1.0})
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["quest", "quartet"]
    points = {(round(x, 4), y) for line in axes.lines for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)}
    assert points >= {(0.1, 1), (0.12, 1), (0.14, 1), (0.04, 1), (0.5, 0)} and not any(x == 1.0 for x, _ in points)
    low, high = sorted(point[0] for point in axes.collections[0].get_segments()[0])
    assert (low, high) == pytest.approx((0.12 - comparisons[1].half_width, 0.12 + comparisons[1].half_width))
    assert axes.get_xscale() == "log", "0.04 to 0.5"
    plot_gaps(comparisons, tmp_path / "gaps.png")
    assert drawn[1].axes[0].get_xscale() == "linear", "within a decade"
    write(runs, "better", 0, 0.9)
    plot_gaps(compare(read_summaries(runs), "bf16"), tmp_path / "gaps.png")
    assert drawn[2].axes[0].get_xscale() == "linear", "a gap below zero"


def test_a_results_file_of_fewer_columns_stays_readable_and_as_it_is(tmp_path):
    """The committed ones have the first columns alone; a row that is added keeps to them."""
    path = tmp_path / "results.csv"
    path.write_text(f"{HEADER}\na,r,0,{VALUES}\n")
    (row,) = read_csv(path)
    assert (row["status"], row["val_loss"], row["bigram_cross_entropy"], row["lr"]) == ("finished", 1.5, None, None)
    record(path, row | {"seed": 1, "lr": 0.1, "config_hash": "other"})
    assert path.read_text().splitlines()[0] == HEADER and len(path.read_text().splitlines()) == 3
    assert read_csv(path) == [row, row | {"seed": 1, "config_hash": "other"}]
    committed = sorted((Path(__file__).parents[1] / "experiments").rglob("results.csv"))
    tables = [path for path in committed if path.read_text().startswith("name,")]
    assert len(tables) >= 4 and all(row["val_loss"] > 0 for path in tables for row in read_csv(path))


def test_the_table_has_every_run_and_its_settings(tmp_path):
    write_run(tmp_path, "quartet", 3, parameters=200_000, steps=20, loss=2.5, lr=0.004, tokenizer="bpe")
    write_run(tmp_path, "bf16", 1, status="diverged", steps=30)
    rows = [read_run(path) for path in run_directories(tmp_path)]
    diverged, finished = rows
    assert (diverged["name"], diverged["status"], diverged["val_loss"]) == ("bf16", "diverged", None)
    assert "not finite" in diverged["reason"] and diverged["tokens_seen"] == 30_000
    expected = {
        "name": "quartet", "seed": 3, "status": "finished", "val_loss": 2.5, "lr": 0.004, "model": "nano",
        "n_layers": 2, "dim": 128, "batch_tokens": 1000, "schedule": "cosine", "tokens": 20_000, "tokens_seen": 20_000,
        "tokens_per_parameter": 0.1, "memory_bytes": 2**30 + 20, "data": "stdlib", "tokenizer": "bpe",
        "val_tokens": 65536, "flops": 24_000_000_000, "reason": None,
    }  # fmt: skip
    assert {key: finished[key] for key in expected} == expected
    for name in ("runs.csv", "runs.parquet"):
        write_table(rows, tmp_path / name)
        assert read_table(tmp_path / name) == rows, f"{name} reads back as it was written"
    assert compare(read_summaries(tmp_path / "runs.parquet"), "quartet")[0].losses == {3: 2.5}


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ({"summary.json": '{"status": "fin'}, r"cannot read .*summary\.json"),
        ({"summary.json": "{}"}, "is no run's summary"),
        ({"summary.json": '{"status": "finished", "name": "a", "seed": 0, "val_loss": null}'}, "val_loss is None"),
        ({"summary.json": '{"status": "finished", "name": "a", "seed": 0, "val_loss": NaN}'}, "val_loss is nan"),
        ({"config.yaml": "name: [a"}, r"cannot read .*config\.yaml"),
        ({"config.yaml": "name: a"}, "does not read as the settings of a run"),
    ],
)
def test_a_damaged_run_is_named(tmp_path, harm, message):
    directory = write_run(tmp_path, "bf16")
    for name, text in harm.items():
        (directory / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_run(directory)


def test_folders_that_only_look_like_runs_are_none(tmp_path):
    directory = write_run(tmp_path, "bf16")
    mirror = directory / "wandb" / "offline-run-1" / "files"
    mirror.mkdir(parents=True)
    (mirror / "config.yaml").write_text("a: 1")
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.yaml").write_text((directory / "config.yaml").read_text())
    assert run_directories(tmp_path) == [directory]
    (begun / "environment.json").write_text("{}")
    assert run_directories(tmp_path) == [begun, directory]
    assert read_run(begun)["status"] == "unknown" and read_run(begun)["name"] == "bf16"


def test_runs_of_other_tokenizers_or_validation_text_do_not_compare(tmp_path):
    write_run(tmp_path, "bf16", 0)
    write_run(tmp_path, "bf16", 1, tokenizer="bpe")
    with pytest.raises(UserError, match=r"2 different tokenizers \(bpe, bytes\)"):
        read_summaries(tmp_path)
    write_run(tmp_path / "other", "bf16", 0)
    write_run(tmp_path / "other", "bf16", 1, val_tokens=512)
    with pytest.raises(UserError, match=r"2 different sizes of validation text \(512, 65536\)"):
        read_summaries(tmp_path / "other")


@pytest.mark.parametrize(("more", "message"), [
    ({"tokens": "50000"}, r"summary\.json: tokens is '50000', not an integer"),
    ({"non_embedding_parameters": None}, r"says finished, and non_embedding_parameters is None"),
    ({"tokens_per_second": [1.0]}, r"tokens_per_second is \[1\.0\], not a number"),
])  # fmt: skip
def test_a_summary_of_other_values_is_named(tmp_path, more, message):
    directory = write_run(tmp_path, "bf16")
    summary = json.loads((directory / "summary.json").read_text())
    (directory / "summary.json").write_text(json.dumps(summary | more))
    with pytest.raises(UserError, match=message):
        read_run(directory)


def test_a_row_is_added_whole_or_not_at_all(tmp_path, monkeypatch):
    """A full disk in the middle of a row."""
    path = tmp_path / "results.csv"
    row = {"name": "a", "recipe": "r"} | dict.fromkeys((*INTEGERS, *NUMBERS), 1) | {"seed": 0}
    row |= {"config_hash": "c", "data_hash": "d", "commit": "e", "status": "finished"}
    record(path, row)
    before = path.read_text()
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            record(path, row | {"seed": 1})
    assert path.read_text() == before
    record(path, row | {"seed": 1})
    assert [found["seed"] for found in read_csv(path)] == [0, 1]


def test_a_row_that_an_older_version_tore_is_left_out(tmp_path, caplog):
    path = tmp_path / "results.csv"
    path.write_text(f"{HEADER}\na,r,0,{VALUES}\nb,r,1,1.5,2")
    assert [row["name"] for row in read_csv(path)] == ["a"]
    assert "its last line was cut off" in caplog.text
    record(path, read_csv(path)[0] | {"name": "c", "config_hash": "x"})
    assert [row["name"] for row in read_csv(path)] == ["a", "c"]
    path.write_text(f"{HEADER}\nb,r,1,1.5,2\na,r,0,{VALUES}\n")
    with pytest.raises(UserError, match="row 2 has fewer fields"):
        read_csv(path)


def test_runs_of_one_name_and_several_texts_have_a_row_each(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text(f"{HEADER}\na,r,0,{VALUES}\n")
    (row,) = read_csv(path)
    for text in ("d", "other", "other"):
        record(path, row | {"data_hash": text})
    assert [found["data_hash"] for found in recorded(path)["a", "c"]] == ["d", "other"]
