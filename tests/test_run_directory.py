"""The run directory: a function of the settings that determine the result; nothing already written is lost."""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
import time
from pathlib import Path

import pytest
import yaml

import qtrain.plan
from qtrain.config import Config, config_hash
from qtrain.config.settings import parse
from qtrain.errors import UserError, explain
from qtrain.runs import environment
from qtrain.runs.directory import RunDirectory
from qtrain.runs.files import clear_partial, write_atomically
from qtrain.runs.metrics_log import MetricsLog
from qtrain.train import compose


def config(tmp_path: Path, *overrides: str):
    return compose([f"run_root={tmp_path}", *overrides])


SAME_RESULT = [
    "data.num_workers=4",
    "data.prepare_workers=1",
    "data.cache_dir=elsewhere",
    "trainer.device=cpu",
    "trainer.devices=2",
    "backend=reference",
    "logger=tensorboard",
    "callbacks.log_every_steps=3",
    "callbacks.checkpoint_every_steps=3",
    "run_root=elsewhere",
    "force=true",
]
OTHER_RESULT = [
    "seed=1",
    "model.n_layers=3",
    "optimizer.lr=1e-5",
    "scheduler=wsd",
    "trainer.tokens=2_000_000",
    "trainer.batch_tokens=8192",
    "trainer.precision=32-true",
    "trainer.micro_batch_size=4",  # blocks along the tokens, and draws, belong to micro-batches
    "trainer.compile=true",  # norms and activations are rounded in another order
    "tokenizer=bpe",
    "data.val_fraction=0.1",
    "recipe=quest",
    "debug.max_steps=7",
]


@pytest.mark.parametrize("override", SAME_RESULT)
def test_hash_ignores_what_cannot_change_the_result(tmp_path, override):
    assert config_hash(compose([override])) == config_hash(compose())


def test_hash_tells_apart_what_can(tmp_path):
    base = "trainer.precision=bf16-mixed"  # auto is 32-true on some machines
    hashes = [config_hash(compose([base, override])) for override in OTHER_RESULT]
    assert len({*hashes, config_hash(compose([base]))}) == len(OTHER_RESULT) + 1


def test_runs_keep_their_names_when_a_default_changes():
    """The names that runs had when bf16-mixed was the default of trainer.precision."""
    named = {"bf16-mixed": "e39173d1", "32-true": "061eeb57"}
    assert {name: config_hash(compose([f"trainer.precision={name}"])) for name in named} == named


