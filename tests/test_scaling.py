"""Laws, their fit, and their intervals: on points drawn from laws that are known."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from qtrain.errors import UserError
from qtrain.scaling.fit import huber
from qtrain.scaling.laws import BOUNDS, CONSTANTS, LAWS, constants_of, law_named, log_loss, theta_of
from qtrain.scaling.results import law_json
from qtrain.scaling.runs import Run, held_out
from qtrain.scaling.speed import SpeedModel, predict, read_speeds, speed_map
from qtrain.scaling.study import design_of, fit_law

SIZES = (3e7, 5e7, 1e8, 2e8, 4e8)
RATIOS = (25, 50, 100, 200, 400)
TRUE = {
    "quartet": {"A": 1.52e5, "alpha": 0.589, "B": 5.25e5, "beta": 0.544, "E": 1.35, "gamma": 0.274},
    "chinchilla": {"A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28, "E": 1.69, "gamma": 1.0},
    "kaplan": {"A": 3.5e9, "alpha": 1.07, "B": 6.4e10, "beta": 1.0, "E": 1.37, "gamma": 0.15},
    "quest": {"A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28, "E": 1.69, "gamma": 1.0},
}
EFFICIENCIES = {"half": (0.5, 0.8), "tiny": (0.05, 0.2)}
FLOATING = {
    "A": 69.2343, "alpha": 0.2368, "B": 68973.0621, "beta": 0.5162, "E": 1.9061, "gamma": 1.0,
    "G": 11334.5197, "delta": 3.1926, "nu": 2.9543,
}  # fmt: skip


def loss(c, N, D, eff_N=1.0, eff_D=1.0):
    """Written out once more, from the papers."""
    return (c["A"] / (N * eff_N) ** c["alpha"] + c["B"] / (D * eff_D) ** c["beta"]) ** c["gamma"] + c["E"]


def runs_from(law, noise=0.0, seed=0, sizes=SIZES, ratios=RATIOS, recipes=EFFICIENCIES):
    random = np.random.default_rng(seed)
    found = []
    for recipe, (eff_N, eff_D) in {"bf16": (1.0, 1.0), **recipes}.items():
        eff_D = eff_D if "eff_D" in LAWS[law].efficiencies else 1.0
        for N, ratio in product(sizes, ratios):
            exact = loss(TRUE[law], N, N * ratio, eff_N, eff_D)
            found.append(Run(recipe, "0", N, N * ratio, exact * np.exp(noise * random.standard_normal())))
    return found


def floating_runs(noise, seed=0):
    c, random, found = FLOATING, np.random.default_rng(seed), []
    for N, D, (e, m), block in product(
        (4e7, 8e7, 1.5e8, 7e8), (1e10, 3e10, 1e11), ((1, 1), (2, 1), (2, 3), (4, 3), (3, 2), (5, 6)), (32, 128, 512)
    ):
        noise_term = D ** c["beta"] / N ** c["alpha"] * np.log2(block)
        noise_term /= c["G"] * (e + 0.5) ** c["delta"] * (m + 0.5) ** c["nu"]
        exact = c["A"] / N ** c["alpha"] + c["B"] / D ** c["beta"] + c["E"] + noise_term
        value = exact * np.exp(noise * random.standard_normal())
        found.append(Run(f"e{e}m{m}/{block}", "0", N, D, value, precision=(e, m, block)))
    return found


@pytest.mark.parametrize("law", TRUE)
def test_the_formula_is_that_of_the_paper(law):
    """Through theta and back, at every point, and the constants come back as they went in."""
    runs = runs_from(law)
    design, names = design_of(runs, LAWS[law], "bf16")
    theta = np.zeros(design.width)
    theta[: len(CONSTANTS)] = theta_of(TRUE[law], design.centre)
    for name in names[len(CONSTANTS) :]:
        recipe, which = name.split(".")
        theta[names.index(name)] = np.log(EFFICIENCIES[recipe][which == "eff_D"])
    assert np.exp(log_loss(theta[None], design)[0][0]) == pytest.approx([run.loss for run in runs], rel=1e-12)
    back = dict(zip(CONSTANTS, constants_of(theta[None], design.centre)[0], strict=True))
    assert {name: back[name] for name in TRUE[law]} == pytest.approx(TRUE[law], rel=1e-12)


def test_the_floating_point_formula_is_that_of_the_paper():
    runs = floating_runs(0.0)
    design, _ = design_of(runs, LAWS["floating_point"], "bf16")
    theta = theta_of(FLOATING, design.centre)[None]
    assert np.exp(log_loss(theta, design)[0][0]) == pytest.approx([run.loss for run in runs], rel=1e-12)
    assert constants_of(theta, design.centre)[0] == pytest.approx([FLOATING[name] for name in CONSTANTS], rel=1e-9)


@pytest.mark.parametrize("law", LAWS)
def test_the_jacobian_is_the_slope(law):
    runs = floating_runs(0.01) if law == "floating_point" else runs_from(law, noise=0.01)
    design, _ = design_of(runs, LAWS[law], "bf16")
    random = np.random.default_rng(1)
    centre = np.concatenate((theta_of(TRUE.get(law, FLOATING), design.centre), -np.ones(design.width - len(CONSTANTS))))
    theta = centre + 0.1 * random.standard_normal((3, design.width))
    jacobian = log_loss(theta, design)[1]
    step = 1e-6
    for index in range(design.width):
        moved = np.zeros(design.width)
        moved[index] = step
        slope = (log_loss(theta + moved, design)[0] - log_loss(theta - moved, design)[0]) / (2 * step)
        assert jacobian[:, :, index] == pytest.approx(slope, rel=1e-5, abs=1e-8), index


def test_huber_is_a_parabola_with_straight_arms():
    assert huber(np.array([[0.0, 0.1, -0.1], [0.2, -3.0, 0.0]]), 0.1) == pytest.approx([0.01, 0.1 * 0.15 + 0.1 * 2.95])


@pytest.mark.parametrize("law", TRUE)
def test_a_known_law_comes_back_exactly_without_noise(law):
    """From starts that know nothing of it."""
    fit = fit_law(runs_from(law), LAWS[law], draws=0)
    found = dict(zip(CONSTANTS, fit.constants()[0], strict=True))
    assert {name: found[name] for name in TRUE[law]} == pytest.approx(TRUE[law], rel=1e-3)
    for recipe, (eff_N, eff_D) in EFFICIENCIES.items():
        assert fit.efficiency(recipe, "eff_N")[0] == pytest.approx(eff_N, rel=1e-4)
        if law != "quest":
            assert fit.efficiency(recipe, "eff_D")[0] == pytest.approx(eff_D, rel=1e-4)


@pytest.mark.parametrize("law", TRUE)
def test_a_known_law_comes_back_from_noise(law):
    """Within its own intervals, widened by half; and what it predicts far from any run is right."""
    fit = fit_law(runs_from(law, noise=0.002), LAWS[law], draws=200)
    found = law_json(fit)
    estimates = {name: (found["constants"][name], TRUE[law][name]) for name in LAWS[law].free(LAWS[law].fixed)}
    for recipe, truth in EFFICIENCIES.items():
        for which, estimate in found["efficiencies"][recipe].items():
            estimates[f"{recipe}.{which}"] = (estimate, truth[which == "eff_D"])
    for name, (estimate, truth) in estimates.items():
        low, high = np.log(estimate["low"]), np.log(estimate["high"])
        margin = 0.5 * (high - low)
        assert low - margin < np.log(truth) < high + margin, name
        assert estimate["low"] < estimate["value"] < estimate["high"], name
    far_N, far_D = np.array([2e9]), np.array([1e11])
    assert predict(fit, fit.theta[None], "bf16", far_N, far_D)[0] == pytest.approx(loss(TRUE[law], far_N, far_D), 0.01)


def test_the_floating_point_law_comes_back_from_noise():
    fit = fit_law(floating_runs(0.0005), LAWS["floating_point"], draws=100)
    found = law_json(fit)
    for name in LAWS["floating_point"].free({"gamma": 1.0}):
        constant = found["constants"][name]
        low, high = np.log(constant["low"]), np.log(constant["high"])
        assert low - 0.5 * (high - low) < np.log(FLOATING[name]) < high + 0.5 * (high - low), name
    assert found["constants"]["delta"]["value"] == pytest.approx(FLOATING["delta"], rel=0.1)
    assert found["constants"]["nu"]["value"] == pytest.approx(FLOATING["nu"], rel=0.1)
    assert found["fit"]["rmse"] < 0.002 and found["efficiencies"] == {}


def test_intervals_cover_at_their_rate():
    """40 noisy draws of one law: a 95% interval misses 2 of them on average, and more than 8 with probability 3e-4; one
    that is half as wide misses 13."""
    names, missed, trials = ("alpha", "beta", "E", "half.eff_N", "half.eff_D"), {}, 40
    for seed in range(trials):
        runs = runs_from("chinchilla", 0.003, 100 + seed, recipes={"half": EFFICIENCIES["half"]})
        found = law_json(fit_law(runs, LAWS["chinchilla"], draws=60))
        truths = {**TRUE["chinchilla"], "half.eff_N": 0.5, "half.eff_D": 0.8}
        estimates = {**found["constants"], **{f"half.{k}": v for k, v in found["efficiencies"]["half"].items()}}
        for name in names:
            estimate = estimates[name]
            missed[name] = missed.get(name, 0) + (not estimate["low"] <= truths[name] <= estimate["high"])
    assert max(missed.values()) <= 8, missed
    assert sum(missed.values()) >= 2, f"intervals are far too wide: {missed}"


def test_forward_and_backward_share_efficiencies():
    """eff_N of a forward pass is one number, wherever that pass is used; eff_D likewise."""
    passes = {"f": (0.6, 1.0), "b": (1.0, 0.7), "f+b": (0.6, 0.7)}
    runs = [
        replace(
            run, forward="f" if "f" in run.recipe[:1] else "bf16", backward="b" if "b" in run.recipe[-1:] else "bf16"
        )
        for run in runs_from("quartet", recipes=passes)
    ]
    runs = [replace(run, forward="bf16", backward="bf16") if run.recipe == "bf16" else run for run in runs]
    fit = fit_law(runs, LAWS["quartet"], draws=20)
    assert fit.names[len(CONSTANTS) :] == ["f.eff_N", "b.eff_D"]
    assert fit.efficiency("f+b", "eff_N")[0] == pytest.approx(0.6, rel=1e-4) == fit.efficiency("f", "eff_N")[0]
    assert fit.efficiency("f+b", "eff_D")[0] == pytest.approx(0.7, rel=1e-4)
    assert law_json(fit)["efficiencies"]["f"]["eff_D"] == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_held_constants_stay():
    fit = fit_law(runs_from("quartet", 0.003), LAWS["quartet"], draws=10, fixed={"gamma": 0.3, "half.eff_D": 0.9})
    assert fit.constants()[0][CONSTANTS.index("gamma")] == pytest.approx(0.3, rel=1e-12)
    assert fit.efficiency("half", "eff_D")[0] == pytest.approx(0.9, rel=1e-12)
    whole = fit_law(runs_from("quartet"), LAWS["quartet"], draws=5, fixed=TRUE["quartet"])
    assert whole.constants()[0][:6] == pytest.approx(list(TRUE["quartet"].values()), rel=1e-9)
    assert whole.efficiency("tiny", "eff_N")[0] == pytest.approx(0.05, rel=1e-6)
    no_floor = fit_law(runs_from("quartet", 0.003), LAWS["kaplan"], draws=5, fixed={"E": 0.0})
    assert no_floor.constants()[0][CONSTANTS.index("E")] == 0.0 and np.all(np.isfinite(no_floor.predicted))
    with pytest.raises(UserError, match=r"no 'gama' to hold; it has: A, alpha"):
        fit_law(runs_from("quartet"), LAWS["quartet"], fixed={"gama": 1.0})
    with pytest.raises(UserError, match="A can be held only together with alpha, gamma"):
        fit_law(runs_from("quartet"), LAWS["quartet"], fixed={"A": 1.0})


def test_held_out_runs_are_predicted_and_not_fitted():
    runs = runs_from("quartet", 0.001)
    held = held_out(runs, "largest N")
    assert held.sum() == 3 * len(RATIOS)
    found = law_json(fit_law(runs, LAWS["quartet"], held=held, draws=0))
    outside = [point for point in found["points"] if point["held_out"]]
    assert {point["N"] for point in outside} == {max(SIZES)} and len(outside) == 3 * len(RATIOS)
    assert found["fit"]["held_out_rmse"] == pytest.approx(
        np.sqrt(np.mean([(p["loss"] - p["predicted"]) ** 2 for p in outside]))
    )
    wrecked = [replace(run, loss=50.0) if out else run for run, out in zip(runs, held, strict=True)]
    again = law_json(fit_law(wrecked, LAWS["quartet"], held=held, draws=0))
    assert again["constants"] == found["constants"], "a held-out run reached the fit"
    assert any(warning.startswith("held-out runs are missed by") for warning in again["warnings"])


@pytest.mark.parametrize(("rule", "kept"), [
    ("largest D", 1), ("N > 1e8", 2 * len(RATIOS)), ("D/N >= 200", 2 * len(SIZES)), ("D < 1e9", 1), (None, 0),
])  # fmt: skip
def test_rules_of_holding_out(rule, kept):
    assert held_out(runs_from("quartet", recipes={}), rule).sum() == kept


def test_a_rule_that_is_none_is_named():
    with pytest.raises(UserError, match=r"cannot hold out 'smallest N'; say"):
        held_out(runs_from("quartet"), "smallest N")


@pytest.mark.parametrize(("sizes", "ratios", "warning"), [
    ((3e7, 5e7, 1e8), RATIOS, "N spans a factor of 3.33 in 3 values"),
    (SIZES, (20, 20.5), "N and D grow together (correlation 1.00)"),
])  # fmt: skip
def test_what_the_data_cannot_tell_is_warned_of(sizes, ratios, warning):
    runs = runs_from("quartet", 0.002, sizes=sizes, ratios=ratios, recipes={})
    found = law_json(fit_law(runs, LAWS["quartet"], draws=50))
    assert any(line.startswith(warning) for line in found["warnings"]), found["warnings"]
    unknown = [name for name, constant in found["constants"].items() if not constant["identified"]]
    assert "A" in unknown and all(
        any(line.startswith(f"{name} is not ident") for line in found["warnings"]) for name in unknown
    )


@pytest.mark.parametrize(("law", "sizes", "fixed", "flat"), [
    ("chinchilla", (3e7, 4e8), {}, {"A", "alpha", "E"}),
    ("chinchilla", (3e7, 4e8), {"alpha": 0.34}, set()),
    ("quartet", SIZES, {}, set()),
])  # fmt: skip
def test_what_no_loss_determines_is_not_told_as_known(law, sizes, fixed, flat):
    """Of two sizes the law of N has one number to tell, and three constants: other exponents fit exactly as well."""
    fit = fit_law(runs_from(law, 0.002, sizes=sizes, recipes={}), LAWS[law], draws=50, fixed=fixed)
    found = law_json(fit)
    words = "other values of it, with others of the rest, fit these runs exactly as well"
    assert {name for name in found["constants"] if f"{name} is not identified: {words}" in found["warnings"]} == flat
    for name in flat:
        assert not found["constants"][name]["identified"]
    if flat:
        assert (found["constants"]["alpha"]["low"], found["constants"]["alpha"]["high"]) == BOUNDS["alpha"]
        held = fit_law(runs_from(law, 0.002, sizes=sizes, recipes={}), LAWS[law], draws=0, fixed={"alpha": 0.9})
        assert held.objective == pytest.approx(fit.objective, rel=1e-6), "the words are true"


def test_a_format_that_never_changes_is_not_told_as_known():
    """The exponent's bits never change, and so delta cannot be known."""
    runs = [run for run in floating_runs(0.002) if run.recipe.startswith("e2")]
    found = law_json(fit_law(runs, LAWS["floating_point"], draws=30))
    unknown = {
        line.split(" is not identified: other values")[0] for line in found["warnings"] if "other values" in line
    }
    assert (
        unknown == {"G", "delta"}
        and (found["constants"]["delta"]["low"], found["constants"]["delta"]["high"]) == (BOUNDS["delta"])
    )


