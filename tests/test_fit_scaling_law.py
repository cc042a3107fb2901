"""The command: published losses give the published constants, law.json and figures say what was fitted."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import qtrain.cli.fit
from qtrain.cli import start
from qtrain.report.law_figures import law_figures, predicted

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "experiments" / "published"


@pytest.fixture(scope="module")
def script():
    return qtrain.cli.fit


@pytest.fixture
def command(script, monkeypatch, tmp_path):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fit_scaling_law.py", *map(str, arguments), "--out", str(tmp_path / "law")])
        assert start("fit") == 0
        return json.loads((tmp_path / "law" / "law.json").read_text())

    return run


def values(law):
    return {name: constant["value"] for name, constant in law["constants"].items()}


@pytest.fixture
def law_only(script, monkeypatch):
    """As the command, without figures."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fit_scaling_law.py", *map(str, arguments)])
        return script.fit(script.arguments())

    return run


def test_quartet_published_constants_come_out(law_only):
    """Table 6 of the paper, to every digit that it prints, without the run at 1600 tokens per parameter; the constants
    of the authors' notebook with it. No start knows of either."""
    passes = ("--recipes", "quest_fwd", "sr_bwd", "--draws", 0)
    paper = law_only(PUBLISHED / "quartet.csv", "--hold-out", "D/N > 1500", *passes)
    table6 = {"A": 1.52e5, "alpha": 0.589, "B": 5.25e5, "beta": 0.544, "E": 1.35, "gamma": 0.274}
    for name, printed in table6.items():
        assert float(f"{values(paper)[name]:.3g}") == printed, name
    notebook = law_only(PUBLISHED / "quartet.csv", *passes)
    assert values(notebook) == pytest.approx({
        "A": 127444.685, "alpha": 0.578520, "B": 465834.312, "beta": 0.538877, "E": 1.340846, "gamma": 0.276416,
    }, rel=1e-4)  # fmt: skip
    assert notebook["fit"]["objective"] == pytest.approx(2.12922e-6, rel=1e-5)
    assert notebook["efficiencies"]["quest_fwd"]["eff_N"]["value"] == pytest.approx(0.6451631, rel=1e-4)
    assert notebook["efficiencies"]["sr_bwd"]["eff_D"]["value"] == pytest.approx(0.8934685, rel=1e-4)


def test_quest_published_constants_come_out(law_only):
    """The notebook's Huber delta is so large against its residuals that it fits squares."""
    law = law_only(PUBLISHED / "quest.csv", "--law", "quest", "--huber-delta", 10, "--draws", 0)
    found = values(law)
    assert [found[name] for name in ("A", "alpha", "B", "beta")] == pytest.approx(
        [8.13403, 0.0627265, 86.4119, 0.241288], rel=1e-3
    )
    published = {
        "quest_1bit": 0.0205, "quest_2bit": 0.1519, "quest_3bit": 0.4331, "quest_4bit": 0.6918, "quest_8bit": 1.0162,
        "quest_fp4": 0.6296, "quest_sparse_4bit": 0.3812, "quest_no_hadamard_4bit": 0.6033,
        "quest_weight_only_2bit": 0.4137,
    }  # fmt: skip
    for recipe, efficiency in published.items():
        assert law["efficiencies"][recipe]["eff_N"]["value"] == pytest.approx(efficiency, abs=2e-4), recipe


def test_the_command_writes_all_that_it_found(command, capsys):
    speeds = PUBLISHED / "speed_quartet.json"
    law = command(PUBLISHED / "quartet.csv", "--draws", 50, "--hold-out", "largest N", "--speed", speeds)
    assert set(law) == {
        "law", "formula", "source", "baseline", "constants", "efficiencies", "fit", "points", "warnings", "inputs",
        "command", "commit", "map",
    }  # fmt: skip
    digest = hashlib.sha256((PUBLISHED / "quartet.csv").read_bytes()).hexdigest()
    assert law["inputs"] == [{"path": str(PUBLISHED / "quartet.csv"), "sha256": digest}]
    assert set(law["constants"]["A"]) == {"value", "low", "high", "identified", "fitted"}
    assert set(law["fit"]) >= {"huber_delta", "objective", "points", "starts", "bootstrap_draws", "held_out_rmse"}
    for point in law["points"]:
        redone = predicted(law, point["recipe"], np.array([point["N"]]), np.array([point["D"]]))[0]
        assert redone == pytest.approx(point["predicted"], rel=1e-9), "law.json alone gives its predictions"
        assert point["residual"] == pytest.approx(point["loss"] - point["predicted"])
    (held,) = [point for point in law["points"] if point["held_out"]]
    assert held["N"] == 822151168 and law["fit"]["held_out_rmse"] == pytest.approx(abs(held["residual"]))
    shown = capsys.readouterr().out
    assert f"| alpha | {values(law)['alpha']:.4g} |" in shown and "| quest_fwd | 0.6" in shown
    assert all(f"warning: {warning}" in shown for warning in law["warnings"]) and law["warnings"]


