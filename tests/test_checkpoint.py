"""Checkpoints: written whole or not at all, verified before they are trusted, read by any number of ranks, and without
running code."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from qtrain.errors import UserError
from qtrain.quant import convert
from qtrain.training import checkpoint
from qtrain.training.checkpoint import (
    Saver,
    damage,
    list_checkpoints,
    load,
    newest,
    prune,
    refuse_earlier_format,
    restore,
    save,
    tensors_of,
    tidy,
    weights,
    write_weights,
)

# Ranks, and processes that are to die, are forked from a server that has imported everything.
forked = multiprocessing.get_context("forkserver")
forked.set_forkserver_preload(["pytest", "qtrain.quant", "qtrain.training.checkpoint", "torch.distributed.fsdp"])


def some(step: float) -> dict[str, Tensor]:
    return {"model.w": torch.full((1000,), float(step)), "optimizer.w.step": torch.tensor(float(step))}


def write(directory: Path, step: int) -> Path:
    return save(directory, step, some(step), {"samples": step * 8})


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = some(-1)
    return tensors, load(folder, tensors)


def is_step(folder: Path, step: int) -> bool:
    tensors, values = read(folder)
    same = all(torch.equal(tensors[name], tensor) for name, tensor in some(step).items())
    return same and values["step"] == step and values["samples"] == step * 8


def test_round_trip(tmp_path):
    folder = write(tmp_path, 3)
    assert folder == tmp_path / "step-00000003" and newest(tmp_path) == (3, folder)
    assert is_step(folder, 3)
    assert load_file(folder / "shard-00001-model-00001-of-00002.safetensors").keys() == {"model.w"}, "plain safetensors"


# ------------------------------------------------------------------------------------------------------------- damage


def truncate(folder: Path) -> None:
    file = next(folder.glob("*model-00001*"))
    file.write_bytes(file.read_bytes()[:-100])


def flip(folder: Path) -> None:
    file = next(folder.glob("*model-00001*"))
    content = bytearray(file.read_bytes())
    content[content.index(torch.full((4,), 20.0).numpy().tobytes())] ^= 1
    file.write_bytes(content)


def make_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b"no folder")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": truncate,
    "flipped": flip,
    "empty file": lambda folder: next(folder.glob("*model-00002*")).write_bytes(b""),
    "empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "manifest of another kind": lambda folder: (folder / "manifest.json").write_text("[]"),
    "manifest of nothing": lambda folder: (folder / "manifest.json").write_text('{"files": {}}'),
    "no values": lambda folder: (folder / "values.json").unlink(),
    "a shard is gone": lambda folder: next(folder.glob("*model-00001*")).unlink(),
    "a shard too many": lambda folder: shutil.copy(next(folder.glob("*model-00001*")), folder / "x.safetensors"),
    "another step's": lambda folder: (shutil.rmtree(folder), shutil.copytree(folder.parent / "step-00000010", folder)),
    "a file": make_a_file,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_taken(tmp_path, caplog, kind):
    good, bad = write(tmp_path, 10), write(tmp_path, 20)
    DAMAGE[kind](bad)
    assert newest(tmp_path) == (10, good)
    assert bad.exists(), "to look is not to touch: another process may be writing there"
    assert newest(tmp_path, set_aside=True) == (10, good)
    assert "damaged" in caplog.text and bad.name in caplog.text
    assert not bad.exists() and bad.with_name(f"{bad.name}.damaged").exists(), "nothing already written is lost"
    assert is_step(write(tmp_path, 20), 20), "the step can be saved again"
    DAMAGE[kind](bad)
    assert newest(tmp_path, set_aside=True) == (10, good)
    assert len(list(tmp_path.glob("*.damaged"))) == 2


def test_a_damaged_checkpoint_of_the_same_step_makes_room(tmp_path):
    flip(write(tmp_path, 20))
    assert is_step(write(tmp_path, 20), 20)
    assert [path.name for path in tmp_path.glob("*.damaged")] == ["step-00000020.damaged"]


def test_no_damage_passes_for_good_or_raises(tmp_path):
    """One bit flipped anywhere in any file: found, or the content still loads as it was written."""
    folder = write(tmp_path, 7)
    found = 0
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for position in range(0, 8 * len(whole), 8 * len(whole) // 60 + 3):
            content = bytearray(whole)
            content[position // 8] ^= 1 << position % 8
            path.write_bytes(content)
            if newest(tmp_path) is None:
                found += 1
            else:
                assert is_step(folder, 7)
        path.write_bytes(whole)
    assert found > 200 and newest(tmp_path) is not None


def test_only_the_checkpoint_to_be_loaded_is_read(tmp_path, monkeypatch):
    folders = [write(tmp_path, step) for step in (1, 2, 3)]
    read_in = []
    hashed = checkpoint._entry
    monkeypatch.setattr(checkpoint, "_entry", lambda path: (read_in.append(path.parent), hashed(path))[1])
    assert newest(tmp_path, set_aside=True) == (3, folders[2])
    assert set(read_in) == {folders[2]} and len(read_in) == 3, "each of its files once"
    assert newest(tmp_path, at_most=2) == (2, folders[1])


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "boom",))

    bomb = pickle.dumps({"state_dict": Bomb()})
    for number, name in enumerate(("values.json", "shard-00001-model-00001-of-00002.safetensors", ".metadata")):
        folder = write(tmp_path, number)
        (folder / name).write_bytes(bomb)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][name] = checkpoint._entry(folder / name)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        if newest(tmp_path, at_most=number) == (number, folder):
            try:
                assert is_step(folder, number)
            except UserError as error:
                assert str(folder) in str(error)
        (folder / "manifest.json").write_bytes(bomb)
        assert damage(folder)
    assert not (tmp_path / "boom").exists()


def test_what_it_holds_must_be_what_is_asked_for(tmp_path):
    folder = write(tmp_path, 1)
    for wrong in (
        some(1) | {"model.v": torch.zeros(3)},
        {"model.w": torch.zeros(1000), "optimizer.w.other": torch.zeros(())},
        some(1) | {"model.w": torch.zeros(999)},
        some(1) | {"model.w": torch.zeros(1000, dtype=torch.bfloat16)},
    ):
        with pytest.raises(UserError, match="holds another state"):
            load(folder, wrong)
    load(folder, {"model.w": torch.zeros(1000)})  # the model alone may be asked for
    values = json.loads((folder / "values.json").read_text())
    (folder / "values.json").write_text(json.dumps(values | {"format": 2}))
    with pytest.raises(UserError, match="format 2"):
        read(folder)


# ------------------------------------------------------------------------------------------------------ kills, no room


FILE_OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}


def dying_writer(directory: Path, step: int, keep: int, operation: int) -> None:
    """Save, and be killed before the n-th file operation."""
    count = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in FILE_OPERATIONS and str(directory) in str(arguments[0]):
            count += 1
            if count > operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sync = os.fsync
    saver = Saver()
    sys.addaudithook(watch)
    os.fsync = lambda handle: (watch("open", (directory,)), sync(handle))[1]
    saver.save(directory, step, some(step), {"samples": step * 8}, keep)
    saver.close()


@pytest.mark.parametrize("step", [4, 8], ids=["the same step again", "a later step"])
def test_a_kill_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path, step):
    left, operation = set(), -1
    while operation < 100:
        operation += 1
        directory = tmp_path / str(operation)
        old = write(directory, 4)
        process = forked.Process(target=dying_writer, args=(directory, step, 1, operation))
        process.start()
        process.join()
        found = newest(directory)
        assert found is not None and found[0] in {4, step} and is_step(found[1], found[0]), operation
        assert all(damage(folder) is None for _, folder in list_checkpoints(directory)), operation
        left |= {path.name[:6] for path in directory.iterdir()}
        tidy(directory)
        assert newest(directory, set_aside=True) == found
        assert not list(directory.glob(".*")) and not list(directory.glob("*.damaged")), operation
        if process.exitcode == 0:
            assert found[0] == step and (step == 4 or not old.exists())
            break
        assert process.exitcode == -signal.SIGKILL
    assert operation > 10 and ".step-" in left, "kills came while files were half written"


def test_all_of_a_checkpoint_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A power loss leaves no folder of that name with files that are half there; after it, the name is durable too."""
    done = []
    sync, rename = os.fsync, Path.rename

    def syncing(handle):
        sync(handle)
        done.append(Path(f"/proc/self/fd/{handle}").readlink())

    monkeypatch.setattr("os.fsync", syncing)
    monkeypatch.setattr(Path, "rename", lambda path, target: (done.append(target), rename(path, target))[1])
    folder = write(tmp_path, 1)
    at = done.index(folder)
    (partial,) = {path for path in done[:at] if path.parent == tmp_path}
    assert set(done[:at]) == {partial, *(partial / path.name for path in folder.iterdir())}
    assert done[at - 2 : at] == [partial / "manifest.json", partial], "the names in it last"
    assert done[at + 1 :] == [tmp_path]