def test_a_held_out_recipe_is_predicted_where_its_parts_are_known_and_named_where_not():
    passes = {"f": (0.6, 1.0), "b": (1.0, 0.7), "f+b": (0.6, 0.7)}
    runs = [
        replace(
            run, forward="f" if "f" in run.recipe[:1] else "bf16", backward="b" if run.recipe[-1] == "b" else "bf16"
        )
        if run.recipe != "bf16"
        else replace(run, forward="bf16", backward="bf16")
        for run in runs_from("quartet", recipes=passes)
    ]
    held = np.array([run.recipe == "f+b" for run in runs])
    found = law_json(fit_law(runs, LAWS["quartet"], held=held, draws=0))
    both = [point for point in found["points"] if point["recipe"] == "f+b"]
    assert len(both) == len(SIZES) * len(RATIOS) and max(abs(point["residual"]) for point in both) < 1e-4
    alone = runs_from("quartet")
    held = np.array([run.recipe == "tiny" for run in alone])
    found = law_json(fit_law(alone, LAWS["quartet"], held=held, draws=0))
    assert "tiny: all its runs are held out" in found["warnings"]
    assert not [point for point in found["points"] if point["recipe"] == "tiny"]


def test_a_recipe_that_no_law_fits_excuses_no_miss():
    runs = runs_from("quartet", 0.001)
    held = held_out(runs, "largest N") & np.array([run.recipe == "half" for run in runs])
    missed = [replace(run, loss=run.loss * 1.02) if out else run for run, out in zip(runs, held, strict=True)]
    wild = [
        replace(run, recipe="wild", loss=run.loss * (2 if i % 2 else 0.7))
        for i, run in enumerate(run for run in runs if run.recipe == "tiny")
    ]
    held = np.concatenate((held, np.zeros(len(wild), dtype=bool)))
    found = law_json(fit_law([*missed, *wild], LAWS["quartet"], held=held, draws=0))
    assert any(warning.startswith("held-out runs are missed by") for warning in found["warnings"])


