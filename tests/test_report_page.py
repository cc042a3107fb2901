"""The report page: what it shows is what the files hold, what is wrong is named, and nothing is fetched."""

from __future__ import annotations

import csv
import json
import re
import runpy
import sys
import types
from collections.abc import Sequence
from html import unescape
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import MultipleLocator
from PIL import Image
from pyarrow import parquet
from report_runs import LAYERS, OPERANDS, quant_values, write_run, write_sweep

from qtrain.cli import start
from qtrain.errors import UserError
from qtrain.report.curves import (
    comparisons,
    gap_curves,
    gap_pictures,
    label_styles,
    loss_over_seconds,
    loss_pictures,
    rate_pictures,
    time_unit,
)
from qtrain.report.health import MOST_RUNS, Telemetry, health_pictures
from qtrain.report.law_figures import law_figures, predicted
from qtrain.report.page import save_all, write_report
from qtrain.report.picture import MOST_POINTS, Picture, flops, part_labels, thin
from qtrain.report.runs import Corpus, Run, corpora, read_runs
from qtrain.report.wandb_runs import project_runs
from qtrain.runs.table import read_run, record, write_csv

SCRIPT = Path(__file__).parents[1] / "scripts" / "report.py"
COMMAND = "python scripts/report.py runs --out report.html"
Law = dict[str, Any]


def gather(*places: Path) -> tuple[list[Corpus], list[str]]:
    runs, problems = read_runs(places)
    return corpora(runs, problems), problems


def labels(corpus: Corpus) -> set[str]:
    return {run.label for run in corpus.runs}


# ------------------------------------------------------------------------------------------------ what is compared


def test_a_label_is_the_recipe_and_whatever_else_its_runs_differ_in(tmp_path: Path) -> None:
    write_run(tmp_path, "bf16")
    for lr in (0.001, 0.002):
        write_run(tmp_path, "quartet", lr=lr)
    write_run(tmp_path, "large", parameters=900_000, recipe="quartet")  # another size: its name says nothing new
    write_run(tmp_path, "quest")
    write_run(tmp_path, "quest_2bit", recipe="quest")
    (corpus,), problems = gather(tmp_path)
    expected = {"bf16", "quartet", "quartet lr 0.001", "quartet lr 0.002", "quest", "quest_2bit"}
    assert labels(corpus) == expected and problems == []
    assert {run.recipe for run in corpus.runs} == {"bf16", "quartet", "quest", "quest_2bit"}
    style = label_styles(corpus, "bf16")
    assert style["bf16"]["color"] == "black"
    assert style["quartet lr 0.001"]["color"] == style["quartet"]["color"] != style["quest"]["color"]
    assert style["quartet lr 0.001"]["linestyle"] != style["quartet lr 0.002"]["linestyle"]