def test_what_others_may_still_write_stays(tmp_path):
    (tmp_path / ".step-00000001.abc").mkdir()
    tidy(tmp_path, idle_seconds=60)
    assert list(tmp_path.iterdir())
    (tmp_path / ".step-00000001.ckpt.4711").touch()
    tidy(tmp_path)
    assert not list(tmp_path.iterdir())


def without_room(directory: Path, results: Any) -> None:
    write(directory, 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    saver = Saver()
    saver.save(directory, 2, some(2), {})
    for attempt in (saver.wait, saver.wait, lambda: write(directory, 2), saver.close):
        try:
            attempt()
            results.put(None)
        except UserError as error:
            results.put(str(error))


def test_a_full_disk_leaves_nothing_half_and_is_said_once(tmp_path):
    results = forked.Queue()
    process = forked.Process(target=without_room, args=(tmp_path / "run", results))
    process.start()
    said = [results.get(timeout=60) for _ in range(4)]
    process.join()
    folder = tmp_path / "run" / "step-00000002"
    assert all(f"cannot write checkpoint {folder}: File too large" in said[n] for n in (0, 2)), said
    assert said[1] is None and said[3] is None
    assert [path.name for path in folder.parent.iterdir()] == ["step-00000001"] and newest(folder.parent)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"cannot write checkpoint {tmp_path}/file/step-00000001: Not a directory"):
        write(tmp_path / "file", 1)