def test_a_law_with_one_efficiency_gives_it_to_the_recipe_not_to_its_passes():
    recipes = {"sr": (0.7, 1.0)}
    runs = [replace(run, forward="bf16", backward=run.recipe) for run in runs_from("quest", recipes=recipes)]
    found = fit_law(runs, LAWS["quest"], draws=0)
    assert found.efficiency("sr", "eff_N")[0] == pytest.approx(0.7, rel=1e-4)


def test_one_size_is_enough_where_the_law_of_size_is_held():
    runs = [run for run in runs_from("chinchilla", recipes={}) if SIZES[0] == run.N]
    fixed = {name: TRUE["chinchilla"][name] for name in ("A", "alpha", "E")}
    found = law_json(fit_law(runs, LAWS["chinchilla"], draws=20, fixed=fixed))
    assert found["constants"]["beta"]["value"] == pytest.approx(0.28, rel=1e-4)
    assert not [warning for warning in found["warnings"] if warning.startswith("N ")]


def test_a_good_ladder_is_not_warned_of():
    runs = runs_from("chinchilla", 0.0002, sizes=(1e7, 1e8, 1e9, 1e10), ratios=(5, 20, 100, 1000), recipes={})
    found = law_json(fit_law(runs, LAWS["chinchilla"], draws=100))
    assert found["warnings"] == [] and all(constant["identified"] for constant in found["constants"].values())