def test_an_interval_without_a_bound_is_explained(script):
    fitted = {"value": 0.5, "low": 0.0, "high": None, "fitted": True, "identified": False}
    fit = {
        "points_of_constants": 9, "points": 9, "huber_delta": 1e-3, "objective": 1e-6, "starts_at_minimum": 1.0,
        "starts": 4, "rmse": 0.01, "held_out_points": 0, "bootstrap_draws": 50,
    }  # fmt: skip
    law = {"law": "x", "formula": "E", "fit": fit, "constants": {"E": fitted}, "efficiencies": {}, "warnings": []}
    shown = script.readable(law)
    assert "0 to ?" in shown and "? means no bound: the fitted runs do not limit the constant on that side" in shown
    assert "? means" not in script.readable(law | {"constants": {"E": fitted | {"high": 2.0}}})


def test_a_folder_of_run_directories_is_fitted_as_its_table_is(law_only, tmp_path):
    rows = [
        {"recipe": recipe, "seed": 0, "val_loss": loss, "tokens": tokens, "non_embedding_parameters": size,
         "data_hash": "d", "name": recipe, "status": "finished"}
        for recipe, factor in (("bf16", 1.0), ("quest", 1.02))
        for size in (1e6, 4e6, 16e6) for tokens in (2e7, 8e7, 32e7)
        for loss in [factor * (1.2 + 300 / size**0.4 + 90 / tokens**0.3)]
    ]  # fmt: skip
    runs = tmp_path / "runs"
    for number, row in enumerate([*rows, rows[0] | {"status": "diverged", "seed": 5}]):
        (runs / f"run-{number}").mkdir(parents=True)
        (runs / f"run-{number}" / "summary.json").write_text(json.dumps(row))
    table = tmp_path / "table.csv"
    table.write_text("\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]) + "\n")
    options = ("--law", "chinchilla", "--draws", 0, "--fix", "quest.eff_D=1")
    folder, csv = law_only(runs, *options), law_only(table, *options)
    assert folder["constants"] == csv["constants"] and folder["efficiencies"] == csv["efficiencies"]
    assert f"{runs}/run-18: not used, its status is diverged" in folder["warnings"]
    assert folder["fit"]["points"] == 18 and folder["efficiencies"]["quest"]["eff_D"]["value"] == 1.0


@pytest.mark.parametrize(("arguments", "message"), [
    (["nowhere"], "error: there is no nowhere; give a folder"),
    (["."], "error: . holds no run: there is nothing to fit"),
    ([PUBLISHED / "quartet.csv", "--baseline", "fp8"], "error: there is no run of the baseline 'fp8'"),
    ([PUBLISHED / "quartet.csv", "--recipes", "quess"], "error: there is no run of quess; there are: bf16, eden"),
    ([PUBLISHED / "quartet.csv", "--fix", "gamma"], "error: --fix gamma: say NAME=VALUE"),
    ([PUBLISHED / "quartet.csv", "--hold-out", "all"], "error: cannot hold out 'all'"),
    ([PUBLISHED / "quartet.csv", "--huber-delta", "0"], "error: --huber-delta is 0; give a positive number"),
    ([PUBLISHED / "quartet.csv", "--huber-delta", "inf"], "error: --huber-delta is inf; give a positive number"),
    ([PUBLISHED / "quartet.csv", "--fix", "gamma=nan"], "error: gamma cannot be nan"),
    ([PUBLISHED / "quartet.csv", "--hold-out", "N > ."], "error: cannot hold out 'N > .'"),
    ([PUBLISHED / "quartet.csv", "--draws", "-1"], "error: --draws is -1"),
    ([PUBLISHED / "quartet.csv", PUBLISHED / "quartet.csv"], "several runs of recipe 'quest_fwd'"),
    ([PUBLISHED / "speed_quartet.json"], "lacks recipe"),
])  # fmt: skip
def test_mistakes_end_the_command_with_one_line(monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["qtrain fit", *map(str, arguments), "--out", str(tmp_path / "law")])
    assert start("fit") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "law").exists()


