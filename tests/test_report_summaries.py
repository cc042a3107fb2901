"""Runs side by side, from their summaries."""

from __future__ import annotations

import csv
import json
import math

import pytest

from qtrain.errors import UserError
from qtrain.report.summaries import compare, markdown, read_summaries, write_csv


def write(root, name, seed, loss, **more):
    folder = root / f"{name}-{seed}"
    folder.mkdir()
    row = {"status": "finished", "name": name, "recipe": name, "seed": seed, "val_loss": loss, "data_hash": "d", **more}
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