def test_a_constant_at_its_bound_is_warned_of():
    """A law without an E, fitted by one that has it: E goes to its floor and is not believed."""
    TRUE["no floor"] = {**TRUE["chinchilla"], "A": 8.2, "alpha": 0.063, "B": 90.0, "beta": 0.24, "E": 0.0}
    try:
        exact = [replace(run, loss=loss(TRUE["no floor"], run.N, run.D)) for run in runs_from("chinchilla", recipes={})]
    finally:
        del TRUE["no floor"]
    found = law_json(fit_law(exact, LAWS["chinchilla"], draws=20))
    assert not found["constants"]["E"]["identified"]
    assert any("E is not identified: at its bound in the fit" in warning for warning in found["warnings"])


def test_a_recipe_with_too_few_runs_is_named_and_left_out():
    runs = [run for run in runs_from("quartet", 0.002) if run.recipe != "tiny" or (run.N, run.D) == (3e7, 3e7 * 25)]
    runs += [replace(run, seed=str(seed)) for run in runs if run.recipe == "tiny" for seed in (1, 2)]
    found = law_json(fit_law(runs, LAWS["quartet"], draws=10))
    assert "tiny" not in found["efficiencies"] and "half" in found["efficiencies"]
    assert found["warnings"][0].startswith("tiny: runs at 1 sizes and budgets are too few for its 2 effic")
    assert all(point["recipe"] != "tiny" for point in found["points"])