@pytest.mark.parametrize(("units", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_auto_names_the_run_that_it_comes_to(monkeypatch, units, precision):
    monkeypatch.setattr(qtrain.plan, "has_bfloat16_units", lambda device_type: units)
    found, asked = compose(["trainer.precision=auto"]), compose([f"trainer.precision={precision}"])
    assert found == asked and config_hash(found) == config_hash(asked)
    assert compose() == asked, "auto is the default"


def test_auto_itself_has_no_name(tmp_path):
    found = compose()
    with pytest.raises(ValueError, match=r"trainer\.precision=auto has no hash; resolve it first"):
        config_hash(found.model_copy(update={"trainer": found.trainer.model_copy(update={"precision": "auto"})}))


def test_the_order_of_overrides_counts_and_their_wording_does_not():
    """The first pattern that matches holds."""
    one, other = (compose(["recipe=quest", f"recipe.overrides={{{a},{b}}}"]) for a, b in (
        ("down:bf16", "*.down:quartet"), ("*.down:quartet", "down:bf16")
    ))  # fmt: skip
    assert config_hash(one) != config_hash(other)
    again = parse(Config, one.model_dump(mode="json"))
    assert again == one and config_hash(again) == config_hash(one)
    words = {"source": "other words", "deviations": ("Other words.",)}
    reworded = one.recipe.overrides["down"].model_copy(update=words)
    recipe = one.recipe.model_copy(update=words | {"overrides": one.recipe.overrides | {"down": reworded}})
    assert config_hash(one.model_copy(update={"recipe": recipe})) == config_hash(one)


ACCUMULATED = "trainer.micro_batch_size=1"


@pytest.mark.parametrize(("overrides", "counts"), [
    (["recipe=quartet_v1", ACCUMULATED], True),  # noise of dgrad's weight
    (["recipe=quartet", ACCUMULATED], True),  # signs of dgrad
    (["recipe=quest", "recipe.overrides={down:quartet}", ACCUMULATED], True),
    (["recipe=quartet_v1"], False),  # one micro-batch a step
    (["recipe=quest", ACCUMULATED], False),  # draws nothing
    (["recipe=luq_int4", ACCUMULATED], False),  # draws for gradients alone
])  # fmt: skip
def test_redrawing_renames_the_runs_that_it_changes_and_no_other(overrides: list[str], counts: bool) -> None:
    """The name of a run before `recipe.redraw` was there is that of one with redraw=step."""
    now, before = compose(overrides), compose([*overrides, "recipe.redraw=step"])
    assert (config_hash(now) != config_hash(before)) == counts


def test_names_from_before_recipe_redraw_are_kept() -> None:
    """Pinned at the version before it."""
    base = "trainer.precision=bf16-mixed"
    assert config_hash(compose([base, "recipe=quartet"])) == "89269430"
    assert config_hash(compose([base, "recipe=quest", ACCUMULATED])) == "6ff53fc3"
    assert config_hash(compose([base, "recipe=quartet_v1", "recipe.redraw=step", ACCUMULATED])) == "a2898620"


def test_a_run_from_before_recipe_redraw_goes_on_as_it_began(tmp_path: Path) -> None:
    asked = config(tmp_path, "recipe=quartet_v1", ACCUMULATED, f"run_dir={tmp_path / 'one'}")
    saved = asked.model_dump(mode="json")
    del saved["recipe"]["redraw"]
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "config.yaml").write_text(yaml.safe_dump(saved))
    directory = RunDirectory.of(asked)
    assert directory.read_config().recipe.redraw == "step"
    with pytest.raises(UserError, match=r"made with another config: .*recipe\.redraw"):
        directory.check(asked)


def test_bits_of_a_recipe_change_the_hash():
    assert config_hash(compose(["recipe=quest", "recipe.bits=2"])) != config_hash(compose(["recipe=quest"]))


def test_path_is_name_and_hash(tmp_path):
    directory = RunDirectory.of(config(tmp_path, "name=first"))
    assert directory.path == tmp_path / f"first-{config_hash(config(tmp_path))}"


def test_reopening_with_the_same_config_keeps_everything(tmp_path):
    settings = config(tmp_path)
    with RunDirectory.of(settings) as directory:
        directory.open(settings)
        directory.append_metrics({"step": 1, "loss": 2.0})
        identity = directory.wandb_id
    with RunDirectory.of(settings) as again:
        again.open(settings)
        assert again.lines("loss") == [{"step": 1, "loss": 2.0}]
        assert again.wandb_id == identity
        assert again.read_config() == settings
        starts = json.loads((again.path / "environment.json").read_text())["starts"]
    assert len(starts) == 2 and starts[0]["versions"]["torch"] is not None


def test_another_config_in_a_named_directory_is_an_error_that_names_the_difference(tmp_path):
    named = tmp_path / "mine"
    first = config(tmp_path, f"run_dir={named}")
    with RunDirectory.of(first) as directory:
        directory.open(first)
    other = config(tmp_path, f"run_dir={named}", "optimizer.lr=0.5")
    with pytest.raises(UserError, match=r"optimizer\.lr was 0\.\d+, now 0\.5.*force=true"):
        RunDirectory.of(other).open(other)
    assert RunDirectory(named).read_config() == first


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    settings = config(tmp_path, f"run_dir={tmp_path}")
    with pytest.raises(UserError, match="holds no run"):
        RunDirectory.of(settings).open(settings)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_force_moves_the_old_run_aside(tmp_path):
    settings = config(tmp_path)
    for loss in (1.0, 2.0, 3.0):
        forced = settings.model_copy(update={"force": True})
        with RunDirectory.of(forced) as directory:
            directory.open(forced)
            assert directory.lines("loss") == []
            directory.append_metrics({"step": 1, "loss": loss})
    path = RunDirectory.of(settings).path
    losses = {
        name: RunDirectory(path.with_name(path.name + name)).lines("loss")[0]["loss"] for name in ("", ".old1", ".old2")
    }
    assert losses == {"": 3.0, ".old1": 1.0, ".old2": 2.0}


@pytest.mark.parametrize("force", [False, True])
def test_two_processes_cannot_train_in_one_directory(tmp_path, monkeypatch, force):
    monkeypatch.setattr("qtrain.runs.directory.LOCK_SECONDS", 0.3)
    settings = config(tmp_path)
    with RunDirectory.of(settings) as directory:
        directory.open(settings)
        with pytest.raises(UserError, match="another process"):
            RunDirectory.of(settings).open(settings.model_copy(update={"force": force}))
        assert directory.path.exists(), "force does not move a directory from under a running process"
    with RunDirectory.of(settings) as directory:
        directory.open(settings)


def test_a_lock_that_is_let_go_of_soon_is_waited_for(tmp_path):
    settings = config(tmp_path)
    first = RunDirectory.of(settings)
    first.open(settings)
    threading.Timer(0.4, first.close).start()
    with RunDirectory.of(settings) as directory:
        directory.open(settings)
        assert len(json.loads((directory.path / "environment.json").read_text())["starts"]) == 2


def test_a_kill_before_the_config_is_written_leaves_a_directory_that_can_be_taken_up(tmp_path, monkeypatch):
    settings = config(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("qtrain.runs.directory.write_atomically", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        directory = RunDirectory.of(settings)
        with pytest.raises(KeyboardInterrupt):
            directory.open(settings)
        directory.close()
    with RunDirectory.of(settings) as again:
        again.open(settings)
        assert again.read_config() == settings


def test_places_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", Path("/proc/nowhere")):
        settings = config(root)
        with pytest.raises(UserError, match=f"cannot write run directory {root}.*run_root"):
            RunDirectory.of(settings).open(settings)


def test_a_damaged_config_names_its_file(tmp_path):
    for text in ("a: [1", "name: x\nold_key: 3\n"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(UserError, match=r"config\.yaml does not read as the settings of a run"):
            RunDirectory(tmp_path).read_config()


def test_force_leaves_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    settings = config(tmp_path, f"run_dir={tmp_path}", "force=true")
    with pytest.raises(UserError, match="holds no run"):
        RunDirectory.of(settings).open(settings)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_resuming_takes_back_later_and_half_written_lines(tmp_path):
    directory = RunDirectory(tmp_path)
    for step in (10, 20, 30):
        directory.append_metrics({"step": step, "loss": 1 / step})
    with directory.metrics.open("a") as file:
        file.write('{"step": 40, "lo')
    assert directory.discard_metrics_after(20) == 2
    assert [line["step"] for line in directory.lines("loss")] == [10, 20]
    discarded = (tmp_path / "metrics.discarded.jsonl").read_text().splitlines()
    assert json.loads(discarded[0])["step"] == 30 and discarded[1] == '{"step": 40, "lo'
    assert directory.discard_metrics_after(20) == 0


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    target = tmp_path / "summary.json"
    write_atomically(target, "old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(target, "new")
    assert target.read_text() == "old"


def test_asking_for_the_commit_leaves_the_checkout_alone(tmp_path, monkeypatch):
    """Not even its index is refreshed: that locks it, and a run killed meanwhile would leave it locked."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "file").write_text("1")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for arguments in (["init", "-q"], ["add", "file"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *arguments], check=True)
    monkeypatch.setattr(environment, "configs_dir", lambda: tmp_path / "configs")
    os.utime(tmp_path / "file", (1, 1))  # what is in the index is no longer up to date
    index = (tmp_path / ".git" / "index").read_bytes()
    found = environment.commit()
    assert found is not None and len(found) == 40, "the content is the committed one"
    assert (tmp_path / ".git" / "index").read_bytes() == index
    (tmp_path / "file").write_text("2")
    assert environment.commit() == f"{found}+changes"


# ------------------------------------------------------------------------------------------------- bad days


def test_lines_are_on_disk_before_the_checkpoint_that_counts_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = RunDirectory(tmp_path)
    directory.append_metrics({"step": 1, "loss": 2.0})
    synced = []
    monkeypatch.setattr("os.fsync", lambda handle: synced.append(str(Path(f"/proc/self/fd/{handle}").readlink())))
    directory.log.sync()
    assert synced == [str(directory.metrics), str(tmp_path)], "the content and the name"


def test_lines_that_end_before_the_checkpoint_are_told(tmp_path: Path) -> None:
    """As when the machine lost its power before they were synced."""
    log = RunDirectory(tmp_path).log
    for step in (5, 10, 15):
        log.append({"step": step, "loss": 1 / step})
    log.append({"step": 15, "val_loss": 2.0})
    assert log.lost_before(15, every=5) is None and log.lost_before(17, every=5) is None
    assert "ends at step 15, and the checkpoint is of step 20" in str(log.lost_before(20, every=5))
    assert log.line_of(15, having="val_loss") == {"step": 15, "val_loss": 2.0}
    assert log.line_of(20, having="val_loss") is None, "the last line is of another step"


@pytest.mark.parametrize("force", [True, False])
def test_a_live_directory_is_not_taken_by_who_waited_for_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    """A run ends, one process of force=true moves it aside and trains anew, and another process has waited for the
    lock of the first. It must not move the new directory away, nor train in it."""
    monkeypatch.setattr("qtrain.runs.directory.LOCK_SECONDS", 1.5)
    settings = config(tmp_path)
    ends, trains, waits = (RunDirectory.of(settings) for _ in range(3))
    ends.open(settings)
    said: list[str] = []

    def wait() -> None:
        try:
            waits.open(settings.model_copy(update={"force": force}))
            said.append("trains")
        except UserError as error:
            said.append(str(error))

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.5)
    ends.path.rename(tmp_path / "aside.old1")
    trains.open(settings)
    ends.close()
    waiting.join()
    assert len(said) == 1 and "another process is training" in said[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aside.old1", trains.path.name]
    trains.close()


def test_half_written_files_have_names_of_their_own_and_are_cleared(tmp_path: Path) -> None:
    settings = config(tmp_path)
    with RunDirectory.of(settings) as directory:
        directory.open(settings)
    partial = directory.path / ".summary.json.0123456789abcdef.partial"
    partial.write_text("{")
    with RunDirectory.of(settings) as again:
        again.open(settings)
    assert not partial.exists()
    shared = tmp_path / "trunks"
    shared.mkdir()
    for name, age in ((".new.partial", 0), (".old.partial", 100_000)):
        (shared / name).write_text("")
        os.utime(shared / name, (time.time() - age,) * 2)
    clear_partial(shared, older_than=86_400)
    assert [path.name for path in shared.iterdir()] == [".new.partial"], "another process may be writing it"


def test_writers_of_one_process_number_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers that share a file system number their processes alike."""
    monkeypatch.setattr("os.getpid", lambda: 7)
    target, texts = tmp_path / "summary.json", [letter * 100_000 for letter in "abcd"]
    writers = [
        threading.Thread(target=lambda t=text: [write_atomically(target, t) for _ in range(20)]) for text in texts
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert not target.exists() or target.read_text() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_a_file_that_could_not_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space") as told:
        write_atomically(tmp_path / "summary.json", "new")
    assert list(tmp_path.iterdir()) == []
    assert str(tmp_path / "summary.json") in str(explain(told.value))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_line_that_finds_no_room_names_its_file() -> None:
    """Python names no file where an open one cannot grow."""
    with pytest.raises(OSError, match="No space") as told:
        MetricsLog(Path("/dev/full")).append({"step": 1})
    assert "refused /dev/full: No space left on device; free space there" in str(explain(told.value))


@pytest.mark.parametrize(("name", "content"), [
    ("summary.json", "[1]"), ("summary.json", "3"), ("summary.json", "[" * 100_000), ("summary.json", "\udcff"),
    ("environment.json", '"x"'), ("environment.json", '{"starts": 3}'), ("environment.json", "{"),
    ("config.yaml", "- 1"), ("config.yaml", "[" * 100_000), ("config.yaml", "\udcff"),
    ("config.yaml", "a: &a [*a, *a]"),
    ("config.yaml", "model: " + "9" * 5000),
    ("config.yaml", "x0: &x0 [" + "1," * 9 + "]\n"
     + "".join(f"x{n}: &x{n} [{f'*x{n - 1},' * 9}]\n" for n in range(1, 9))),
])  # fmt: skip
def test_damaged_state_is_a_message_with_the_file(tmp_path: Path, name: str, content: str) -> None:
    settings = config(tmp_path)
    with RunDirectory.of(settings) as directory:
        directory.open(settings)
    (directory.path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=re.escape(str(directory.path / name))) as told:
        assert directory.summary is not None
        with RunDirectory.of(settings) as again:
            again.open(settings)
    assert len(str(told.value)) < 1500