def test_gaps_are_those_of_one_size_budget_and_seed(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    (corpus,), _ = gather(tmp_path)
    found = comparisons(corpus, "bf16")
    assert [point[::2] for point in found] == [(400_000, 100_000), (100_000, 50_000)], "the largest first"
    large, small = found.values()
    gaps = {one.name: one.gap for one in large}
    assert gaps == pytest.approx({"bf16": 0.0, "quartet": 0.1, "quest": 0.05})
    assert small[0].name == "bf16 lr 0.002", "of three learning rates of the baseline the best"
    assert {one.name: one.gap for one in small}["quartet lr 0.002"] == pytest.approx(0.1)
    assert all(seed in (0, 1) for one in small for seed in one.losses), "nor diverged nor running ones"


def write_ladder(root: Path) -> None:
    """Three sizes at two ratios, the budgets whole steps; the gap grows with both, by 0.01."""
    for rung, (parameters, layers) in enumerate(((100_300, 1), (200_000, 2), (400_200, 3))):
        for ratio in (1, 2):
            for name in ("bf16", "quest"):
                gap = 0.0 if name == "bf16" else 0.05 + 0.01 * rung + 0.01 * (ratio - 1)
                steps = round(ratio * parameters / 1000)
                directory = write_run(root, name, parameters=parameters, steps=steps, loss=3.0 - 0.1 * rung + gap)
                config = directory / "config.yaml"
                config.write_text(config.read_text().replace("n_layers: 2", f"n_layers: {layers}"))


def test_a_ladder_shows_its_gaps_over_size_and_over_tokens_per_parameter(tmp_path: Path) -> None:
    write_ladder(tmp_path / "runs")
    (corpus,), problems = gather(tmp_path / "runs")
    pictures = {picture.name: picture for picture in gap_pictures(corpus, "bf16")}
    assert [*pictures] == ["gaps-size", "gaps-ratio"] and problems == []
    drawn = {}
    for name, picture in pictures.items():
        lines = [line for line in picture.figure.axes[0].lines if len(line.get_xdata()) > 1 and line.get_marker()]
        drawn[name] = [(list(line.get_xdata()), list(line.get_ydata())) for line in lines if line.get_marker() != "_"]
    sizes = [100_300, 200_000, 400_200]
    low, high = pytest.approx([0.05, 0.06, 0.07]), pytest.approx([0.06, 0.07, 0.08])
    assert [line for line in drawn["gaps-size"] if line[0] == sizes] == [(sizes, low), (sizes, high)]
    ratios = [line for line in drawn["gaps-ratio"] if line[0] == [1.0, 2.0]]
    assert [gaps for _, gaps in ratios] == [pytest.approx([0.05 + rung, 0.06 + rung]) for rung in (0, 0.01, 0.02)]
    write_report([tmp_path / "runs"], tmp_path / "page.html", [], "bf16", COMMAND)
    page = (tmp_path / "page.html").read_text()
    assert "Not shown: the gaps while each trained" in page and page.count('<figure id="gap') == 2
    assert "<td>nano (n_layers=3)</td>" in page, "another model than nano"
    assert "<th>recipe</th><th" not in page.split("Loss</h2>")[0], "a column that is equal to another"
    assert "the table scrolls" in page


def test_labels_of_an_axis_do_not_touch_and_are_rounded_rightly(tmp_path: Path) -> None:
    """Of 2.3e11 FLOP the ticks were 1.2e+11 for 1.25e11, and ran into each other."""
    write_run(tmp_path, "bf16", parameters=760_000, steps=50)
    (corpus,), _ = gather(tmp_path)
    picture = next(picture for picture in loss_pictures(corpus, "bf16") if picture.name == "loss-flops")
    (axes,) = picture.figure.axes
    axes.xaxis.set_major_locator(MultipleLocator(2.5e10))
    part_labels(picture.figure)
    shown = [(label.get_position()[0], label) for label in axes.get_xticklabels() if label.get_text()]
    assert len(shown) >= 3 and all(float(label.get_text()) == pytest.approx(at, rel=1e-9) for at, label in shown)
    boxes = [label.get_window_extent() for _, label in shown]
    assert all(left.x1 + 3 < right.x0 for left, right in pairwise(boxes))
    assert [flops(value) for value in (1.25e11, 6e9, 999e9)] == ["1.25e11", "6e9", "9.99e11"]


def test_the_gap_over_tokens_is_the_mean_over_paired_seeds(tmp_path: Path) -> None:
    for seed, loss in ((0, 2.0), (1, 2.5)):
        write_run(tmp_path, "bf16", seed, loss=loss)
        write_run(tmp_path, "quartet", seed, loss=loss + 0.1 + 0.2 * seed)
    write_run(tmp_path, "quartet", 2, loss=9.0)  # the baseline has no such seed
    (corpus,), _ = gather(tmp_path)
    ((label, (tokens, gap)),) = gap_curves(corpus.runs, "bf16").items()
    assert label == "quartet" and tokens.tolist() == [10_000, 20_000, 30_000, 40_000, 50_000]
    assert gap == pytest.approx([0.2] * 5)


def test_doubles_are_named_and_none_of_them_is_compared(tmp_path: Path) -> None:
    write_run(tmp_path, "bf16")
    write_run(tmp_path, "quartet", 0, folder="one")
    write_run(tmp_path, "quartet", 0, folder="another")
    write_run(tmp_path, "quartet", 1)
    (corpus,), problems = gather(tmp_path)
    assert len(problems) == 1 and re.search(r"another and .*one are of the same recipe", problems[0])
    assert sorted((run.recipe, run.row["seed"]) for run in corpus.compared) == [("bf16", 0), ("quartet", 1)]
    (again,), problems = gather(tmp_path, tmp_path / "one")
    assert len(again.runs) == 4 and len(problems) == 1, "a folder that is named twice is read once"


def test_runs_of_other_data_are_shown_apart(tmp_path: Path) -> None:
    for name in ("bf16", "quartet"):
        write_run(tmp_path / "a", name)
        write_run(tmp_path / "b", name, tokenizer="bpe", loss=9.0)
    write_run(tmp_path / "c", "bf16", val_tokens=512)
    write_run(tmp_path / "d", "bf16", data_hash="e" * 64)
    found, problems = gather(tmp_path)
    assert [corpus.title.split(", ")[1:] for corpus in found] == [
        ["bytes", "65.5k validation tokens", "data dddddddd"],
        ["bpe", "65.5k validation tokens", "data dddddddd"],
        ["bytes", "512 validation tokens", "data dddddddd"],
        ["bytes", "65.5k validation tokens", "data eeeeeeee"],
    ]
    assert len(problems) == 1 and "4 sets of data, whose losses do not compare" in problems[0]
    write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "page.html", [], "bf16", COMMAND)
    page = (tmp_path / "page.html").read_text()
    figures = re.findall(r'<figure id="([^"]+)">', page)
    assert {"data1-gaps-1", "data2-gaps-1", "data1-loss-tokens", "data2-loss-tokens"} <= set(figures)
    assert page.count("<h3>Gaps on ") == 2