def test_too_few_runs_or_no_baseline_are_refused():
    runs = runs_from("quartet", recipes={"half": (0.5, 0.8)})
    with pytest.raises(UserError, match=r"no run of the baseline 'fp32' to fit; there are: bf16, half"):
        fit_law(runs, LAWS["quartet"], baseline="fp32")
    few = [run for run in runs if run.N < 6e7 and run.D < 6e9 and run.D / run.N < 120]
    with pytest.raises(UserError, match=r"6 different runs of bf16 are too few for the 6 constants of the law quartet"):
        fit_law(few, LAWS["quartet"])
    with pytest.raises(UserError, match="all runs of bf16 have one N"):
        fit_law([run for run in runs if SIZES[0] == run.N], LAWS["chinchilla"], fixed={"E": 1.69, "beta": 0.28})
    with pytest.raises(UserError, match="needs the columns exponent_bits"):
        fit_law(runs, LAWS["floating_point"])
    with pytest.raises(UserError, match="no run is left to fit"):
        fit_law(runs, LAWS["quartet"], held=np.ones(len(runs), dtype=bool))
    with pytest.raises(UserError, match="no law named 'hoffmann'; there are: quartet, chinchilla"):
        law_named("hoffmann")


def test_equal_compute_weighs_speed_against_loss():
    """By hand: twice the size at the same tokens against the same size; where speed buys nothing the baseline stays."""
    fit = fit_law(runs_from("quartet"), LAWS["quartet"], draws=20)
    found = speed_map(fit, SpeedModel("made up", {"half": (2.0, 2.0), "tiny": (1.1, 1.1)}), cells=7)
    assert found["recipes"] == ["bf16", "half", "tiny"]
    for i, N in enumerate(found["N"]):
        for j, ratio in enumerate(found["D_per_N"]):
            losses = [
                loss(TRUE["quartet"], N, N * ratio),
                loss(TRUE["quartet"], 2 * N, N * ratio, 0.5, 0.8),
                loss(TRUE["quartet"], 1.1 * N, N * ratio, 0.05, 0.2),
            ]
            assert found["best"][i][j] == int(np.argmin(losses))
            assert found["gain"][i][j] == pytest.approx(losses[0] - min(losses), abs=2e-4)
    assert not np.any(found["best"]), "at half efficiency, twice the speed is not enough"
    faster = speed_map(fit, SpeedModel("made up", {"half": (2.0, 4.0)}), cells=5)
    assert faster["best"][0][0] == 1 and faster["speeds"]["half"] == {"forward": 2.0, "training": 4.0}
    with pytest.raises(UserError, match="the speed model has quest; the runs have bf16, half, tiny"):
        speed_map(fit, SpeedModel("made up", {"quest": (2.0, 2.0)}))


def test_speed_models_are_read(tmp_path):
    path = tmp_path / "speeds.json"
    path.write_text(
        '{"source": "s", "speeds": {"a": {"forward": 2.0, "backward": 1.0}, "b": {"forward": 1, "backward": 2}}}'
    )
    model = read_speeds(path)
    assert model.source == "s" and model.speeds == {"a": pytest.approx((2.0, 1.2)), "b": pytest.approx((1.0, 1.5))}
    path.write_text(
        '{"name": "training", "machine": {"device": "H100"}, "rows": [{"recipe": "a", "x time of bf16": 0.5}]}'
    )
    assert read_speeds(path) == SpeedModel("speeds.json: training, H100", {"a": (1.0, 2.0)})
    made_up = (f'{{"source": "s", "speeds": {{"a": {{"forward": {f}, "backward": 1}}}}}}' for f in ("0", "-2", "NaN"))
    for content in ("", "[]", '{"source": "s"}', '{"rows": [{"recipe": "a"}]}', *made_up):
        path.write_text(content)
        with pytest.raises(UserError, match=r"speeds\.json is no speed model"):
            read_speeds(path)
