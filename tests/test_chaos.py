"""The harness of scripts/chaos.py: a short run of it, and that it finds what is wrong."""

from __future__ import annotations

import random

import pytest

from qtrain.studies import chaos
from qtrain.studies.chaos import Chaos, Fault, Round, differences


def sabotage(round: Round, draw: random.Random) -> str:
    """Another loss in a line of the metrics: no later start can know."""
    with round.started() as start:
        start.wait(lambda: start.new_steps() >= 5)
        start.kill_all()
    metrics = round.run_dir / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"loss": ', '"loss": 1', 1))
    return "a digit more"


def deadlock(round: Round, draw: random.Random) -> str:
    """The directory holds something else: no later start goes on."""
    round.run_dir.mkdir()
    (round.run_dir / "thesis.txt").touch()
    return ""


def stop_after_the_third(fault: Fault) -> None:
    if fault.number == 2:
        raise KeyboardInterrupt


def test_a_run_survives_and_what_does_not_is_found(tmp_path, monkeypatch):
    kinds = list(chaos.KINDS)
    with pytest.raises(KeyboardInterrupt):
        Chaos(tmp_path, 5, 1, kinds).run(9, stop_after_the_third)
    harness = Chaos(tmp_path, 5, 1, kinds)
    harness.run(9)  # goes on
    faults = harness.state.faults
    assert [fault.number for fault in faults] == list(range(9)) and {fault.kind for fault in faults} == set(kinds)
    assert harness.survived, harness.table()
    assert not differences(tmp_path / "round-000", tmp_path / "undisturbed")

    for number, kind in ((10, sabotage), (11, deadlock)):
        monkeypatch.setattr(chaos, "KINDS", {kind.__name__: kind})
        harness.state.kinds = [kind.__name__]
        harness.run(number)
    outcomes = {fault.kind: (fault.outcome, fault.said) for fault in harness.state.faults[9:]}
    assert outcomes["sabotage"][0] == "wrong" and "'loss': 1" in outcomes["sabotage"][1]
    assert outcomes["deadlock"][0] == "stuck" and "is not empty and holds no run" in outcomes["deadlock"][1]
    assert not harness.survived


def test_where_faults_strike_is_a_function_of_the_seed(tmp_path):
    orders = [
        [Chaos(tmp_path / str(seed), seed, 1, list("abcd"))._kind(number) for number in range(8)] for seed in (1, 1, 2)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0][:4]) == list("abcd")


@pytest.mark.parametrize("kind", chaos.kinds(2))
def test_each_kind_has_a_name_for_the_command_line(kind):
    assert kind == kind.strip()