def test_rows_of_a_results_file_stand_beside_the_runs_of_folders(tmp_path: Path) -> None:
    """A row whose run is in a folder too stands there once."""
    results = tmp_path / "results.csv"
    for name in ("bf16", "quartet"):
        record(results, read_run(write_run(tmp_path / "here", name)))
    record(results, read_run(write_run(tmp_path / "elsewhere", "quest")))
    (corpus,), problems = gather(results, tmp_path / "here")
    assert sorted(run.recipe for run in corpus.compared) == ["bf16", "quartet", "quest"]
    told = "rows of the results files whose run is in the folders or in another row too, and stands here once"
    assert problems == [f"{told}: 2"]


# ------------------------------------------------------------------------------------------------- what is wrong


def test_everything_wrong_is_named_on_the_page(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for seed, name in enumerate(("good", "diverged", "half", "middle", "twice", "silent")):
        write_run(runs, "bf16", seed, folder=name, status="diverged" if name == "diverged" else "finished")
    with (runs / "half" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 51, "tok')
    lines = (runs / "middle" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (runs / "middle" / "metrics.jsonl").write_text("".join([*lines[:3], "<b>garbage\n", *lines[4:]]))
    last = (runs / "twice" / "metrics.jsonl").read_text().splitlines(keepends=True)[-1]
    with (runs / "twice" / "metrics.jsonl").open("a") as file:
        file.write(last)
    (runs / "silent" / "metrics.jsonl").unlink()
    (runs / "broken").mkdir()
    (runs / "broken" / "summary.json").write_text('{"status": "finished", <b>')
    problems = write_report([runs], tmp_path / "page.html", [], "bf16", COMMAND)
    expected = {
        "broken": "damaged and not compared with others: cannot read",
        "diverged": "diverged and not compared with others: a loss or gradient norm was not finite",
        "half": "line 56 of metrics.jsonl is half-written and left out",
        "middle": "line 4 of metrics.jsonl is damaged and left out ('<b>garbage'",
        "silent": "no metrics.jsonl, so its curves are not drawn",
        "twice": "2 validation losses at 50,000 tokens",
    }
    told = {problem.split(":")[0].rsplit("/", 1)[1]: problem for problem in problems}
    assert told.keys() == expected.keys()
    assert all(words in told[name] for name, words in expected.items())
    page = (tmp_path / "page.html").read_text()
    listed = re.findall(r"<li>(.*?)</li>", page.split('<ul class="problems">')[1].split("</ul>")[0])
    assert list(map(unescape, listed)) == problems and "<b>" not in page
    table = list(csv.DictReader((tmp_path / "page" / "runs.csv").read_text().splitlines()))
    assert [row["status"] for row in table].count("finished") == 5 and len(table) == 7


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (["empty"], r"empty holds no run directory"),
        (["runs", "empty"], r"empty holds no run directory"),
        (["nowhere"], r"nowhere is no folder and no results file"),
        (["header.csv"], r"no run in the results files"),
    ],
)
def test_a_place_without_a_run_is_an_error(tmp_path: Path, places: list[str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "runs", "bf16")
    write_csv([], tmp_path / "header.csv")
    with pytest.raises(UserError, match=message):
        write_report([tmp_path / place for place in places], tmp_path / "page.html", [], "bf16", COMMAND)
    assert not (tmp_path / "page.html").exists()


# ---------------------------------------------------------------------------------------------------- the pictures


def test_time_is_tokens_over_the_logged_speed() -> None:
    speeds = [(100, 10.0), (200, 50.0), (300, 5.0)]  # 10 s, 2 s, 20 s
    lines = [{"tokens": tokens, "tokens_per_second": speed} for tokens, speed in speeds]
    lines += [{"tokens": 50, "val_loss": 4.0}, {"tokens": 200, "val_loss": 3.0}, {"tokens": 300, "val_loss": 2.0}]
    seconds, loss = loss_over_seconds(Run({}, lines))
    assert seconds == pytest.approx([5.0, 12.0, 32.0]) and loss.tolist() == [4.0, 3.0, 2.0]
    assert [time_unit(seconds)[0] for seconds in (100, 150, 7200, 1e6)] == ["seconds", "minutes", "hours", "days"]


def test_long_lines_are_thinned_evenly_and_keep_their_ends() -> None:
    x, y = thin(np.arange(5000.0), np.arange(5000.0) ** 2)
    assert len(x) == MOST_POINTS and (x[0], x[-1]) == (0, 4999) and (y == x**2).all()
    assert set(np.diff(x)) == {25.0, 26.0}


def test_every_run_is_drawn_to_its_last_value(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    (corpus,), _ = gather(tmp_path)
    pictures = {picture.name: picture for picture in loss_pictures(corpus, "bf16")}
    assert list(pictures) == ["loss-training", "loss-tokens", "loss-flops", "loss-time"]
    for over, unit in (("tokens", 1.0), ("flops", 1.0)):
        lines = [
            line for axes in pictures[f"loss-{over}"].figure.axes for line in axes.lines if len(line.get_xdata()) > 1
        ]
        ends = sorted((line.get_xdata()[-1] * unit, line.get_ydata()[-1]) for line in lines)
        last = [[line for line in run.lines if "val_loss" in line][-1] for run in corpus.runs]
        assert ends == pytest.approx(np.array(sorted((line[over], line["val_loss"]) for line in last)))
    crosses = [line for axes in pictures["loss-tokens"].figure.axes for line in axes.lines if line.get_marker() == "x"]
    assert len(crosses) == 2, "a diverged and a running one"
    assert "cross" in pictures["loss-tokens"].caption and "of 20 runs" in pictures["loss-tokens"].alt


def test_the_learning_rate_picture_names_the_best_and_an_edge(tmp_path: Path) -> None:
    for lr, loss in ((0.001, 3.0), (0.002, 2.0), (0.004, 2.5)):
        write_run(tmp_path, "bf16", lr=lr, loss=loss)
        write_run(tmp_path, "quartet", lr=lr, loss=loss if lr < 0.004 else 1.5)
    (corpus,), _ = gather(tmp_path)
    (picture,) = rate_pictures(corpus, "bf16")
    assert picture.alt.endswith("best: bf16 0.002, quartet 0.004, at the edge of the rates tried")
    drawn = {(line.get_color(), *line.get_xdata(), *line.get_ydata()) for line in picture.figure.axes[0].lines}
    assert ("black", 0.001, 0.002, 0.004, 3.0, 2.0, 2.5) in drawn


def test_telemetry_stands_at_its_layer_operand_and_time(tmp_path: Path) -> None:
    directory = write_run(tmp_path, "quartet", telemetry=True)
    with (directory / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 60, "tokens": 60_000, "flops": 1, "quant/lm_head/fprop.x/sqnr_db": 7.0}) + "\n")
    found = Telemetry.read(directory / "metrics.jsonl")
    assert found.layers == [*LAYERS, "lm_head"] and found.tokens == [25_000, 50_000, 60_000], "10 comes after 2"
    expected = quant_values(50)
    for operand in OPERANDS:
        column = found.values[("clipped", operand)][:, 1]
        assert column[:-1].tolist() == [expected[f"quant/{layer}/{operand}/clipped"] for layer in LAYERS]
    assert found.values[("sqnr_db", "fprop.x")][-1, -1] == 7.0
    assert np.isnan(found.values[("sqnr_db", "fprop.x")][-1, :-1]).all()
    (corpus,), problems = gather(tmp_path)
    assert problems == [] and [run.telemetry for run in corpus.runs] == [5]
    pictures = health_pictures(corpus)
    kinds = ("sqnr", "last", "gradient")
    assert [picture.name for picture in pictures] == [f"health-1-quartet-{kind}" for kind in kinds]
    (image,) = next(axes for axes in pictures[0].figure.axes if axes.get_title(loc="left") == "dgrad.dy").images
    assert np.array_equal(image.get_array().filled(np.nan), found.values[("sqnr_db", "dgrad.dy")], equal_nan=True)
    assert "fprop.x 7, least in lm_head" in pictures[0].alt


def test_telemetry_of_damaged_lines_alone_makes_no_picture(tmp_path: Path) -> None:
    for name in ("bf16", "quartet"):
        directory = write_run(tmp_path / "runs", name, telemetry=name == "bf16")
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "tokens": 50000, "quant/layers.0.mlp.down/fprop.x/sqnr_db": }\n')
    write_report([tmp_path / "runs"], tmp_path / "page.html", [], "bf16", COMMAND)
    page = (tmp_path / "page.html").read_text()
    assert "health-1-bf16-sqnr" in page and "quartet-sqnr" not in page