@pytest.fixture(scope="module")
def figures_and_law(script):
    with pytest.MonkeyPatch.context() as patch:
        speeds = ["--speed", str(PUBLISHED / "speed_quartet.json")]
        arguments = ["fit_scaling_law.py", str(PUBLISHED / "quartet.csv"), "--draws", "40", "--hold-out", "largest N"]
        patch.setattr(sys, "argv", [*arguments, *speeds])
        law = json.loads(json.dumps(script.fit(script.arguments())))
    return law_figures(law), law


def test_every_point_is_drawn_where_it_lies(figures_and_law):
    figures, law = figures_and_law
    panels = figures["loss_by_tokens"].axes
    assert [axes.get_title(loc="left") for axes in panels][:1] == ["bf16"] and len(panels) == 6
    for axes in panels:
        recipe = axes.get_title(loc="left")
        drawn = {
            (float(x), float(y)) for line in axes.lines if line.get_marker() == "o"
            for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
        }  # fmt: skip
        assert drawn == {(point["D"], point["loss"]) for point in law["points"] if point["recipe"] == recipe}
    (hollow,) = [
        line for line in panels[0].lines if line.get_markerfacecolor() == "none" and len(line.get_xdata())
    ]  # fmt: skip
    assert list(hollow.get_ydata()) == [point["loss"] for point in law["points"] if point["held_out"]]


def test_curves_are_the_law(figures_and_law):
    figures, law = figures_and_law
    axes = figures["loss_by_parameters"].axes[0]
    curves = [line for line in axes.lines if line.get_linestyle() == "-" and len(line.get_xdata()) == 60]
    assert curves
    ratios = {round(point["D"] / point["N"], -1) for point in law["points"] if point["recipe"] == "bf16"}
    for line in curves:
        N, losses = np.array(line.get_xdata()), np.array(line.get_ydata())
        c = values(law)
        D = (((losses - c["E"]) ** (1 / c["gamma"]) - c["A"] / N ** c["alpha"]) / c["B"]) ** (-1 / c["beta"])
        ratio = D / N
        assert ratio == pytest.approx(ratio[0], rel=1e-6), "a curve at one number of tokens per parameter"
        assert min(abs(np.log(ratio[0] / one)) for one in ratios) < 0.3


def test_an_unknown_efficiency_does_not_hide_the_known_ones(figures_and_law):
    _, law = figures_and_law
    known, unknown = {"value": 0.9, "low": 0.85, "high": 0.95}, {"value": 0.3, "low": 1e-7, "high": 100.0}
    told = {"quest": {"eff_D": known}, "rtn": {"eff_D": unknown}}
    (axes,) = law_figures({**law, "efficiencies": told})["efficiencies"].axes
    left, right = axes.get_xlim()
    assert axes.get_xscale() == "linear" and left == 0 and 1 < right < 1.2
    (arrow,) = [line for line in axes.lines if line.get_marker() in ("<", ">")]
    assert arrow.get_marker() == ">" and list(np.asarray(arrow.get_xdata())) == [right]
    assert "arrow: goes on" in axes.get_xlabel()


def test_efficiencies_and_the_map_are_those_of_the_law(figures_and_law):
    figures, law = figures_and_law
    left, right = figures["efficiencies"].axes
    names = [label.get_text() for label in left.get_yticklabels()]
    assert sorted(names) == sorted(law["efficiencies"])
    for axes, which in ((left, "eff_N"), (right, "eff_D")):
        dots = {
            names[int(line.get_ydata()[0])]: line.get_xdata()[0] for line in axes.lines if line.get_marker() in "o|"
        }
        assert dots == {recipe: found[which]["value"] for recipe, found in law["efficiencies"].items()}
    mesh = figures["precision_map"].axes[0].collections[0]
    assert np.asarray(mesh.get_array()).reshape(40, 40).tolist() == law["map"]["best"]
    isoflop = figures["isoflop"].axes[0]
    (least,) = [line for line in isoflop.lines if line.get_label() == "least loss"]
    for N, loss in zip(least.get_xdata(), least.get_ydata(), strict=True):
        dotted = [line for line in isoflop.lines if line.get_linestyle() == ":" and loss in line.get_ydata()]
        assert dotted and all(loss == line.get_ydata().min() and N in line.get_xdata() for line in dotted)
