"""Checkpoints that survive a kill at any moment: written whole or not at all, verified before they are trusted, and
read without running code. One format serves one rank and many.

    checkpoints/step-00000010/
        shard-00001-model-00001-of-00002.safetensors    rank 0's part of the weights
        shard-00001-model-00002-of-00002.safetensors    rank 0's part of the optimiser's state
        shard-00002-...                                 those of rank 1
        values.json      the step, plain values of the run, and the commits of the code that computed it
        manifest.json    size and SHA-256 of every other file; written last

The tensors are written and read by torch.distributed.checkpoint in its safetensors storage, so that any number of ranks
and any sharding reads what any other wrote. A tensor is called model.<parameter>, or optimizer.<parameter>.<state>;
an 8-bit state is several, with .codes, .scale and .qmap after its name.
A checkpoint holds no random state: noise is a function of (seed, step, micro-batch, layer, operand, element).

A folder is written under a hidden name of its own, synced to disk, and renamed: what has the name step-<step> was once
whole. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from qtrain.errors import UserError, first_line
from qtrain.runs.environment import commit
from qtrain.runs.files import sync_folder, write_synced

log = logging.getLogger("qtrain")

FORMAT = 1
VALUES, MANIFEST = "values.json", "manifest.json"
MODEL, OPTIMIZER = "model.", "optimizer."
_NAME = re.compile(r"step-(\d+)")
T = TypeVar("T")


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """Everything that a checkpoint holds of a model and its optimiser, by name: the tensors themselves, not copies, and
    DTensors where they are sharded. A tied weight stands here once. An optimiser that has made no step yet gets its
    initial state."""
    once = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    named = {MODEL + name: tensor for name, tensor in model.state_dict().items() if name in once}
    if optimizer is not None:
        flat = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
        prefix = "state."  # what is under "param_groups." comes from the settings
        for name, value in flat.items():
            if name.startswith(prefix):
                named |= _parts(OPTIMIZER + name[len(prefix) :], cast(Tensor, value))
    return named


def _parts(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor by its name; one of torchao's 8-bit states as its parts: codes (N, K) uint8, scale (N, blocks of a row)
    and qmap (256,), the values that codes stand for. They are the same memory, sharded by rows as the state is."""
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    if not is_traceable_wrapper_subclass(local):
        return {name: tensor}
    state: Any = local
    by_rows = {"codes": state.codes, "scale": state.scale.view(len(state.codes), -1)}
    if isinstance(tensor, DTensor):
        mesh, placements, rows = tensor.device_mesh, tensor.placements, tensor.shape[0]
        by_rows = {
            part: DTensor.from_local(
                x, mesh, placements, run_check=False, shape=torch.Size((rows, x.shape[1])), stride=x.stride()
            )
            for part, x in by_rows.items()
        }
    return {f"{name}.{part}": x for part, x in (by_rows | {"qmap": state.qmap}).items()}


# --------------------------------------------------------------------------------------------------------------- write