def test_recipes_whose_names_differ_in_signs_alone_have_their_own_pictures(tmp_path: Path) -> None:
    for seed, name in enumerate(("quest.2", "quest-2", "κβαντ", "квант")):
        write_run(tmp_path / "runs", name, seed, telemetry=True, folder=f"run-{seed}", loss=2.0)
    write_report([tmp_path / "runs"], tmp_path / "page.html", [], "bf16", COMMAND)
    page = (tmp_path / "page.html").read_text()
    names = re.findall(r'<figure id="(health-[^"]+-sqnr)"', page)
    assert sorted(names) == ["health-1-quest-2-sqnr", "health-2-quest-2-sqnr", "health-3-sqnr", "health-4-sqnr"]
    assert all((tmp_path / "page" / f"{name}.pdf").exists() for name in names)


def test_pictures_of_one_name_are_refused(tmp_path: Path) -> None:
    one = Picture("loss", Figure(), "", "")
    with pytest.raises(AssertionError, match="two pictures named loss"):
        save_all([(one, COMMAND), (one, COMMAND)], tmp_path)


def test_recipes_beyond_the_most_that_are_shown_are_named(tmp_path: Path) -> None:
    for seed, name in enumerate("abcdef"):
        write_run(tmp_path, name, seed, telemetry=True)
    (corpus,), _ = gather(tmp_path)
    pictures = health_pictures(corpus)
    assert len(pictures) == 3 * MOST_RUNS
    assert pictures[0].caption.endswith(" Not shown: e, f.") and "Not shown" not in pictures[1].caption


