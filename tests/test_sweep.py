"""scripts/sweep.py: what is missing is run, what is done is not, what fails is told, and a kill changes nothing."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

import qtrain.cli.sweep
from qtrain.cli import start
from qtrain.config import Config, config_hash
from qtrain.data.prepare import fingerprint, prepare
from qtrain.errors import UserError
from qtrain.plan import budget_tokens, make_plan
from qtrain.runs.directory import RunDirectory
from qtrain.runs.table import COLUMNS, read_csv, record
from qtrain.sweep import find_points, plan_table, seconds_left, status_table
from qtrain.train import compose, compose_all, jobs_of
from qtrain.training.checkpoint import folder_of, list_checkpoints
from qtrain.training.trunk import Trunk

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "sweep.py"  # as a person starts it who has the repository
TINY = [
    "data=text", "data.val_tokens=512", "model.seq_len=32", "trainer.micro_batch_size=2", "trainer.batch_tokens=64",
    "scheduler=wsd", "scheduler.warmup_steps=2", "trainer.share_trunk=true",
    "callbacks.log_every_steps=1", "callbacks.checkpoint_every_steps=2", "backend=auto", "model.n_layers=1",
    "recipe=quartet_v1",
]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        text = f"document {number} says the same thing again and again. " * 20
        (folder / f"{number}.txt").write_text(text)
    return folder


@pytest.fixture
def script() -> ModuleType:
    return qtrain.cli.sweep


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'kernels'}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["sweep.py", *map(str, arguments)])
        return start("sweep")

    return call


def study(folder: Path, corpus: Path, points: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    settings = [*TINY, f"data.files={corpus}/*.txt", f"data.cache_dir={corpus}/cache"]
    (folder / "points.yaml").write_text(f"settings: {json.dumps(settings)}\npoints:\n{points}")
    return folder


def losses(path: Path) -> dict[tuple[Any, ...], float]:
    return {(row["name"], row["seed"], row["tokens"]): row["val_loss"] for row in read_csv(path)}


# ----------------------------------------------------------------------------------------------- with the real train.py


TWO = "  sweep: {seeds: 1, settings: ['trainer.tokens=640,1280']}\n"


def test_a_sweep_killed_at_random_ends_with_the_same_table(
    main: Callable[..., int],
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Kills take the whole group of processes, wherever they are; the undisturbed sweep runs two processes beside each
    other."""
    monkeypatch.chdir(tmp_path)
    whole = study(tmp_path / "whole", corpus, TWO)
    assert main("launch", whole, "--jobs", 2) == 0
    told = capfd.readouterr().out
    assert "[job 2] job 2 of 2: trainer.tokens=1280" in told, "each of the two says what it is"
    killed = study(tmp_path / "killed", corpus, TWO)
    draw = random.Random(0)
    for number in range(2):
        process = subprocess.Popen(
            [sys.executable, SCRIPT, "launch", killed],
            start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wanted = f"runs/killed/*/checkpoints/step-*{4 * number + 2}"
        deadline = time.monotonic() + 900
        while not list(tmp_path.glob(wanted)) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert main("launch", killed) == 0
    assert losses(killed / "results.csv") == losses(whole / "results.csv")
    assert len(losses(killed / "results.csv")) == len(read_csv(killed / "results.csv")) == 2


@pytest.mark.parametrize("through", ["train.py", "sweep.py"])
def test_asked_to_stop_a_sweep_waits_until_each_process_has_saved(corpus: Path, tmp_path: Path, through: str) -> None:
    """Two train beside each other; the third does not begin. Ctrl-C reaches all processes, SIGTERM the first alone."""
    paths = [f"data.files={corpus}/*.txt", f"data.cache_dir={corpus}/cache", f"run_root={tmp_path}/runs"]
    more = ["trainer.tokens=640_000", "seed=0,1,2", "callbacks.checkpoint_every_steps=1000"]
    start = {
        "train.py": [ROOT / "train.py", "-m", "hydra/launcher=local"],
        "sweep.py": [SCRIPT, "launch", "--jobs", "2"],
    }[through]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *start, *TINY, *paths, *more], cwd=tmp_path, env=environment,
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 900
    while len(list(tmp_path.glob("runs/*/metrics.jsonl"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    if through == "train.py":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.terminate()
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130 and "waiting until all jobs have saved" in errors
    runs = [RunDirectory(path.parent) for path in tmp_path.glob("runs/*/config.yaml")]
    assert [run.summary["status"] for run in runs] == ["interrupted"] * 2
    assert all(list_checkpoints(run.checkpoints) for run in runs)


def test_a_point_that_fails_ends_nothing_and_is_run_again_on_request(
    main: Callable[..., int], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """It diverges; the point after it is done."""
    monkeypatch.chdir(tmp_path)
    folder = study(
        tmp_path / "s", corpus, "  high: {seeds: 1, settings: ['optimizer.lr=1e30,1e-3', trainer.tokens=640]}\n"
    )
    assert main("launch", folder) == 1
    assert [row["name"] for row in read_csv(folder / "results.csv")] == ["high"]
    shown = capfd.readouterr().out
    assert "failed   high, seed 0" in shown and "diverged: the validation loss is nan" in shown
    assert main("launch", folder) == 1 and "training" not in capfd.readouterr().err, "it waits to be asked for"
    assert main("launch", folder, "--retry") == 1
    assert "step" in capfd.readouterr().out


def test_a_point_whose_process_dies_twice_counts_as_failed(
    script: ModuleType, main: Callable[..., int], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    folder = study(tmp_path / "s", corpus, "  a: {seeds: 3, settings: [trainer.tokens=640]}\n")
    starts = []

    def dies_in_the_second(line: list[str], *_: object) -> int:
        points = script.points_of([line])
        starts.append([point.state for point in points])
        for point in points:
            if point.state in ("missing", "stopped"):
                leave(point.config, "running" if point.config.seed == 1 else "finished")
                if point.config.seed == 1:
                    return -9
        return 0

    monkeypatch.setattr(script, "_run", dies_in_the_second)
    assert main("launch", folder) == 1
    assert starts == [["missing"] * 3, ["done", "stopped", "missing"], ["done", "failed", "missing"]]
    assert "killed twice" in capsys.readouterr().out


def test_a_point_that_did_not_die_is_not_called_killed(
    script: ModuleType, main: Callable[..., int], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Two are killed beside each other, then one of them alone; the third stopped in an earlier sweep."""
    monkeypatch.chdir(tmp_path)
    folder = study(tmp_path / "s", corpus, "  a: {seeds: 3, settings: [trainer.tokens=640]}\n")
    configs = [point.config for point in script.points_of(script.study_lines(folder, None))]
    leave(configs[2], "interrupted")
    calls = []

    def dies(line: list[str], jobs: int, *_: object) -> int:
        calls.append((jobs, [point.state for point in script.points_of([line])]))
        if len(calls) == 3:
            for config in configs[1:]:
                leave(config, "finished")
            return 2
        for config in configs[:jobs]:
            leave(config, "running")
        return -9

    monkeypatch.setattr(script, "_run", dies)
    assert main("launch", folder, "--jobs", 2) == 1
    stopped = "stopped"
    assert calls == [
        (2, ["missing", "missing", stopped]), (1, [stopped] * 3), (1, ["failed", stopped, stopped])
    ]  # fmt: skip
    calls.clear()
    monkeypatch.setattr(script, "_run", lambda *_: calls.append(0) or -9)
    assert main("launch", folder, "--retry") == 1 and calls == [0], "it died before any point began"
    assert "train.py ended with -9" in capsys.readouterr().err


def test_launch_tells_by_its_status_whether_all_is_done(
    script: ModuleType, main: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where train.py refuses what it is given, as here where there are no files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "_run", lambda *_: 2)
    point = [*TINY, "data.files=nowhere/*.txt", "trainer.tokens=64"]
    assert main("launch", *point) == 1
    assert main("status", *point) == 0


def test_a_run_that_finished_without_its_row_gets_one(main: Callable[..., int], tmp_path: Path) -> None:
    """It ran before `results` was set, or was killed just before."""
    (config,) = ladder(tmp_path, "trainer.tokens_per_parameter=5")
    leave(config, "finished")
    results = tmp_path / "deep" / "results.csv"
    arguments = [
        "+sweep=ladder", "model.n_layers=1", "trainer.tokens_per_parameter=5", f"run_root={tmp_path}",
        f"results={results}",
    ]  # fmt: skip
    for _ in range(2):
        assert main("launch", *arguments) == 0
        assert [row["name"] for row in read_csv(results)] == ["bf16"]


def leave(config: Config, status: str) -> None:
    """A run directory of this status, as a run would leave it."""
    with RunDirectory.of(config) as directory:
        directory.open(config)
        row: dict[str, Any] = dict.fromkeys(COLUMNS, 1)
        row |= {"name": config.name, "seed": config.seed, "val_loss": 2.0, "status": status, "tokens_per_second": 1e4}
        row |= {"config_hash": config_hash(config), "data_hash": "d"}
        text = fingerprint(config.data, config.tokenizer, budget_tokens=budget_tokens(config))
        directory.write_summary(row | {"data_fingerprint": text})
    if config.trainer.share_trunk and status == "finished":
        trunk = Trunk(config, make_plan(config), "d")
        trunk.directory.mkdir(parents=True, exist_ok=True)
        folder_of(trunk.directory, trunk.steps).mkdir()


# ------------------------------------------------------------------------------------------------ without training


def test_the_jobs_are_those_of_hydra(tmp_path: Path) -> None:
    """What the sweep's config and the command line list, each combination once, budgets slowest; the command line
    replaces the config's values."""
    jobs = jobs_of(["+sweep=ladder", "recipe=bf16,quest", "seed=0,1"])
    configs = compose_all(jobs)
    found = [(c.trainer.tokens_per_parameter, c.model.n_layers, c.recipe.name, c.seed) for c in configs]
    assert found == [(r, n, q, s) for r in (5, 10, 20) for n in (1, 2, 3, 4) for q in ("bf16", "quest") for s in (0, 1)]
    assert configs[5] == compose(jobs[5])
    less = compose_all(jobs_of(["+sweep=ladder", "trainer.tokens_per_parameter=20", "model.n_layers=2,3"]))
    assert [(c.trainer.tokens_per_parameter, c.model.n_layers) for c in less] == [(20, 2), (20, 3)]
    assert jobs_of(["recipe=glob(quest_*,exclude=*_w*)"]) == [["recipe=quest_no_hadamard"], ["recipe=quest_sparse"]]
    with pytest.raises(UserError, match=r"recipe=glob\(zz\*\): no file of configs/recipe fits; give one of .*bf16"):
        jobs_of(["recipe=glob(zz*)"])
    with pytest.raises(UserError, match=r"seed=glob\(1\*\): no file of configs/seed fits; list its values"):
        jobs_of(["seed=glob(1*)"])


def test_the_ladders_rule_for_the_learning_rate() -> None:
    for width, rate in ((128, 2e-3), (256, 1e-3), (512, 5e-4)):
        assert compose(["+sweep=ladder", f"model.dim={width}", "trainer.tokens_per_parameter=5"]).optimizer.lr == rate


def ladder(tmp_path: Path, *more: str) -> list[Config]:
    return compose_all(jobs_of(["+sweep=ladder", "model.n_layers=1", f"run_root={tmp_path}", *more]))


def test_what_a_shared_trunk_saves_is_not_counted_twice(tmp_path: Path) -> None:
    points = find_points(ladder(tmp_path))
    steps = [point.plan.steps for point in points]
    assert steps == [520, 1041, 2083]  # 5, 10, 20 times 213,376 over 2048
    trunks = [519 - 104, 1040 - 208]  # the last fifth, rounded down, decays
    assert [point.steps_shared for point in points] == [0, *trunks]
    assert [point.tokens_left for point in points] == [2048 * (a - b) for a, b in zip(steps, [0, *trunks], strict=True)]
    alone = find_points(ladder(tmp_path, "trainer.share_trunk=false"))
    assert [point.tokens_left for point in alone] == [2048 * a for a in steps]
    leave(alone[0].config, "finished")  # by itself: of the same hash, but there is no trunk
    points = find_points(ladder(tmp_path))
    assert [(point.state, point.steps_shared) for point in points] == [("done", 0), ("missing", 0), ("missing", 832)]
    leave(points[2].config, "interrupted")
    folder_of(RunDirectory.of(points[2].config).checkpoints, 100).mkdir()
    assert find_points(ladder(tmp_path))[2].tokens_left == 2048 * (2083 - 100), "its own checkpoint comes first"


def test_a_point_is_done_by_its_directory_or_by_its_row(tmp_path: Path) -> None:
    results = tmp_path / "results.csv"
    configs = ladder(tmp_path / "runs", f"results={results}")
    leave(configs[0], "finished")
    leave(configs[1], "interrupted")
    assert [point.state for point in find_points(configs)] == ["done", "stopped", "missing"]
    row = dict.fromkeys(COLUMNS, 1) | {"name": "bf16", "val_loss": 2.5, "config_hash": "00000000", "data_hash": "d"}
    record(results, row)
    assert find_points(configs)[2].state == "missing", "a row of other settings"
    mine = row | {"config_hash": config_hash(configs[2])}
    data, tokenizer = configs[2].data, configs[2].tokenizer
    prepare(data, tokenizer, progress=False)
    record(results, mine | {"data_hash": "another"})
    assert find_points(configs)[2].state == "missing", "a row of another text"
    record(results, mine | {"data_fingerprint": fingerprint(data, tokenizer)})
    assert [point.state for point in find_points(configs)] == ["done", "stopped", "done"]
    with RunDirectory.of(configs[1]) as directory:
        directory.open(configs[1])
        assert find_points(configs)[1].state == "running"


def test_time_comes_from_runs_of_the_recipe_and_else_from_a_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = ladder(tmp_path)
    leave(configs[0], "finished")  # 10,000 tokens per second
    points = find_points(configs)
    (seconds,) = seconds_left(points).values()
    assert seconds == pytest.approx((points[1].tokens_left + points[2].tokens_left) / 1e4)
    monkeypatch.setattr("qtrain.sweep.trial", lambda config, plan: 1e9)
    (other,) = seconds_left(find_points(ladder(tmp_path, "recipe=quest"))).values()
    assert other == pytest.approx(sum(p.flops_left for p in find_points(ladder(tmp_path, "recipe=quest"))) / 1e9)


def test_tables_name_what_is_left(tmp_path: Path) -> None:
    configs = ladder(tmp_path)
    leave(configs[0], "finished")
    leave(configs[1], "diverged")
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(plan_table(find_points(configs)))
    console.print(status_table(find_points(configs)))
    rows = [line.split() for line in console.export_text().splitlines()]
    assert 2048 * (1041 - 415 + 2083 - 832) == 3_844_096  # less the trunks of the first and of the second
    assert ["bf16", "0.213M", "3", "2", "3.84M"] in [row[:5] for row in rows]
    assert ["all", "1", "0", "1", "0", "1"] in rows


def test_a_point_that_cannot_run_is_named_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"quartet, seed 0: layers\.0\.attention\.q, .* and finds 72"):
        find_points(ladder(tmp_path, "recipe=quartet", "model.dim=72", "model.n_heads=2"))
    with pytest.raises(UserError, match="names one directory for several runs"):
        find_points(ladder(tmp_path, f"run_dir={tmp_path}/one"))
    with pytest.raises(UserError, match=r"did you mean 'quartet'"):
        jobs_of(["+sweep=ladder", "recipe=bf16,quartett"])


THREE = "settings: [model=nano]\npoints:\n  a: {seeds: 3, settings: [recipe=ste]}\n  b: {seeds: 1}\n"


def test_a_study_is_lines_of_settings(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("x/s", "x/s/inner"):
        Path(folder).mkdir(parents=True)
        (Path(folder) / "points.yaml").write_text(THREE)
    lines = script.study_lines(Path("x/s"), None)
    own = ["results=x/s/results.csv", "run_root=runs/x/s"]
    assert lines == [
        ["name=a", *own, "model=nano", "seed=0,1,2", "recipe=ste"],
        ["name=b", *own, "model=nano", "seed=0"],
    ]
    assert script.lines_of(["x/s", "backend=reference"], ["b"]) == [[*lines[1], "backend=reference"]]
    assert script.study_lines(Path("x/s/inner"), ["b"])[0][2] == "run_root=runs/x/s/inner"


@pytest.mark.parametrize(("points", "message"), [
    (None, "is no study: it has no points.yaml"),
    ("", "points.yaml is empty; give a mapping with settings and points"),
    ("- a\n", "points.yaml is ['a']; give a mapping with settings and points"),
    ("points: {a: {seeds: 1}}\n", "points.yaml has points; give settings and points"),
    ("settings: []\npoints: {a: {seeds: 1}}\nmore: 1\n", "has settings, points, more; give settings and points"),
    ("settings: []\npoints: [a]\n", "points is ['a']; give name: {seeds: 3"),
    ("settings: model=nano\npoints: {a: {seeds: 1}}\n", "settings is 'model=nano'; give a list of overrides"),
    ("settings: [model: nano]\npoints: {a: {seeds: 1}}\n", "settings is [{'model': 'nano'}]; give a list of overrides"),
    ("settings: []\npoints: {a: }\n", "point a is empty; give a mapping with seeds and perhaps settings"),
    ("settings: []\npoints: {a: {seed: 1}}\n", "point a has seed; give seeds and perhaps settings"),
    ("settings: []\npoints: {a: {seeds: 0}}\n", "point a: seeds is 0; give how many, a positive integer"),
    ("settings: []\npoints: {a: {seeds: true}}\n", "point a: seeds is True; give how many"),
    ("settings: []\npoints: {4: {seeds: 1}}\n", "the point's name 4 is no text; quote it"),
    ("settings: []\npoints: {a: {seeds: 1}\n", "points.yaml, line 3 is no YAML: "),
    ("settings: []\n\x07", "points.yaml is no YAML: "),
    (b"settings: \xff\xfe", "cannot read "),
])  # fmt: skip
def test_mistakes_in_the_points_are_explained(
    main: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    points: str | bytes | None,
    message: str,
) -> None:
    if points is not None:
        (tmp_path / "points.yaml").write_bytes(points if isinstance(points, bytes) else points.encode())
    assert main("launch", tmp_path) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and shown.count("\n") == 1 and message in shown


def test_other_mistakes_are_explained(
    main: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s").mkdir()
    Path("s/points.yaml").write_text(THREE)
    for arguments, message in [
        (["s", "--only", "high"], "has no point 'high'; it has a, b"),
        (["s", "t"], "s and t are several studies"),
        (["+sweep=ladder", "--only", "a"], "--only chooses points of a study"),
        (["+sweep=lader"], "did you mean 'ladder'"),
        (["s", "--jobs", "0"], "--jobs 0: give at least 1"),
    ]:
        assert main("plan", *arguments) == 2
        assert message in capsys.readouterr().err
    Path("s/results.csv").touch()
    assert main("status", "s") == 2 and "results.csv is empty" in capsys.readouterr().err
    assert main("plan", "+sweep=ladder", "results=s") == 2
    assert "results=s is a folder; name a file in it" in capsys.readouterr().err
    (config,) = ladder(tmp_path, "trainer.tokens_per_parameter=5")
    leave(config, "finished")
    (RunDirectory.of(config).path / "summary.json").write_text('{"status": ')
    assert main("status", "+sweep=ladder", "model.n_layers=1", f"run_root={tmp_path}") == 2
    assert "summary.json: " in capsys.readouterr().err


def test_the_launcher_for_clusters_runs_in_processes_of_this_machine(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What hydra/launcher=slurm does, by submitit's local executor."""
    paths = [f"data.files={corpus}/*.txt", f"data.cache_dir={corpus}/cache", f"run_root={tmp_path}/runs"]
    settings = [*TINY, *paths, f"results={tmp_path}/results.csv", "trainer.tokens=192", "optimizer.lr=1e30,1e-3"]
    command = [sys.executable, ROOT / "train.py", "-m", "hydra/launcher=slurm_local", *settings]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 2, "one of them diverges, in a process of its own"
    assert [row["lr"] for row in read_csv(tmp_path / "results.csv")] == [1e-3]
    assert list(tmp_path.glob("runs/.submitit/*/*_result.pkl")), "submitit ran them"


def test_the_published_ladder_takes_each_sizes_learning_rate() -> None:
    configs = compose_all(jobs_of(["+sweep=published", "recipe=quartet"]))
    assert len(configs) == 24 and {config.recipe.name for config in configs} == {"quartet"}
    rates = {config.model.name: config.optimizer.lr for config in configs}
    assert rates == {"llama_30m": 1.2e-3, "llama_50m": 1.2e-3, "llama_100m": 6e-4, "llama_200m": 3e-4}
