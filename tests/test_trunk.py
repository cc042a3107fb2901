"""Runs of one wsd schedule share the steps before the decay, and each ends as if it had run alone, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_corpus
from run_state import last_tensors, last_values

from qtrain.config import Config, config_hash
from qtrain.errors import UserError
from qtrain.plan import make_plan
from qtrain.runs.directory import RunDirectory
from qtrain.runs.table import read_csv
from qtrain.train import compose
from qtrain.training.session import run
from qtrain.training.trunk import common_steps, trunk_key

TIMINGS = {"tokens_per_second", "data_wait", "memory_bytes"}
BATCH = 128
SMALL = [
    "scheduler=wsd",
    "scheduler.warmup_steps=4",
    "backend=auto",
    "model.dim=64",
    "model.ffn_dim=96",
    "model.n_layers=1",
    "model.seq_len=32",
    f"trainer.batch_tokens={BATCH}",
    "trainer.micro_batch_size=2",
    "callbacks.log_every_steps=1",
    "callbacks.val_every_steps=7",
    "callbacks.progress_bar=false",
    "data=text",
    "data.val_tokens=256",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), ["low", "precision", "training", "needs", "care", "\n"], 40)


def settings(corpus: Path, root: Path, steps: int, *more: str) -> Config:
    paths = [f"data.files={corpus}/*.txt", f"data.cache_dir={corpus}/cache", f"run_root={root}"]
    return compose([*SMALL, *paths, f"trainer.tokens={steps * BATCH}", *more])


def metrics(config: Config) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in RunDirectory.of(config).metrics.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


@pytest.mark.parametrize("recipe", ["quartet_v1", "lsq"])
def test_a_branch_ends_as_a_run_of_its_own(corpus: Path, tmp_path: Path, recipe: str) -> None:
    alone = settings(corpus, tmp_path / "alone", 40, f"recipe={recipe}")
    short = settings(corpus, tmp_path / "shared", 20, f"recipe={recipe}", "trainer.share_trunk=true")
    long = settings(corpus, tmp_path / "shared", 40, f"recipe={recipe}", "trainer.share_trunk=true")
    for config in (alone, short, long):
        run(config)
    assert config_hash(alone) == config_hash(long)
    assert RunDirectory.of(short).summary["shared_steps"] == 0
    assert RunDirectory.of(long).summary["shared_steps"] == 15  # of 20: a fifth decays, the step before has its rate
    ours, theirs = (last_tensors(RunDirectory.of(config).path) for config in (long, alone))
    assert ours.keys() == theirs.keys() and any(name.startswith("optimizer.") for name in ours)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    assert metrics(long) == metrics(alone)


def test_a_trunk_ends_where_the_learning_rate_begins_to_know_the_budget() -> None:
    for steps, warmup in ((20, 4), (41, 4), (100, 4), (20, 20), (20, 19), (1, 0), (2, 1)):
        base = [*SMALL, "data.files=x", f"scheduler.warmup_steps={warmup}"]
        config = compose([*base, f"trainer.tokens={steps * BATCH}"])
        plan, longer = make_plan(config), make_plan(compose([*base, "trainer.tokens=1_000_000"]))
        common = common_steps(config, plan)
        here = [config.scheduler.factor(step, plan.steps) for step in range(plan.steps)]
        there = [config.scheduler.factor(step, longer.steps) for step in range(plan.steps)]
        assert common == 0 or here[: common + 1] == there[: common + 1]
        assert common == max(0, steps - 2) or here[common + 1] != there[common + 1]


def test_a_late_switch_ends_the_trunk() -> None:
    config = compose([*SMALL, "data.files=x", f"trainer.tokens={100 * BATCH}", "recipe=nvidia_nvfp4"])
    late = config.model_copy(update={"recipe": config.recipe.model_copy(update={"high_precision_after": 0.5})})
    plan = make_plan(config)
    assert common_steps(config, plan) == 79 and common_steps(late, plan) == 50
    assert trunk_key(config, plan, "data") == trunk_key(late, plan, "data")


@pytest.mark.parametrize(
    "change",
    [
        "seed=1",
        "recipe=quest",
        "optimizer.lr=1e-3",
        "scheduler.warmup_steps=5",
        "model.n_layers=3",
        "data.max_tokens=9",
        "data.val_tokens=512",
    ],
)
def test_what_changes_the_trunk_has_another_key(change: str) -> None:
    base = [*SMALL, "data.files=x", f"trainer.tokens={100 * BATCH}"]
    config, other = compose(base), compose([*base, change])
    longer = compose([*base, f"trainer.tokens={200 * BATCH}", "scheduler.decay_fraction=0.1"])
    key = trunk_key(config, make_plan(config), "data")
    assert key == trunk_key(longer, make_plan(longer), "data")
    assert key != trunk_key(other, make_plan(other), "data")
    assert key != trunk_key(config, make_plan(config), "other data")


def test_the_order_of_a_recipes_overrides_is_part_of_the_key() -> None:
    """The first match holds."""
    base = [*SMALL, "data.files=x", "recipe=quartet"]
    one = compose([*base, "recipe.overrides={down:quest,*.mlp.*:bf16}"])
    other = compose([*base, "recipe.overrides={*.mlp.*:bf16,down:quest}"])
    assert trunk_key(one, make_plan(one), "data") != trunk_key(other, make_plan(other), "data")


def test_a_trunk_before_the_first_line_of_metrics(corpus: Path, tmp_path: Path) -> None:
    quiet = ["callbacks.log_every_steps=100", "callbacks.val_every_steps=100", "trainer.share_trunk=true"]
    for steps in (10, 20):
        config = settings(corpus, tmp_path, steps, *quiet)
        run(config)
        assert [line["step"] for line in metrics(config)] == [steps, steps]
    assert RunDirectory.of(config).summary["shared_steps"] == 7


def test_a_trunk_of_another_commit_is_used_with_a_warning(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the state it leads to goes on to say of which."""
    for steps, now in ((10, "aaaa"), (20, "bbbb"), (40, "bbbb")):
        monkeypatch.setattr("qtrain.training.checkpoint.commit", lambda now=now: now)
        config = settings(corpus, tmp_path, steps, "trainer.share_trunk=true")
        run(config)
        said = "computed at commit aaaa; the code is now at bbbb" in " ".join(capsys.readouterr().out.split())
        assert said == (steps > 10)
    assert last_values(RunDirectory.of(config).path)["commits"] == ["aaaa", "bbbb"]