# -------------------------------------------------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_sweep(folder / "runs")
    write_report([folder / "runs"], folder / "report.html", [], "bf16", COMMAND)
    return folder / "report.html"


def test_the_page_needs_nothing_but_itself(report: Path) -> None:
    page = report.read_text()
    sources = re.findall(r'(?:src|href|action|data|poster)="([^"]*)"', page)
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert not re.search(r"https?:|url\(|@import|<script|<iframe|<link (?!rel=\"icon\" href=\"data:,\")", page)
    assert page.count("<img ") == page.count('alt="') == page.count('src="data:image/png;base64,') > 8


def test_the_table_of_runs_names_their_directories(report: Path) -> None:
    (table,) = re.findall(r'<section id="overview">.*?</section>', report.read_text(), flags=re.DOTALL)
    assert "directory</th>" in table
    assert all(f"<td>{path.parent}</td>" in table for path in (report.parent / "runs").glob("*/summary.json"))


def test_every_figure_is_a_file_too_and_says_how_it_is_made(report: Path) -> None:
    page = report.read_text()
    names = re.findall(r'<figure id="([^"]+)">', page)
    assert len(set(names)) == len(names) > 8
    folder = report.with_suffix("")
    files = {f"{name}.{kind}" for name in names for kind in ("pdf", "png")} | {"runs.csv", "runs.parquet"}
    assert {path.name for path in folder.iterdir()} == files
    for name in names:
        with Image.open(folder / f"{name}.png") as image:
            command = image.info["Description"]
        assert command == f"{COMMAND} --figure {name}"
        content = (folder / f"{name}.pdf").read_bytes()
        assert content.startswith(b"%PDF") and f"/Subject ({command})".encode() in content
        assert f"<code>{command}</code></figcaption>" in page.split(f'<figure id="{name}">')[1].split("</figure>")[0]
    rows = list(csv.DictReader((folder / "runs.csv").read_text().splitlines()))
    assert len(rows) == parquet.read_table(folder / "runs.parquet").num_rows == 20


def test_the_same_runs_give_the_same_page(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "bf16")
    pages = [tmp_path / "one.html", tmp_path / "two.html"]
    for page in pages:
        write_report([tmp_path / "runs"], page, [], "bf16", COMMAND)
    one, two = (page.read_text().replace("<code>one</code>", "<code>two</code>") for page in pages)
    assert one == two
    assert (tmp_path / "one" / "loss-tokens.pdf").read_bytes() == (tmp_path / "two" / "loss-tokens.pdf").read_bytes()


def test_figures_of_an_earlier_page_go_and_a_folder_of_others_stays(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "bf16")
    with pytest.raises(UserError, match=r"would go to .*runs, which holds something else"):
        write_report([tmp_path / "runs"], tmp_path / "runs.html", [], "bf16", COMMAND)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["bf16-100000-50-0.002-0"]
    write_report([tmp_path / "runs"], tmp_path / "page.html", [], "bf16", COMMAND)
    stale = tmp_path / "page" / "gaps-9.png"
    stale.touch()
    write_report([tmp_path / "runs"], tmp_path / "page.html", [], "bf16", COMMAND)
    assert not stale.exists() and (tmp_path / "page" / "loss-tokens.png").exists()


def test_a_section_without_data_says_what_would_fill_it(tmp_path: Path) -> None:
    write_run(tmp_path, "quest", telemetry=False)
    write_report([tmp_path], tmp_path / "page.html", [], "bf16", COMMAND)
    absent = re.findall(
        r'<section id="([^"]+)"><h2>[^<]+</h2>\n<p class="absent">([^<]+)</p>', (tmp_path / "page.html").read_text()
    )
    assert [name for name, _ in absent] == ["problems", "recipes", "learning-rate", "health", "law"]
    told = dict(absent)
    assert "of bf16" in told["recipes"] and "optimizer.lr=" in told["learning-rate"] and "--law" in told["law"]


def test_a_results_file_alone_makes_a_page(tmp_path: Path) -> None:
    """What the committed studies have: no curves, and the gaps of their README."""
    results = Path(__file__).parents[1] / "experiments" / "quickstart" / "results.csv"
    write_report([results], tmp_path / "page.html", [], "bf16", COMMAND)
    figures = re.findall(r'<figure id="([^"]+)">', (tmp_path / "page.html").read_text())
    assert figures == ["gaps-1", "speed"]