class Saver:
    """Writes checkpoints in the background, one at a time, and remembers which commits of the code computed the state.

    Made and used by all ranks together. An error of the writer is raised, on every rank, at the next call.
    """

    def __init__(self) -> None:
        self.commits: list[str | None] = [commit()]
        # The writer talks to the other ranks while training does: it needs a group of its own.
        self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo")) if _ranks() > 1 else None
        pinned = torch.cuda.is_available()
        self._stager = DefaultStager(StagingOptions(pinned, False, False, False))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def restore(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """`restore`, whose checkpoint's commits become those of what is saved from here on."""
        values = restore(folder, model, optimizer)
        saved = values.get("commits")
        earlier = [one for one in (saved if isinstance(saved, list) else [None]) if one not in self.commits]
        if earlier:
            computed = ", ".join(map(str, earlier))
            log.warning("%s was computed at commit %s; the code is now at %s", folder, computed, self.commits[-1])
        self.commits = earlier + self.commits
        return values

    def save(
        self,
        directory: Path,
        step: int,
        tensors: Mapping[str, Tensor],
        values: Mapping[str, Any],
        keep: int | None = None,
    ) -> Path:
        """Copy the tensors to memory of the CPU and return; writing goes on in the background. The folder to come.
        keep: how many of the newest checkpoints in `directory` remain afterwards; None keeps all."""
        self.wait()
        staged = self._stager.stage(dict(tensors))
        assert isinstance(staged, dict)
        text = _as_json({**values, "commits": self.commits, "step": step})
        self._writing = self._thread.submit(_write, directory, step, staged, text, self._group, keep)
        return folder_of(directory, step)

    def wait(self) -> None:
        """Return when everything saved is on disk. UserError when it could not be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._stager.close()


def save(directory: Path, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Path:
    """Write directory/step-<step> and return it. values: plain values, those of rank 0 count. A whole checkpoint of the
    same step that is there already stays: it holds the same state. UserError when it cannot be written, on all ranks;
    then no part of it is left. Collective."""
    _write(directory, step, dict(tensors), _as_json({"commits": [commit()], **values, "step": step}), None, None)
    return folder_of(directory, step)


def _as_json(values: Mapping[str, Any]) -> str:
    return json.dumps({**values, "format": FORMAT}, indent=2) + "\n"


def _write(
    directory: Path,
    step: int,
    tensors: dict[str, Tensor],
    values: str,
    group: dist.ProcessGroup | None,
    keep: int | None,
) -> None:
    folder, rank = folder_of(directory, step), _rank(group)
    partial = None
    try:
        partial = _agreed(lambda: _begin(folder) if rank == 0 else None, group)[0]
        assert partial is not None
        files = {name: 1 if name.startswith(MODEL) else 2 for name in tensors}
        writer = HuggingFaceStorageWriter(str(partial), fqn_to_index_mapping=files, save_distributed=True)
        _quietly(dcp.save)(tensors, storage_writer=writer, process_group=group, no_dist=_ranks(group) == 1)
        mine = partial.glob(f"shard-{rank + 1:05d}-*")
        entries = _agreed(lambda: {path.name: _entry(path) for path in mine}, group)
        _agreed(lambda: _finish(folder, partial, values, entries, keep) if rank == 0 else None, group)
    except (OSError, CheckpointException) as error:
        raise UserError(
            f"cannot write checkpoint {folder}: {_reason(error)}; make room or name another run_root, then start the "
            "same command again: it continues from the last checkpoint"
        ) from error
    finally:
        if rank == 0 and partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _begin(folder: Path) -> Path:
    partial = _hidden(folder)
    partial.mkdir(parents=True)
    return partial


def _finish(folder: Path, partial: Path, values: str, entries: list[dict[str, Any]], keep: int | None) -> None:
    write_synced(partial / VALUES, values)
    files = {name: entry for of_rank in entries for name, entry in of_rank.items()}
    elsewhere = [name for name in files if not (partial / name).exists()]
    if elsewhere:
        raise UserError(f"{partial.parent} is not one folder to all nodes ({elsewhere[0]} is missing): set run_root")
    files[VALUES] = _entry(partial / VALUES)
    write_synced(partial / MANIFEST, json.dumps({"files": files}, indent=2) + "\n")
    sync_folder(partial)
    if folder.exists() and damage(folder) is None:
        return
    if folder.exists():
        _set_aside(folder)
    partial.rename(folder)
    sync_folder(folder.parent)
    if keep is not None:
        prune(folder.parent, keep)


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}")


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


# ---------------------------------------------------------------------------------------------------------------- read


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Load a checkpoint into a model and its optimiser; the plain values that were saved with it. UserError when it
    holds other tensors. Collective, unless there is no optimiser: then this process reads alone."""
    values = load(folder, tensors_of(model, optimizer), alone=optimizer is None)
    model.load_state_dict(model.state_dict(), assign=False)  # modules learn that their values have been loaded
    return values


def load(folder: Path, tensors: Mapping[str, Tensor], alone: bool = False) -> dict[str, Any]:
    """Read a checkpoint that `newest` has verified into the tensors, in place, whatever ranks and sharding it was
    written from; the plain values. The names must be all that it has of the model, of the optimiser or of both.
    Collective; alone: this process reads for itself. UserError for other names, shapes or dtypes."""
    values = values_of(folder)
    compare(folder, tensors)
    reader = HuggingFaceStorageReader(str(folder))
    with _readable(folder):
        _quietly(dcp.load)(dict(tensors), storage_reader=reader, no_dist=alone or _ranks() == 1)
    return values


def compare(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """UserError when a checkpoint holds tensors of other names, shapes or dtypes than these, which may be without
    memory (on the meta device)."""
    with _readable(folder):
        _compare(folder, _saved(HuggingFaceStorageReader(str(folder))), tensors)


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Errors of its readers as UserError."""
    try:
        yield
    except (OSError, CheckpointException, safetensors.SafetensorError) as error:
        raise UserError(f"cannot read checkpoint {folder}: {_reason(error)}") from error


def values_of(folder: Path) -> dict[str, Any]:
    """The plain values of a checkpoint that `newest` has verified."""
    values = json.loads((folder / VALUES).read_text())
    if values.get("format") != FORMAT:
        found = values.get("format")
        raise UserError(f"{folder} is of format {found}; this qtrain reads {FORMAT}: use the qtrain that wrote it")
    return values


def whole_number(folder: Path, values: Mapping[str, Any], name: str) -> int:
    """One of the plain values of a checkpoint. UserError where it is no whole number: another program's checkpoint."""
    if type(values.get(name)) is not int or values[name] < 0:
        raise UserError(f"{folder} is no checkpoint of a run: its {name} is {values.get(name)!r}; move it away")
    return values[name]


def _saved(reader: HuggingFaceStorageReader) -> dict[str, TensorStorageMetadata]:
    of_all = reader.read_metadata().state_dict_metadata
    return {name: of for name, of in of_all.items() if isinstance(of, TensorStorageMetadata)}


def _compare(folder: Path, saved: Mapping[str, TensorStorageMetadata], tensors: Mapping[str, Tensor]) -> None:
    kinds = tuple(kind for kind in (MODEL, OPTIMIZER) if any(name.startswith(kind) for name in tensors))
    found = {name: (tuple(of.size), of.properties.dtype) for name, of in saved.items() if name.startswith(kinds)}
    wanted = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    differing = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if differing:
        name = differing[0]
        raise UserError(
            f"{folder} holds another state: {name} is {found.get(name, 'not there')}, wanted is "
            f"{wanted.get(name, 'nothing')}, and {len(differing) - 1} more differ"
        )


def weights(folder: Path) -> dict[str, Tensor]:
    """The whole weights of a checkpoint on the CPU, by the names of the model's state dict, in one process and without
    torch.distributed. A tied weight is there once."""
    saved = _saved(HuggingFaceStorageReader(str(folder)))
    tensors = {
        name: torch.empty(of.size, dtype=of.properties.dtype) for name, of in saved.items() if name.startswith(MODEL)
    }
    load(folder, tensors, alone=True)
    return {name.removeprefix(MODEL): tensor for name, tensor in tensors.items()}


def shapes(folder: Path) -> dict[str, torch.Size]:
    """Of the weights of a checkpoint, by the names of the model's state dict."""
    with _readable(folder):
        saved = _saved(HuggingFaceStorageReader(str(folder)))
    return {name.removeprefix(MODEL): of.size for name, of in saved.items() if name.startswith(MODEL)}


def holds_codes(folder: Path) -> bool:
    """Whether a checkpoint is of a model whose layers are packed."""
    return any(name.endswith(".codes") for name in shapes(folder))


def weight(folder: Path, name: str) -> Tensor:
    """One of the weights of a checkpoint, whole, on the CPU. Nothing else is read."""
    with _readable(folder):
        reader = HuggingFaceStorageReader(str(folder))
        of = _saved(reader)[MODEL + name]
        tensor = torch.empty(of.size, dtype=of.properties.dtype)
        _quietly(dcp.load)({MODEL + name: tensor}, storage_reader=reader, no_dist=True)
    return tensor


def write_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors as one safetensors file, for other programs: on disk and whole, or not there. UserError where it
    cannot be written."""
    partial = _hidden(path)
    try:
        safetensors.torch.save_file(dict(tensors), partial, metadata={"format": "pt", **metadata})
        sync_folder(partial)
        partial.replace(path)
        sync_folder(path.parent)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot write {path}: {_reason(error)}") from error
    finally:
        partial.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------- folders


def folder_of(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, oldest first."""
    named = [(_NAME.fullmatch(path.name), path) for path in directory.glob("step-*")]
    return sorted((int(match[1]), path) for match, path in named if match)


def newest(directory: Path, at_most: float = math.inf, set_aside: bool = False) -> tuple[int, Path] | None:
    """(step, folder) of the newest whole checkpoint of at most so many steps, None where there is none. Checksums are
    read of the newest alone, of an older one where that is damaged.

    set_aside: damaged ones are renamed to *.damaged, neither tried again nor lost; for the process that holds the run's
    lock. Otherwise nothing is touched: another process may be writing there.
    """
    for step, folder in reversed(list_checkpoints(directory)):
        if step > at_most:
            continue
        problem = damage(folder)
        if problem is None:
            return step, folder
        if set_aside:
            log.warning("checkpoint %s is damaged (%s): set aside as %s", folder, problem, _set_aside(folder).name)
    return None


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if every file is as it was written."""
    try:
        if not folder.is_dir():
            return "it is no folder"
        files = json.loads((folder / MANIFEST).read_text())["files"]
        there = {path.name: path.stat().st_size for path in folder.iterdir()}
        for name, entry in {VALUES: None, **files}.items():
            if entry is None or there.get(name) != entry["bytes"]:
                return f"{name} is not listed" if entry is None else f"{name} has {there.get(name, 'no')} bytes"
        strange = [name for name in there.keys() - files.keys() if name.endswith(".safetensors")]
        if strange:
            return f"{strange[0]} is not listed"
        wrong = next((name for name, entry in files.items() if _entry(folder / name) != entry), None)
        if wrong is not None:
            return f"wrong checksum of {wrong}"
        step = json.loads((folder / VALUES).read_text())["step"]
        return None if folder.name == folder_of(folder, step).name else f"it holds step {step}"
    except Exception as error:  # untrusted bytes: each kind of damage raises an exception of its own
        return first_line(error)


def _set_aside(folder: Path) -> Path:
    number, aside = 2, folder.with_name(f"{folder.name}.damaged")
    while aside.exists():
        number, aside = number + 1, folder.with_name(f"{folder.name}.{number}.damaged")
    return folder.rename(aside)


def tidy(directory: Path, idle_seconds: float = 0.0) -> None:
    """Remove what killed writers left. For the process that holds the lock; in a folder that runs share, idle_seconds
    says how long nothing must have been written there."""
    for partial in directory.glob(".step-*"):
        try:
            last = max(path.stat().st_mtime for path in (partial, *partial.glob("*")))
        except FileNotFoundError:  # its writer has finished meanwhile
            continue
        if time.time() - last >= idle_seconds:
            _remove(partial)


def prune(directory: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for _, folder in list_checkpoints(directory)[:-keep]:
        _discard(folder)


def _discard(folder: Path) -> None:
    _remove(folder.rename(_hidden(folder)))  # a kill midway leaves something to tidy up, and no damaged checkpoint


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def refuse_earlier_format(directory: Path) -> None:
    """UserError where a directory holds checkpoints of the version before, which were files."""
    old = sorted(directory.glob("step-*.ckpt"))
    if old:
        raise UserError(
            f"{old[-1]} was written by an earlier version of qtrain, whose checkpoints this one does not read. Go on "
            "with that version, or set force=true to start the run anew; its metrics and results are still read"
        )


# --------------------------------------------------------------------------------------------------------------- ranks


def _ranks(group: dist.ProcessGroup | None = None) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def _rank(group: dist.ProcessGroup | None) -> int:
    return dist.get_rank(group) if _ranks(group) > 1 else 0


def _agreed(action: Callable[[], T], group: dist.ProcessGroup | None) -> list[T]:
    """What the action returned, of each rank; an error of one rank is raised on all."""
    result: T | Exception
    try:
        result = action()
    except Exception as error:  # any error must reach the others, who wait
        result = error if isinstance(error, OSError | UserError) else RuntimeError(first_line(error))
    results: list[Any] = [result]
    if _ranks(group) > 1:
        results = [None] * _ranks(group)
        dist.all_gather_object(results, result, group=group)
    for one in results:
        if isinstance(one, Exception):
            raise one
    return results


def _reason(error: BaseException) -> str:
    """The cause in one line: torch.distributed.checkpoint wraps what each rank raised."""
    causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    cause = next((one for one in causes if isinstance(one, OSError)), causes[0])
    return (isinstance(cause, OSError) and cause.strerror) or first_line(cause)


def _quietly(function: Callable[..., T]) -> Callable[..., T]:
    """torch warns when it saves or loads in one process, which is no mistake here."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    return function