# -------------------------------------------------------------------------------------------------- in the background


def test_weights_may_change_as_soon_as_save_returns(tmp_path, monkeypatch):
    begin, saving = checkpoint._begin, threading.Event()
    monkeypatch.setattr(checkpoint, "_begin", lambda folder: (saving.wait(), begin(folder))[1])
    saver = Saver()
    tensors = some(5)
    folder = saver.save(tmp_path, 5, tensors, {"samples": 40})
    for tensor in tensors.values():
        tensor.zero_()
    assert not folder.exists()
    saving.set()
    saver.save(tmp_path, 6, tensors, {"samples": 48})  # waits for the one before
    assert is_step(folder, 5)
    saver.close()
    assert not read(tmp_path / "step-00000006")[0]["model.w"].any()


def test_commits_of_the_code_that_computed_it(tmp_path, caplog, monkeypatch):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    for number, commit in enumerate(["aaa", "bbb", "bbb", "ccc"]):
        monkeypatch.setattr(checkpoint, "commit", lambda commit=commit: commit)
        saver = Saver()
        if number:
            saver.restore(tmp_path / f"step-{number - 1:08d}", model, optimizer)
        saver.save(tmp_path, number, tensors_of(model, optimizer), {})
        saver.close()
    folder = tmp_path / "step-00000003"
    assert json.loads((folder / "values.json").read_text())["commits"] == ["aaa", "bbb", "ccc"]
    assert "computed at commit aaa, bbb; the code is now at ccc" in caplog.text


def test_prune(tmp_path):
    for step in (5, 100, 20, 30):
        write(tmp_path, step)
    prune(tmp_path, keep=3)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [20, 30, 100]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000020", "step-00000030", "step-00000100"]
    assert newest(tmp_path / "nothing") is None


def test_files_of_the_version_before_are_refused_by_name(tmp_path):
    refuse_earlier_format(tmp_path)
    (tmp_path / "step-00000030.ckpt").touch()
    with pytest.raises(UserError, match=r"step-00000030\.ckpt was written by an earlier version.*force=true"):
        refuse_earlier_format(tmp_path)


# -------------------------------------------------------------------------------------------------------------- models