def law_of(recipes: Sequence[str]) -> Law:
    """A law.json with points that lie on the law, the same of every recipe; the first is the baseline."""
    known = {"identified": True, "fitted": True}
    values = {"A": 300.0, "alpha": 0.4, "B": 90.0, "beta": 0.3, "E": 1.5, "gamma": 1.0}
    sure = {"value": 0.64, "low": 0.6, "high": 0.7}
    law: Law = {
        "law": "quartet", "baseline": recipes[0],
        "command": "python scripts/fit_scaling_law.py runs --law quartet --out law",
        "constants": {name: {"value": value, "low": value / 2, "high": value * 2, **known}
                      for name, value in values.items()},
        "efficiencies": {recipe: {"eff_N": sure, "eff_D": {"value": 1.0, "low": 1.0, "high": 1.0}}
                         for recipe in recipes[1:]},
        "fit": {"points": 12, "objective": 1.5e-4, "rmse_of_constants": 0.01}, "warnings": [],
    }  # fmt: skip
    law["points"] = [
        {"recipe": recipe, "seed": 0, "N": N, "D": N * ratio, "loss": loss + 0.01, "predicted": loss, "residual": 0.01,
         "held_out": False}
        for recipe in recipes for N in (1e6, 4e6, 16e6) for ratio in (20, 80)
        for loss in [float(predicted(law, recipe, np.array([N]), np.array([N * ratio]))[0])]
    ]  # fmt: skip
    return law


def law_section(report: Path, tmp_path: Path, law: Law) -> str:
    """What the page of one run says of a law."""
    (tmp_path / "law.json").write_text(json.dumps(law))
    runs = report.with_name("runs") / "bf16-100000-50-0.002-0"
    write_report([runs], tmp_path / "page.html", [tmp_path / "law.json"], "bf16", COMMAND)
    return (tmp_path / "page.html").read_text().split('<section id="law">')[1]