def test_a_damaged_trunk_is_not_used_and_replaced(corpus: Path, tmp_path: Path) -> None:
    short = settings(corpus, tmp_path, 20, "trainer.share_trunk=true")
    run(short)
    (left,) = tmp_path.glob("trunks/*/step-*/*-model-00001-*")
    left.write_bytes(left.read_bytes()[:1000])
    long = settings(corpus, tmp_path, 40, "trainer.share_trunk=true")
    run(long)
    assert RunDirectory.of(long).summary["shared_steps"] == 0
    for factor in (0.2, 0.3):  # as short as the first
        again = settings(corpus, tmp_path, 20, "trainer.share_trunk=true", f"scheduler.final_factor={factor}")
        run(again)
    assert RunDirectory.of(again).summary["shared_steps"] == 15


def test_only_wsd_has_a_trunk() -> None:
    with pytest.raises(UserError, match="needs scheduler=wsd"):
        compose(["scheduler=cosine", "trainer.share_trunk=true"])


def test_validations_that_end_a_run_are_at_the_same_steps_of_every_budget() -> None:
    shared = ["scheduler=wsd", "trainer.share_trunk=true", "trainer.early_stop=2"]
    with pytest.raises(UserError, match=r"early_stop=2 counts them.*set callbacks\.val_every_steps"):
        compose(shared)
    config, other = (compose([*shared, f"callbacks.val_every_steps={every}"]) for every in (10, 20))
    assert trunk_key(config, make_plan(config), "data") != trunk_key(other, make_plan(other), "data")


def test_budgets_of_a_stream_share_what_max_tokens_ends() -> None:
    shared = ["data=c4", "scheduler=wsd", "trainer.share_trunk=true"]
    with pytest.raises(UserError, match=r"set data\.max_tokens to the largest one"):
        compose(shared)
    assert compose([*shared, "data.max_tokens=30_000_000"]).trainer.share_trunk


def test_a_results_file_is_continued(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run adds its row once; where the row is, the run is done, its directory there or not."""
    results = tmp_path / "results.csv"
    first = settings(corpus, tmp_path / "here", 4, f"results={results}")
    loss = run(first)
    assert run(first) == loss and len(read_csv(results)) == 1
    elsewhere = settings(corpus, tmp_path / "there", 4, f"results={results}")
    assert run(elsewhere) == loss and not RunDirectory.of(elsewhere).path.exists()
    assert "has this run's row" in capsys.readouterr().out
    run(settings(corpus, tmp_path / "there", 4, f"results={results}", "seed=1"))
    assert [row["seed"] for row in read_csv(results)] == [0, 1]


def test_a_failed_run_says_why_and_waits_to_be_asked_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(corpus, tmp_path, 4)
    with monkeypatch.context() as patched:
        patched.setattr("qtrain.training.causal_lm.next_token_loss", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(config)
    summary = RunDirectory.of(config).summary
    assert (summary["status"], summary["reason"]) == ("failed", "ZeroDivisionError: division by zero")
    assert run(settings(corpus, tmp_path, 4, "retry_failed=false")) is None
    assert "retry_failed=true" in capsys.readouterr().out
    assert run(config) is not None and RunDirectory.of(config).finished