class Model(nn.Module):
    """Sizes that two ranks do not share evenly, a parameter of one element, a tied one, an integer, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.block = nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 8))
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.embed.weight
        self.gain = nn.Parameter(torch.ones(1))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("fixed", torch.zeros(3), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embed(tokens))) * self.gain


def build(kind: str) -> tuple[nn.Module, torch.optim.AdamW]:
    """A model and its optimiser after one step, as one process, DDP or FSDP2 holds them."""
    model = Model()
    trained: nn.Module = model
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model.block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif kind == "ddp":
        trained = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    trained(torch.arange(7)).square().mean().backward()
    optimizer.step()
    return model, optimizer


def expected(name: str, tensor: Tensor) -> Tensor:
    """What a tensor of this name is filled with, whole: a function of the name."""
    return (torch.arange(tensor.numel()) * 3 + zlib.crc32(name.encode()) % 1000).reshape(tensor.shape).to(tensor.dtype)


def fill(tensors: dict[str, Tensor], kind: str) -> None:
    with torch.no_grad():
        for name, tensor in tensors.items():
            content = expected(f"{kind} {name}", tensor)
            if isinstance(tensor, DTensor):
                content = distribute_tensor(content, tensor.device_mesh, tensor.placements)
            tensor.copy_(content)


def assert_filled(tensors: dict[str, Tensor], kind: str) -> None:
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert torch.equal(whole, expected(f"{kind} {name}", tensor)), name


def saves(directory: Path, *kinds: str) -> None:
    for kind in kinds:
        model, optimizer = build(kind)
        fill(tensors_of(model, optimizer), kind)
        saver = Saver()
        saver.save(directory / kind, 1, tensors_of(model, optimizer), {"samples": 8})
        saver.close()


def loads(directory: Path, *kinds: str) -> None:
    for kind in kinds:
        for writer in ("one", "ddp", "fsdp2"):
            model, optimizer = build(kind)
            assert restore(directory / writer / "step-00000001", model, optimizer)["samples"] == 8
            assert_filled(tensors_of(model, optimizer), writer)


def as_rank(rank: int, store: Path, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    function(*arguments)
    dist.destroy_process_group()


def on_two_ranks(store: Path, function: Callable[..., None], *arguments: Any) -> None:
    ranks = [forked.Process(target=as_rank, args=(rank, store, function, arguments)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]


def test_any_number_of_ranks_and_any_sharding_reads_what_any_other_wrote(tmp_path):
    saves(tmp_path, "one")
    on_two_ranks(tmp_path / "store1", saves, tmp_path, "ddp", "fsdp2")
    on_two_ranks(tmp_path / "store2", loads, tmp_path, "ddp", "fsdp2")
    loads(tmp_path, "one")
    names = {"embed.weight", "gain", "count", *(f"block.{n}.{part}" for n in (0, 1) for part in ("weight", "bias"))}
    for writer in ("one", "ddp", "fsdp2"):
        folder = tmp_path / writer / "step-00000001"
        whole = weights(folder)
        assert whole.keys() == names and whole["count"].dtype == torch.int64
        assert_filled({f"model.{name}": tensor for name, tensor in whole.items()}, writer)
        write_weights(tmp_path / "model.safetensors", whole, {"step": "1"})
        again = load_file(tmp_path / "model.safetensors")
        assert again.keys() == names and all(torch.equal(again[name], whole[name]) for name in names)
    shards = sorted((tmp_path / "fsdp2" / "step-00000001").glob("*model-00001*"))
    (first, second) = (load_file(shard)["model.block.0.weight"] for shard in shards)
    assert (first.shape, second.shape) == ((3, 8), (2, 8)), "each rank writes its shard"


def one_rank_has_no_room(directory: Path) -> None:
    model, optimizer = build("fsdp2")
    saver = Saver()
    saver.save(directory, 1, tensors_of(model, optimizer), {})
    saver.wait()
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
    saver.save(directory, 2, tensors_of(model, optimizer), {})
    with pytest.raises(UserError, match="step-00000002: File too large"):
        saver.wait()
    dist.barrier()
    assert [path.name for path in directory.iterdir()] == ["step-00000001"]

    def no_room(*_: Any) -> None:  # for the manifest, which rank 0 writes
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    checkpoint._finish = no_room
    saver.save(directory, 3, tensors_of(model, optimizer), {})
    with pytest.raises(UserError, match="step-00000003: No space left on device"):
        saver.wait()
    dist.barrier()
    assert [path.name for path in directory.iterdir()] == ["step-00000001"]
    saver.close()


def test_an_error_of_one_rank_is_raised_on_all(tmp_path):
    """And what was whole before is whole after; no part of the others is left."""
    directory = tmp_path / "run"
    on_two_ranks(tmp_path / "store", one_rank_has_no_room, directory)
    assert [path.name for path in directory.iterdir()] == ["step-00000001"]
    assert newest(directory) == (1, directory / "step-00000001")


def test_learned_scales_count_as_calibrated_once_loaded(tmp_path):
    """And an optimiser that has made no step is given its state."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    convert(model, "lsq", skip=(), backend="reference")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = tensors_of(model, optimizer)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)
    assert any(name.endswith("scale.exp_avg") for name in tensors)
    fill(tensors, "lsq")
    save(tmp_path, 1, tensors, {})
    again = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    convert(again, "lsq", skip=(), backend="reference")
    assert not any(layer.calibrated for layer in again)
    restore(tmp_path / "step-00000001", again)
    assert all(layer.calibrated for layer in again)
    assert_filled(tensors_of(again), "lsq")