def test_a_law_is_shown_with_its_constants_figures_and_warnings(report: Path, tmp_path: Path) -> None:
    law = law_of(["bf16", "quartet"])
    law["constants"]["gamma"] |= {"identified": False}
    law["warnings"] = ["gamma: N spans a factor of 4 <only>"]
    section = law_section(report, tmp_path, law)
    rows = [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", section)]
    assert ["alpha", "0.4", "0.2", "0.8", "yes"] in rows and ["gamma", "1", "0.5", "2", "no"] in rows
    assert ["quartet", "0.64", "0.6", "0.7", "1", "1", "1"] in rows
    assert "N spans a factor of 4 &lt;only&gt;" in section and "objective 0.00015" in section
    assert f"<code>{law['command']}</code></figcaption>" in section
    assert '<figure id="law-residuals" class="wide"><div class="scroll"' in section, "7.6 inches"
    assert (tmp_path / "page" / "law-residuals.pdf").exists()


def test_recipes_without_a_panel_of_their_own_are_named(report: Path, tmp_path: Path) -> None:
    section = law_section(report, tmp_path, law_of(["bf16", *"abcdefg"]))
    captions = dict(re.findall(r'<figure id="law-([^"]+)".*?<figcaption>([^<]*)<', section))
    for name in ("loss-by-tokens", "loss-by-parameters"):
        assert captions[name].endswith(" Not shown: f, g."), captions[name]
    assert not any("Not shown" in captions[name] for name in ("residuals", "isoflop", "efficiencies"))


def test_curves_of_equal_operations_say_which_operations(report: Path, tmp_path: Path) -> None:
    """Those of the runs have the head and attention too."""
    section = law_section(report, tmp_path, law_of(["bf16"]))
    (caption,) = re.findall(r'<figure id="law-isoflop".*?<figcaption>([^<]*)<', section)
    assert "at equal 6 N D (non-embedding; not the FLOPs of the runs above), by the law" in caption
    (legend,) = law_figures(law_of(["bf16"]))["isoflop"].legends
    assert legend.get_texts()[0].get_text() == "6 N D = 1.2e+14"


def test_a_minimum_at_the_end_of_the_curve_is_not_called_the_least() -> None:
    """Without a term of N every curve falls to its right end, without one of D to its left."""
    for name in ("A", "B"):
        law = law_of(["bf16"])
        law["constants"][name]["value"] = 1e-9
        labels = [line.get_label() for line in law_figures(law)["isoflop"].axes[0].lines]
        assert "least loss" not in labels and "beyond the runs" in labels


def test_runs_of_one_budget_are_one_curve() -> None:
    law = law_of(["bf16"])
    for point in law["points"]:
        point["D"] = 1e15 / point["N"] * (1 + point["D"] / point["N"] / 1e6)  # whole batches: never quite equal
    (legend,) = law_figures(law)["isoflop"].legends
    assert [text.get_text() for text in legend.get_texts()] == ["6 N D = 6e+15", "least loss", "beyond the runs"]


def test_an_efficiency_without_draws_is_a_dot_without_an_interval() -> None:
    law = law_of(["bf16", "quartet"])
    law["efficiencies"]["quartet"]["eff_N"] = {"value": 0.64, "low": None, "high": None}
    left, right = law_figures(law)["efficiencies"].axes
    (dot,) = [line for line in left.lines if line.get_marker() == "o"]
    (held,) = [line for line in right.lines if line.get_marker() == "o"]
    assert dot.get_markerfacecolor() == dot.get_color() and held.get_markerfacecolor() == "white"
    assert "held" not in left.get_xlabel() and "no line: no interval" in left.get_xlabel()
    assert "hollow: held" in right.get_xlabel() and "no line" not in right.get_xlabel()


def test_the_map_reads_without_colours() -> None:
    """Every region has its recipe's number in it, and an edge; ten recipes have more than the palette's colours."""
    recipes = [f"r{number}" for number in range(11)]
    best = np.repeat(np.arange(10), 4)[:, None].repeat(40, axis=1)  # the eleventh is nowhere
    best[:4, :10] = 2  # a second region of it
    grid = np.geomspace(1, 1e6, 40)
    found = {"best": best.tolist(), "recipes": recipes, "share": None, "N": grid.tolist(), "D_per_N": grid.tolist(),
             "observed": {"N": [1, 10], "D_per_N": [1, 10]}, "speed_model": "none"}  # fmt: skip
    figure = law_figures(law_of(["bf16"]) | {"map": found})["precision_map"]
    (axes,) = figure.axes
    marked = []
    for text in axes.texts:
        column, row = (int(np.abs(np.log(grid / at)).argmin()) for at in text.get_position())
        assert text.get_text() == str(best[row, column] + 1)
        (outline,) = text.get_path_effects()
        assert isinstance(outline, withStroke)
        marked.append((text.get_text(), column < 10 and row < 4))
    assert sorted(marked) == sorted([*((str(number), False) for number in range(1, 11)), ("3", True)])
    drawn = {tuple(map(tuple, segment)) for lines in axes.collections[1:] for segment in lines.get_segments()}
    between = (grid[3] + grid[4]) / 2
    assert ((grid[20] + grid[19]) / 2, between) in {end for segment in drawn for end in segment}, (
        "between the first two"
    )
    assert len(drawn) == 9 * 40 + 4, "nine borders of 40 cells, and one of 4 beside the second region"
    (legend,) = figure.legends
    told = [text.get_text() for text in legend.get_texts()]
    assert told[:11] == [f"{number}  r{number - 1}" for number in range(1, 11)] + ["11  r10 (nowhere)"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read"),
        ('{"law": "quartet"}', "lacks baseline, constants, efficiencies, fit, points, command; it is no law.json"),
        ("[]", "lacks law"),
    ],
)
def test_a_file_that_is_no_law_is_named(report: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "law.json").write_text(text)
    with pytest.raises(UserError, match=message):
        write_report([report.with_name("runs")], tmp_path / "page.html", [tmp_path / "law.json"], "bf16", COMMAND)


def test_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for name in ("quest", "bf16"):
        write_run(tmp_path / "runs", name, status="running")
    runs, out, unreadable = (str(tmp_path / name) for name in ("runs", "my report.html", "unreadable"))
    metrics = write_run(Path(unreadable), "bf16") / "metrics.jsonl"
    metrics.unlink()
    metrics.mkdir()
    monkeypatch.setattr(sys, "argv", ["../scripts/report.py", runs, "--out", out])
    assert start("report") == 0
    told = capsys.readouterr()
    assert out in told.out and told.err.count("problem: ") == 2
    command = f"python ../scripts/report.py {runs} --out &#x27;{out}&#x27;"
    assert "<title>qtrain: 2 runs</title>" in Path(out).read_text()
    assert command in Path(out).read_text(), "as it was started, a line for the shell"
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.p*") if "my report" in str(path)}
    monkeypatch.setattr(sys, "argv", ["../scripts/report.py", runs, "--out", out, "--figure", "loss-flops"])
    assert start("report") == 0
    made = {path.name for path, when in written.items() if path.stat().st_mtime_ns != when}
    assert made == {"loss-flops.pdf", "loss-flops.png"}, "what stands under a figure makes that figure"
    assert "loss-flops.pdf" in capsys.readouterr().out
    for arguments, message in (
        ([runs, "--out", "a.txt"], "ends in .html"),
        ([runs, "--out", out, "--figure", "loss"], "no such figure; there are: loss-training, .*loss-flops"),
        ([runs, "--out", out, "--baseline", "foo"], r"--baseline foo: no run has this name .*; there are: bf16, quest"),
        ([runs, "--out", f"{out}/a.html"], r"cannot write .*my report.html.*Not a directory; give another --out"),
        ([unreadable, "--out", out], r"cannot read .*metrics.jsonl: Is a directory; mend it, or leave it out"),
    ):
        monkeypatch.setattr(sys, "argv", ["scripts/report.py", *arguments])
        assert start("report") == 2 and re.search(message, capsys.readouterr().err)


