"""The runs of a report page: each is drawn and compared, or named with what keeps it from that."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from report_runs import write_run

from qtrain.report.curves import MOST_PANELS, comparisons, gap_curves, gap_pictures, loss_pictures, rate_pictures
from qtrain.report.gaps import gaps_figure
from qtrain.report.health import health_pictures
from qtrain.report.picture import Picture
from qtrain.report.runs import Corpus, corpora, read_runs
from qtrain.report.summaries import compare, compare_all, read_summaries
from qtrain.runs.metrics_log import scan_metrics
from qtrain.runs.table import finished_runs, read_csv, read_run, record, run_directories, write_csv, write_table


def gather(*places: Path) -> tuple[list[Corpus], list[str]]:
    runs, problems = read_runs(places)
    return corpora(runs, problems), problems


def change(path: Path, **values: Any) -> None:
    """Other values of top-level keys of a summary.json or config.yaml."""
    known = yaml.safe_load(path.read_text()) | values
    path.write_text(json.dumps(known) if path.suffix == ".json" else yaml.safe_dump(known))


def loss_picture(corpus: Corpus, name: str = "loss-tokens") -> Picture:
    (picture,) = [picture for picture in loss_pictures(corpus, "bf16") if picture.name == name]
    return picture


def points(axes: Axes, marker: str) -> list[tuple[float, float]]:
    lines = [line for line in axes.lines if line.get_marker() == marker]
    return [point for line in lines for point in zip(line.get_xdata(), line.get_ydata(), strict=True)]


# ------------------------------------------------------------------------------------------------ damaged and double


TELEMETRY_LINE = '{"step": 52, "tokens": 52000, "flops": 1, "quant/l/fprop.x/sqnr_db": 3.0}'


@pytest.mark.parametrize("cut", ['{"step": 51, "tok', '{"step": 51, "tokens": 51000, "val_loss": 2.', '"tokens": 5}'])
def test_a_line_that_runs_into_telemetry_is_damaged(tmp_path: Path, cut: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"tokens": 1, "loss": 2.0}}\n{cut}{TELEMETRY_LINE}\n{TELEMETRY_LINE}\n')
    lines, damaged, passed = scan_metrics(path, without=('"quant/',))
    assert [line["loss"] for line in lines] == [2.0] and passed == 1
    assert [(fault.number, fault.last) for fault in damaged] == [(2, False)] and damaged[0].text.startswith(cut)


def test_training_losses_that_were_written_again_are_drawn_once(tmp_path: Path) -> None:
    metrics = write_run(tmp_path, "bf16") / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    again = [line | {"loss": 7.0} for line in lines if "loss" in line and line["step"] in (49, 50)]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *again]))
    (corpus,), problems = gather(tmp_path)
    assert len(problems) == 1 and problems[0].endswith("at the same tokens, the last of which is drawn: 2")
    found = [(line["tokens"], line["loss"]) for line in corpus.runs[0].lines if "loss" in line]
    assert [tokens for tokens, _ in found] == [1000 * step for step in range(1, 51)]
    assert [loss for _, loss in found][-2:] == [7.0, 7.0]
    assert corpus.runs[0].compared, "its result is that of its summary"


def test_a_finished_run_is_never_dropped_in_silence(tmp_path: Path) -> None:
    (write_run(tmp_path, "bf16", 0, folder="empty") / "metrics.jsonl").write_text("")
    change(write_run(tmp_path, "bf16", 1, folder="nameless") / "summary.json", data_hash=None)
    _, problems = gather(tmp_path)
    told = {problem.split(": ", 1)[0].rsplit("/", 1)[1]: problem.split(": ", 1)[1] for problem in problems}
    assert told == {
        "empty": "metrics.jsonl holds no loss, so its curves are not drawn",
        "nameless": "says no data_hash, the text it was trained on: compared with none",
    }


def test_a_run_of_one_validation_is_drawn_as_a_marker(tmp_path: Path) -> None:
    write_run(tmp_path, "bf16")
    write_run(tmp_path, "quest", steps=10, loss=3.0)
    (corpus,), _ = gather(tmp_path)
    for name, x in (("loss-tokens", 10_000), ("loss-flops", 6e9), ("loss-time", 20)):
        picture = loss_picture(corpus, name)
        (line,) = [line for line in picture.figure.axes[0].lines if len(line.get_xdata()) == 1]
        assert (*line.get_xdata(), *line.get_ydata()) == (x, 3.0) and line.get_marker() == "s"
        assert "of 2 runs" in picture.alt and "a dot of one value" in picture.alt


def test_a_folder_of_settings_and_metrics_alone_is_a_begun_run(tmp_path: Path) -> None:
    write_run(tmp_path, "bf16")
    directory = write_run(tmp_path, "quest", folder="begun")
    for name in ("summary.json", "environment.json"):
        (directory / name).unlink()
    assert directory in run_directories(tmp_path)
    assert [row["name"] for row in finished_runs(tmp_path)] == ["bf16"]
    _, problems = gather(tmp_path)
    assert len(problems) == 1 and re.search(r"begun: unknown and not compared .* no summary\.json", problems[0])


def test_a_row_in_two_tables_is_one_run(tmp_path: Path) -> None:
    rows = [read_run(write_run(tmp_path / "runs", name, seed)) for name in ("bf16", "quest") for seed in (0, 1)]
    for name in ("a.csv", "a.parquet"):
        write_table(rows, tmp_path / name)
    places = [tmp_path / name for name in ("a.csv", "a.parquet", "a.csv")]
    (corpus,), problems = gather(*places)
    assert len(corpus.compared) == len(corpus.runs) == 4
    assert len(problems) == 1 and problems[0].endswith("and stands here once: 8")
    write_csv([row | {"config_hash": ""} for row in rows], tmp_path / "old.csv")
    assert len(gather(tmp_path / "old.csv", tmp_path / "old.csv")[0][0].runs) == 8, "told apart by nothing"


def test_a_row_that_is_added_stands_in_a_line_of_its_own(tmp_path: Path) -> None:
    rows = [read_run(write_run(tmp_path, "bf16", seed)) for seed in (0, 1)]
    path = tmp_path / "results.csv"
    write_csv(rows[:1], path)
    path.write_text(path.read_text().removesuffix("\n"))
    record(path, rows[1])
    assert read_csv(path) == [rows[0], rows[1] | {"directory": None}]


# --------------------------------------------------------------------------------------------------- what is compared


def test_the_baseline_is_that_of_the_most_seeds(tmp_path: Path) -> None:
    """The one seed of another rate is a little better, and has no pair."""
    for name in ("bf16", "quartet"):
        for seed in (0, 1, 2):
            write_run(tmp_path, name, seed)
    write_run(tmp_path, "bf16", 9, lr=0.004, loss=1.0)
    (corpus,), _ = gather(tmp_path)
    ((first, *_, last),) = comparisons(corpus, "bf16").values()
    assert first.name == "bf16 lr 0.002" and last.gap == pytest.approx(0.1)
    assert gap_pictures(corpus, "bf16")


def test_the_baseline_is_that_of_the_most_pairs(tmp_path: Path) -> None:
    """A rate that shares seeds with rates of the baseline alone has no pair that is asked for."""
    for lr, seeds, loss in ((0.002, (0, 1), 2.0), (0.001, (2, 3, 4), 1.9), (0.004, (2, 3, 4), 1.8)):
        for seed in seeds:
            write_run(tmp_path, "bf16", seed, lr=lr, loss=loss)
    for seed in (0, 1):
        write_run(tmp_path, "quartet", seed, loss=2.1)
    (corpus,), _ = gather(tmp_path)
    ((first, *others),) = comparisons(corpus, "bf16").values()
    assert first.name == "bf16 lr 0.002" and {one.name: one.gap for one in others}["quartet"] == pytest.approx(0.1)
    caption = gap_pictures(corpus, "bf16")[0].caption
    assert caption.endswith("No seed in common with bf16 lr 0.002: bf16 lr 0.001, bf16 lr 0.004.")


def test_runs_without_a_seed_in_common_are_named(tmp_path: Path) -> None:
    write_run(tmp_path, "bf16", 0)
    write_run(tmp_path, "quartet", 1)
    (corpus,), _ = gather(tmp_path)
    (picture,) = gap_pictures(corpus, "bf16")
    assert picture.caption.endswith("No seed in common with bf16: quartet.") and "quartet" in picture.alt
    (axes,) = picture.figure.axes
    assert [text.get_text() for text in axes.texts] == ["no seed in common"] and not [*axes.get_yticks()]
    for seed in (0, 1):
        write_run(tmp_path, "bf16", seed, parameters=50_000)
        write_run(tmp_path, "quartet", seed, parameters=50_000)
    first, *_ = gap_pictures(gather(tmp_path)[0][0], "bf16")
    assert "50k parameters" in first.caption and "No seed" not in first.caption, "those with gaps come first"


def test_names_of_one_recipe_that_share_no_seed_are_its_seeds(tmp_path: Path) -> None:
    for recipe in ("bf16", "quartet"):
        for seed in (0, 1):
            write_run(tmp_path, f"{recipe}-s{seed}", seed, recipe=recipe, loss=2 + 0.1 * (recipe == "quartet"))
    (corpus,), problems = gather(tmp_path)
    (found,) = comparisons(corpus, "bf16").values()
    assert [(one.name, sorted(one.losses)) for one in found] == [("bf16", [0, 1]), ("quartet", [0, 1])]
    assert found[1].gap == pytest.approx(0.1) and problems == []
    write_csv([run.row for run in corpus.runs], tmp_path / "results.csv")
    (rows,), _ = gather(tmp_path / "results.csv")
    assert {run.label for run in rows.runs} == {"bf16", "quartet"}, "whose settings are not known"
    write_run(tmp_path, "quartet-b", 1, recipe="quartet")
    (corpus,), _ = gather(tmp_path)
    assert {run.label for run in corpus.runs} == {"bf16", "quartet-s0", "quartet-s1", "quartet-b"}, "seed 1 is double"
    config = next(tmp_path.glob("bf16-s1*")) / "config.yaml"
    change(config, model={"name": "nano", "n_layers": 2, "dim": 128, "norm": "none"})
    assert "bf16" in {run.label for run in gather(tmp_path)[0][0].runs}, "a setting that the other lacks"
    change(config, optimizer={"lr": 0.002, "weight_decay": 0.2})
    change(next(tmp_path.glob("bf16-s0*")) / "config.yaml", optimizer={"lr": 0.002, "weight_decay": 0.1})
    assert {"bf16-s0", "bf16-s1"} < {run.label for run in gather(tmp_path)[0][0].runs}


def test_runs_that_differ_in_other_settings_are_no_seeds_of_one_thing(tmp_path: Path) -> None:
    for name in ("bf16", "quartet", "quest"):
        for seed in (0, 1):
            write_run(tmp_path, name, seed, folder=f"{name}-{seed}")
    config = tmp_path / "quartet-1" / "config.yaml"
    changed = {"lr": 0.002, "weight_decay": 0.2}
    change(tmp_path / "quartet-0" / "config.yaml", optimizer=changed | {"weight_decay": 0.1})
    recipe = {"name": "quartet", "overrides": {"head": {"bits": 8}}}
    change(config, optimizer=changed, recipe=recipe)
    change(tmp_path / "quartet-0" / "config.yaml", recipe=recipe | {"overrides": {}})
    change(tmp_path / "quest-0" / "config.yaml", run_root="a", callbacks={"log_every_steps": 1}, results="b.csv")
    change(tmp_path / "quest-1" / "config.yaml", run_root="c", callbacks={"log_every_steps": 2}, later_version=3)
    (corpus,), problems = gather(tmp_path)
    assert sorted({run.label for run in corpus.compared}) == ["bf16", "quest"] and len(corpus.compared) == 4
    assert len(problems) == 1
    assert re.search(
        r"quartet-0 and .*quartet-1 are all called quartet and differ in optimizer.weight_decay, recipe.overrides: "
        "none of them is compared; give those of other settings a name of their own",
        problems[0],
    )
    change(config, name="quartet_wd")
    change(tmp_path / "quartet-1" / "summary.json", name="quartet_wd")
    assert gather(tmp_path)[1] == [], "a name of its own"


def test_groups_of_one_text_are_told_apart_by_their_titles(tmp_path: Path) -> None:
    write_run(tmp_path, "bf16", 0)
    write_run(tmp_path, "bf16", 1)
    write_run(tmp_path, "bf16", 2, val_tokens=None)
    found, problems = gather(tmp_path)
    assert [corpus.title for corpus in found] == [
        "stdlib, bytes, 65.5k validation tokens, data dddddddd",
        "stdlib, bytes, unknown amount of validation text, data dddddddd",
    ]
    assert found[1].title in problems[0]


def test_sizes_and_budgets_are_compared_apart(tmp_path: Path) -> None:
    write_run(tmp_path, "bf16", 0)
    write_run(tmp_path, "bf16", 1, parameters=400_000)
    write_run(tmp_path, "quartet", 1, parameters=400_000)
    rows = read_summaries(tmp_path)
    assert compare(rows, "bf16")[1].gap == pytest.approx(0.1), "the pair is of one size"
    rows[-1]["non_embedding_parameters"] = None
    assert compare(rows, "bf16")[1].gap == pytest.approx(0.1), "perhaps of one size"
    write_run(tmp_path, "quartet", 0, steps=100)
    found = compare_all(read_summaries(tmp_path), "bf16")
    names = {(parameters, tokens): [one.name for one in each] for (parameters, _, tokens), each in found.items()}
    assert names == {(100_000, 50_000): ["bf16"], (400_000, 50_000): ["bf16", "quartet"]}, "none of another budget"
    write_run(tmp_path / "sizes", "bf16")
    write_run(tmp_path / "sizes", "quartet", parameters=400_000)
    found = compare_all(read_summaries(tmp_path / "sizes"), "bf16")
    assert [[one.name for one in each] for each in found.values()] == [["bf16"]]


# -------------------------------------------------------------------------------------------------------- the pictures


def test_a_gap_of_one_seed_has_no_interval(tmp_path: Path) -> None:
    for name, seeds in (("bf16", (0, 1)), ("quest", (0,)), ("quartet", (0, 1))):
        for seed in seeds:
            write_run(tmp_path, name, seed)
    write_run(tmp_path, "halo", 1)
    (corpus,), _ = gather(tmp_path)
    (found,) = comparisons(corpus, "bf16").values()
    (axes,) = gaps_figure(found).axes
    assert len(axes.collections) == 1 and len(axes.collections[0].get_segments()) == 1, "the bar of quartet"
    legend = axes.get_legend()
    assert legend is not None
    names = [text.get_text() for text in legend.get_texts()]
    assert sorted(names) == ["a seed", "mean, 95% interval", "one seed, no interval"]
    alt = gap_pictures(corpus, "bf16")[0].alt
    assert "quest +0.0500 (one seed, no interval)" in alt and re.search(r"quartet \+0\.1000 ± \d", alt)


def test_seeds_without_a_curve_are_counted(tmp_path: Path) -> None:
    """Those of a results file have a gap at the end and no curve."""
    rows = [
        read_run(write_run(tmp_path / str(seed), name, seed, loss=2 + gap))
        for seed in (0, 1, 2)
        for name, gap in (("bf16", 0.0), ("quartet", 0.1 * (seed + 1)), ("quest", 0.05))
        if (name, seed) != ("quest", 0)
    ]
    write_csv(rows, tmp_path / "results.csv")
    (corpus,), _ = gather(tmp_path / "0", tmp_path / "results.csv")
    at_end, over_tokens = gap_pictures(corpus, "bf16")
    assert "quartet +0.2000" in at_end.alt and "quartet +0.1000" in over_tokens.alt
    told = "quartet: 1 of 3 paired seeds has a curve; quest: 0 of 2 paired seeds have a curve."
    assert over_tokens.caption.endswith(told) and over_tokens.alt.endswith(told)
    (corpus,), _ = gather(*(tmp_path / str(seed) for seed in (0, 1, 2)))
    assert "have a curve" not in "".join(picture.caption for picture in gap_pictures(corpus, "bf16"))


def test_the_mean_over_tokens_is_of_the_same_seeds_everywhere(tmp_path: Path) -> None:
    """Seed 1 was validated at other tokens than seed 0: a line through both would jump between them."""
    for seed in (0, 1):
        for name, gap in (("bf16", 0.0), ("quartet", 0.1 + seed)):
            metrics = write_run(tmp_path, name, seed, loss=2 + gap) / "metrics.jsonl"
            lines = [json.loads(line) for line in metrics.read_text().splitlines()]
            moved = [line | {"tokens": line["tokens"] + (5000 if seed and "val_loss" in line else 0)} for line in lines]
            metrics.write_text("".join(json.dumps(line) + "\n" for line in moved))
    (corpus,), _ = gather(tmp_path)
    assert gap_curves(corpus.compared, "bf16") == {}
    write_run(tmp_path, "quest", 0)
    _, over_tokens = gap_pictures(gather(tmp_path)[0][0], "bf16")
    assert over_tokens.caption.endswith("quartet: no curve, as its seeds were validated at different tokens.")


def test_the_cross_of_an_unfinished_run_is_in_the_picture(tmp_path: Path) -> None:
    write_run(tmp_path, "bf16", loss=2.0)
    write_run(tmp_path, "quest", loss=1e6, status="diverged")
    write_run(tmp_path, "quartet", loss=0.1, status="running")
    (corpus,), _ = gather(tmp_path)
    for name in ("loss-training", "loss-tokens", "loss-flops", "loss-time"):
        picture = loss_picture(corpus, name)
        (axes,) = picture.figure.axes
        assert sorted(y for _, y in points(axes, "x")) == pytest.approx([*axes.get_ylim()]), name
        assert not any(line.get_clip_on() for line in axes.lines if line.get_marker() == "x")
        assert "at the top edge where its loss lies above" in picture.caption


def test_a_diverged_run_leaves_the_axes_to_the_finished_ones(tmp_path: Path) -> None:
    write_run(tmp_path, "bf16", loss=2.0)
    write_run(tmp_path, "quest", loss=1e6, status="diverged")
    (corpus,), _ = gather(tmp_path)
    picture = loss_picture(corpus)
    low, high = picture.figure.axes[0].get_ylim()
    assert 1.5 < low < 2 < high < 3
    assert "the axes are those of the finished ones" in picture.caption
    (only,), _ = gather(tmp_path / "quest-100000-50-0.002-0")
    assert loss_picture(only).figure.axes[0].get_ylim()[1] > 1e6, "where none finished those of all"


def test_a_loss_of_one_value_has_room_above_and_below(tmp_path: Path) -> None:
    lines = [{"step": step, "tokens": step * 1000, "val_loss": 2.0} for step in (1, 2)]
    (write_run(tmp_path, "bf16") / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (corpus,), _ = gather(tmp_path)
    assert loss_picture(corpus).figure.axes[0].get_ylim() == pytest.approx((1.9, 2.1))


def test_rates_are_compared_over_the_seeds_that_all_of_them_have(tmp_path: Path) -> None:
    """The seeds 1 and 2 are worse, and were run at the best rate alone."""
    for lr, seeds in ((0.001, {0: 2.0}), (0.002, {0: 1.9, 1: 2.5, 2: 2.6}), (0.004, {0: 2.1})):
        for seed, loss in seeds.items():
            write_run(tmp_path, "bf16", seed, lr=lr, loss=loss)
    (corpus,), _ = gather(tmp_path)
    (picture,) = rate_pictures(corpus, "bf16")
    assert picture.alt.endswith("best: bf16 0.002") and "no seed" not in picture.caption
    (line,) = [
        line for line in picture.figure.axes[0].lines if len(line.get_xdata()) == 3 and line.get_marker() == "None"
    ]
    assert list(line.get_ydata()) == pytest.approx([2.0, 1.9, 2.1])
    write_run(tmp_path, "bf16", 3, lr=0.008, loss=3.0)
    (picture,) = rate_pictures(gather(tmp_path)[0][0], "bf16")
    assert "Of bf16 no seed was run at every rate: there the mean is over all seeds." in picture.caption
    assert picture.alt.endswith("best: bf16 0.001, at the edge of the rates tried")


def test_a_rate_that_diverged_was_tried(tmp_path: Path) -> None:
    for lr, loss in ((0.001, 2.5), (0.002, 2.0)):
        write_run(tmp_path, "bf16", lr=lr, loss=loss)
    write_run(tmp_path, "bf16", lr=0.004, status="diverged")
    (corpus,), _ = gather(tmp_path)
    (picture,) = rate_pictures(corpus, "bf16")
    assert picture.alt.endswith("best: bf16 0.002")
    (axes,) = picture.figure.axes
    assert points(axes, "x") == [(0.004, 0.97)] and [*axes.get_xticks()] == [0.001, 0.002, 0.004]
    assert axes.get_xlim()[1] > 0.004 and axes.get_ylim()[0] > 1.9, "the height is a share of the axis"
    assert "A cross at the top" in picture.caption


def test_sweeps_beyond_the_most_that_are_shown_are_named(tmp_path: Path) -> None:
    for number in range(MOST_PANELS + 1):
        for lr in (0.001, 0.002):
            write_run(tmp_path, "bf16", lr=lr, parameters=100_000 * (number + 1))
    (corpus,), _ = gather(tmp_path)
    (picture,) = rate_pictures(corpus, "bf16")
    assert len(picture.figure.axes) == MOST_PANELS
    assert picture.caption.endswith("Not shown: nano, 100k parameters, 50k tokens (0.5 a parameter).")


def test_telemetry_of_an_unfinished_run_is_told(tmp_path: Path) -> None:
    write_run(tmp_path, "quartet", 0, status="diverged", telemetry=True)
    (corpus,), _ = gather(tmp_path)
    assert all("-0, diverged)" in picture.caption for picture in health_pictures(corpus))
    write_run(tmp_path, "quartet", 1, telemetry=True)
    (corpus,), _ = gather(tmp_path)
    pictures = health_pictures(corpus)
    assert pictures and all("-1)" in picture.caption for picture in pictures), "the finished one of equal FLOPs"


def test_sweeps_of_one_recipe_are_told_apart(tmp_path: Path) -> None:
    for batch in (1000, 2000):
        for lr in (0.001, 0.002):
            directory = write_run(tmp_path, "bf16", lr=lr, loss=2 + lr + batch / 1e4, folder=f"{batch}-{lr}")
            change(directory / "config.yaml", trainer={"batch_tokens": batch})
    for lr in (0.001, 0.002):
        write_run(tmp_path, "quest", lr=lr)
    (corpus,), problems = gather(tmp_path)
    (picture,) = rate_pictures(corpus, "bf16")
    assert problems == [] and "bf16 batch 1,000 0.001" in picture.alt and "bf16 batch 2,000 0.001" in picture.alt
    (legend,) = picture.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["bf16 batch 1,000", "bf16 batch 2,000", "quest"]
    lines = [
        line for line in picture.figure.axes[0].lines if len(line.get_xdata()) == 2 and line.get_marker() == "None"
    ]
    looks = {(to_hex(line.get_color()), str(line.get_linestyle())) for line in lines}
    assert len(lines) == len(looks) == 3 and len({colour for colour, _ in looks}) == 2
