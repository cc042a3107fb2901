"""Sharpness against a search by scipy, learning-rate sensitivity against arithmetic by hand, and the script."""

from __future__ import annotations

import json
import math
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from report_runs import write_run
from scipy.optimize import minimize

from qtrain.errors import UserError
from qtrain.studies.stability import learning_rates, losses_at_and_around, sharpness, sharpness_of
from qtrain.train import main as train

EPSILON = 0.05
SCRIPT = Path(__file__).parents[1] / "scripts" / "stability.py"


def searched(logits: np.ndarray, target: int) -> float:
    """The largest loss in the box, by L-BFGS-B from several places in it."""
    reach = EPSILON * (np.abs(logits) + 1)

    def falling(y: np.ndarray) -> float:
        z = logits + y
        return float(z[target] - np.logaddexp.reduce(z))

    draw = np.random.default_rng(0)
    starts = (draw.uniform(-reach, reach) for _ in range(5))
    return max(
        -minimize(falling, y, method="L-BFGS-B", bounds=list(zip(-reach, reach, strict=True))).fun for y in starts
    )


def test_worst_loss_is_that_of_a_search() -> None:
    logits = torch.randn(8, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    targets = torch.arange(8)
    losses, worst = losses_at_and_around(logits, targets, EPSILON)
    found = [searched(row.numpy(), int(target)) for row, target in zip(logits, targets, strict=True)]
    assert worst.numpy() == pytest.approx(np.array(found), rel=1e-6)
    assert sharpness(losses, worst) == pytest.approx(
        100 * (np.mean(found) - losses.mean().item()) / (1 + losses.mean().item()), rel=1e-6
    )


def test_learning_rates(tmp_path: Path) -> None:
    """Losses 2, 3, and a divergence from 5: by hand (0 + 1 + 3) / 3; for the other seed (0 + 2 + 4) / 3."""
    steps = 10
    for seed, losses in ((0, (2.0, 3.0)), (1, (1.0, 3.0))):
        for lr, loss in zip((1e-3, 1e-2), losses, strict=True):
            write_run(tmp_path, "quartet", seed, steps=steps, lr=lr, loss=loss)
        broken = write_run(tmp_path, "quartet", seed, steps=steps, lr=1e-1, loss=0.0, status="diverged")
        first = json.loads((broken / "metrics.jsonl").read_text().splitlines()[0])
        (broken / "metrics.jsonl").write_text(json.dumps(first | {"loss": 5.0}) + "\n")
    write_run(tmp_path, "bf16", steps=steps)  # one learning rate says nothing
    write_run(tmp_path, "quartet", 2, steps=steps, status="running")
    (found,) = learning_rates(path for path in tmp_path.iterdir())
    assert (found.name, found.runs, found.rates, found.best) == ("quartet", 6, (1e-3, 1e-2, 1e-1), 1e-3)
    assert found.sensitivity == pytest.approx((4 / 3 + 6 / 3) / 2)
    assert found.half_width == pytest.approx(12.706205 * (2 / 3) / math.sqrt(2) / math.sqrt(2), rel=1e-6)
    assert found.diverged == pytest.approx(1 / 3)
    # Wilson's interval of 2 of 6, by its formula.
    z, n, p = 1.959964, 6, 1 / 3
    centre, half = (
        (p + z * z / 2 / n) / (1 + z * z / n),
        z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + (z / 2 / n) ** 2),
    )
    assert found.diverged_interval == pytest.approx((centre - half, centre + half), rel=1e-5)


def test_seeds_of_other_learning_rates_are_refused(tmp_path: Path) -> None:
    for seed, lr in ((0, 1e-3), (0, 1e-2), (1, 1e-3)):
        write_run(tmp_path, "quartet", seed, steps=10, lr=lr)
    with pytest.raises(UserError, match=r"quartet: seed 1 has no run with optimizer.lr=0.01"):
        learning_rates(path for path in tmp_path.iterdir())


def test_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A real run: the sharpness of its checkpoints, oldest first."""
    (tmp_path / "a.txt").write_text("the cat sat on the mat. " * 400)
    settings = (
        "recipe=quartet model.dim=64 model.ffn_dim=64 model.n_layers=1 model.n_heads=2 model.seq_len=32 "
        "trainer.tokens=1024 trainer.batch_tokens=256 trainer.micro_batch_size=8 trainer.precision=32-true "
        f"data=text data.files={tmp_path}/a.txt data.cache_dir={tmp_path}/cache data.val_tokens=256 "
        "callbacks.checkpoint_every_steps=2 callbacks.progress_bar=false trainer.device=cpu "
        f"run_dir={tmp_path}/run"
    )
    monkeypatch.setattr(sys, "argv", ["train.py", *settings.split()])
    train()
    rows = sharpness_of(tmp_path / "run", 1e-3, 8)
    assert [row.step for row in rows] == [2, 4]
    assert all(0 < row.low <= row.value <= row.high < 1 for row in rows)
    monkeypatch.setattr(sys, "argv", ["stability.py", str(tmp_path / "run"), "--json", str(tmp_path / "out.json")])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    shown = capsys.readouterr().out
    assert "No recipe here was trained with several learning rates." in shown
    assert re.search(rf"\| quartet \| 0.002 \| 0 \| 4 \| .* \| {tmp_path}/run \|", shown)
    assert json.loads((tmp_path / "out.json").read_text())["sharpness"][str(tmp_path / "run")][0]["step"] == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "there is no run in nowhere"),
        (["nowhere", "--epsilon", "0"], "--epsilon 0 moves no logit"),
        (["nowhere", "--sequences", "0"], "at least one is needed"),
        (["nowhere", "--json", "/no/such/file.json"], "there is no folder /no/such; make it"),
    ],
)
def test_mistakes(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["stability.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