def test_the_law_of_the_same_runs_stands_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From run directories by scripts/fit_scaling_law.py to law.json, and from that to the page."""
    runs = tmp_path / "runs"
    for parameters in (100_000, 200_000, 400_000, 800_000):
        for steps in (50, 100, 200, 400):
            write_run(runs, "bf16", parameters=parameters, steps=steps)
            write_run(runs, "quest", parameters=parameters, steps=steps)
    script = SCRIPT.with_name("fit_scaling_law.py")
    arguments = [runs, "--law", "chinchilla", "--draws", "20", "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(script), run_name="__main__")
    law = json.loads((tmp_path / "law.json").read_text())
    assert law["constants"]["alpha"]["value"] == pytest.approx(0.3, rel=0.05)  # of the law that write_run follows
    assert law["constants"]["E"]["value"] == pytest.approx(1.5, rel=0.05)
    write_report([runs], tmp_path / "page.html", [tmp_path / "law.json"], "bf16", COMMAND)
    section = (tmp_path / "page.html").read_text().split('<section id="law">')[1]
    for figure in ("loss-by-tokens", "loss-by-parameters", "residuals", "isoflop", "efficiencies"):
        assert f'id="law-{figure}"' in section and (tmp_path / "page" / f"law-{figure}.pdf").exists()
    assert law["command"] in unescape(section)


# ----------------------------------------------------------------------------------------------- names and numbers


def texts(figure: Figure) -> list[str]:
    """All that a figure says, once it is drawn."""
    figure.draw_without_rendering()
    return [text.get_text() for text in figure.findobj(Text) if isinstance(text, Text) and text.get_visible()]


def test_a_recipe_may_have_any_name(tmp_path: Path) -> None:
    r"""4$\x$ is no mathematics."""
    name = r"4$\x$"
    for seed, recipe in enumerate(("bf16", name)):
        write_run(tmp_path / "runs", recipe, folder=str(seed), telemetry=True)
    (tmp_path / "law.json").write_text(json.dumps(law_of(["bf16", name])))
    write_report([tmp_path / "runs"], tmp_path / "page.html", [tmp_path / "law.json"], "bf16", COMMAND)
    assert (tmp_path / "page" / "gaps-1.png").exists()
    for title, figure in law_figures(law_of(["bf16", name])).items():
        assert title == "isoflop" or any(name in text for text in texts(figure)), "outside a page too"


def test_numbers_of_logarithmic_axes_are_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """matplotlib's own are mathematics, which the page's text is not."""
    for seed, factor in enumerate((1, 4, 30)):
        directory = write_run(tmp_path / "runs", "quartet", seed, telemetry=True)
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            skewed = {key: value * 10 ** (4 * ("mlp" in key)) for key, value in line.items() if "kurtosis" in key}
            fast = {"tokens_per_second": line["tokens_per_second"] * factor} if "loss" in line else {}
            line |= skewed | fast | ({"memory_bytes": factor * 2**30} if "loss" in line else {})
        (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        summary = json.loads((directory / "summary.json").read_text())
        (directory / "summary.json").write_text(json.dumps(summary | {"tokens_per_second": 500 * factor}))
    drawn: dict[str, list[str]] = {}
    savefig = Figure.savefig

    def listen(figure: Figure, file: Any, **options: Any) -> None:
        savefig(figure, file, **options)
        if isinstance(file, Path):
            drawn[file.stem] = texts(figure)

    monkeypatch.setattr(Figure, "savefig", listen)
    write_report([tmp_path / "runs"], tmp_path / "page.html", [], "bf16", COMMAND)
    assert not [(name, text) for name, found in drawn.items() for text in found if "$" in text]
    assert "10000" in drawn["health-1-quartet-last"] and "10" in drawn["memory"]


def test_runs_of_another_program_in_a_wandb_project_are_left_out() -> None:
    """They may have a summary entry of the name that ours stands under."""
    pytest.importorskip("wandb")
    ours = {"status": "finished", "seed": 1}
    runs = [
        types.SimpleNamespace(id=name, config={}, summary_metrics={"run": entry}, scan_history=lambda: iter(()))
        for name, entry in (("other", 3), ("third", {"seed": 1}), ("ours", ours))
    ]
    api = types.SimpleNamespace(runs=lambda project: runs)
    assert {run.id: run.summary for run in project_runs("team/qtrain", api)} == {
        "other": {}, "third": {}, "ours": ours,
    }  # fmt: skip
