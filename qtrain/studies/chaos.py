"""A real run under random faults, which must end as if there had been none.

The same small run is started again and again. Each start meets one fault: a signal to a rank or to the process that
launched the ranks, a file damaged between two starts, a full disk, a killed loader process. After some faults the run
may finish; then its weights, bit for bit, and every line of its metrics are compared with those of a run that nothing
disturbed. Where each fault strikes is a function of (seed, number of the fault). What happened so far is in chaos.json:
the same command goes on from there.

    chaos/
        undisturbed/    round-000/ ...    run directories
        corpus/  cache/  pristine/        the text, its tokens, and a copy of them to restore
        chaos.json                        every fault, and what became of it
"""

from __future__ import annotations

import faulthandler
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import qtrain
import qtrain.train
from qtrain.config.settings import configs_dir
from qtrain.runs.files import write_atomically

STEPS = 40
SETTINGS = (
    "recipe=quartet_v1",  # stochastic rounding in all of the backward
    "backend=reference",
    "model.dim=64",
    "model.n_layers=1",
    "model.ffn_dim=96",
    "model.seq_len=32",
    f"trainer.tokens={STEPS * 128}",
    "trainer.batch_tokens=128",
    "trainer.micro_batch_size=2",
    "trainer.device=cpu",
    "callbacks.log_every_steps=1",
    "callbacks.val_every_steps=7",
    "callbacks.checkpoint_every_steps=3",
    "callbacks.keep_checkpoints=3",
    "callbacks.progress_bar=false",
    "data.source=text",
    "data.val_tokens=256",
)
TIMINGS = {"tokens_per_second", "data_wait", "memory_bytes"}
FAULTS_A_ROUND = 20
HUNG_SECONDS = 60.0

# Every process is forked from a server that has imported everything: a start costs a second, not ten.
forked = multiprocessing.get_context("forkserver")
forked.set_forkserver_preload(["qtrain.studies.chaos", "qtrain.training.session"])


class FinishedError(Exception):
    """The run ended well before the fault came."""


class StuckError(Exception):
    """The run ended or waits where it should go on. Says what it showed."""


class HungError(Exception):
    """Processes still run long after a fault. Says what they showed."""


# ---------------------------------------------------------------------------------------------------------------- start


def _command(arguments: list[str], ranks: int, file_bytes: int, folder: Path, output: Connection) -> None:
    """What `python train.py` does, or `torchrun --nproc-per-node <ranks> train.py`, in the process that calls this. No
    file can grow beyond file_bytes."""
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    output.close()
    os.chdir(configs_dir().parent)
    # A command's loader processes are forked from it; a process of a forkserver would ask that server for them.
    multiprocessing.set_start_method(None, force=True)
    if ranks == 1:
        _rank(arguments, file_bytes, folder)
        return
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.05,
        start_method="fork",
    )
    elastic_launch(config, _rank)(arguments, file_bytes, folder)


def _rank(arguments: list[str], file_bytes: int, folder: Path) -> None:
    torch.set_num_threads(1)
    faulthandler.enable()
    rank = int(os.environ.get("RANK", "0"))
    setattr(rank_zero_only, "rank", rank)  # noqa: B010  Lightning read it when it was imported
    with (folder / "pids").open("a") as file:
        file.write(f"{rank} {os.getpid()}\n")
    os.fsync = _noting(os.fsync, folder / "synced")
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))
    sys.argv = ["train.py", *arguments]
    qtrain.train.main()


def _noting(sync: Callable[[int], None], log: Path) -> Callable[[int], None]:
    """os.fsync, which notes how much of which file is on disk."""
    notes = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def fsync(file: int) -> None:
        sync(file)
        status = os.fstat(file)
        os.write(notes, f"{status.st_ino} {status.st_size}\n".encode())

    return fsync


class Start:
    """One start of the run: its launcher (of a single rank: the rank itself), its ranks, and what they show."""

    def __init__(self, run_dir: Path, folder: Path, arguments: list[str], ranks: int, file_bytes: int):
        self.run_dir, self.folder, self.number_of_ranks = run_dir, folder, ranks
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "pids").unlink(missing_ok=True)
        self._lines = self._fewest = _loss_lines(run_dir)
        self.began = time.monotonic()
        output, theirs = forked.Pipe(duplex=False)
        self.shown = b""
        self._reader = threading.Thread(target=self._read, args=(output,), daemon=True)
        self.launcher = forked.Process(target=_command, args=(arguments, ranks, file_bytes, folder, theirs))
        self.launcher.start()
        theirs.close()
        self._reader.start()

    def _read(self, output: Connection) -> None:
        while part := os.read(output.fileno(), 65536):
            self.shown += part

    @property
    def running(self) -> bool:
        return self._reader.is_alive()  # until the last process that can write has ended

    @property
    def ranks(self) -> dict[int, int]:
        """The process of each rank that has begun."""
        file = self.folder / "pids"
        lines = file.read_text().splitlines() if file.exists() else []
        return {int(rank): int(pid) for rank, pid in (line.split() for line in lines)}

    def new_steps(self) -> int:
        """How many steps this start has written to metrics.jsonl, after taking back those beyond its checkpoint."""
        lines = _loss_lines(self.run_dir)
        self._fewest = min(self._fewest, lines)
        return lines - self._fewest

    def reach(self, draw: random.Random) -> None:
        """Return at a random moment: a quarter while it starts, the rest within its first steps."""
        seconds = draw.uniform(0.0, 1.5) if draw.random() < 0.25 else math.inf
        steps, delay = draw.randint(1, 6), draw.uniform(0.0, 0.05)
        self.wait(lambda: time.monotonic() - self.began > seconds or self.new_steps() >= steps)
        time.sleep(delay)
        self.wait(lambda: len(self.ranks) == self.number_of_ranks)

    def wait(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 2 * HUNG_SECONDS
        while not ready():
            if not self.running:
                raise FinishedError if finished(self.run_dir) else StuckError(f"ended: {self.last_words()}")
            if time.monotonic() > deadline:
                self.kill_all()
                raise StuckError(f"did not go on for {2 * HUNG_SECONDS:.0f} s: {self.last_words()}")
            time.sleep(0.005)

    def ended(self) -> int | None:
        """The exit code, once every process has ended."""
        self._reader.join(HUNG_SECONDS)
        hung = self.running
        if hung:
            for process in self.ranks.values():
                self.send(process, signal.SIGABRT)  # where it stands
            time.sleep(1.0)
            self.kill_all()
        self.launcher.join()
        if hung:
            raise HungError(f"still ran {HUNG_SECONDS:.0f} s after the fault: {self.shown.decode(errors='replace')}")
        return self.launcher.exitcode

    def send(self, process: int | None, number: int) -> None:
        """A signal to a process that may have ended."""
        with suppress(ProcessLookupError):
            os.kill(process or self.launcher.pid or 0, number)

    def kill_all(self) -> None:
        for process in (self.launcher.pid, *self.ranks.values()):
            self.send(process, signal.SIGKILL)
        self._reader.join(5)

    def last_words(self) -> str:
        return self.shown.decode(errors="replace").strip()[-500:]


def _loss_lines(run_dir: Path) -> int:
    try:
        return (run_dir / "metrics.jsonl").read_text(errors="replace").count('"loss"')
    except FileNotFoundError:
        return 0


def finished(run_dir: Path) -> bool:
    try:
        return json.loads((run_dir / "summary.json").read_text())["status"] == "finished"
    except (OSError, ValueError, KeyError, TypeError):
        return False


# --------------------------------------------------------------------------------------------------------------- faults


class Round:
    """A run directory and how to start what trains there."""

    def __init__(self, root: Path, name: str, ranks: int):
        self.root, self.ranks = root, ranks
        self.run_dir, self.folder = root / name, root / "start"
        self.arguments = [
            *SETTINGS,
            f"trainer.devices={ranks}",
            f"data.files={root}/corpus/*.txt",
            f"data.cache_dir={root}/cache",
            f"run_dir={self.run_dir}",
        ]

    @contextmanager
    def started(self, *more: str, file_bytes: int = resource.RLIM_INFINITY) -> Iterator[Start]:
        """A start, with more settings; all its processes have ended when the block is left."""
        start = Start(self.run_dir, self.folder, [*self.arguments, *more], self.ranks, file_bytes)
        try:
            yield start
            start.ended()
        finally:
            if start.running:
                start.kill_all()

    def undisturbed(self) -> None:
        """Train to the end."""
        with self.started() as start:
            try:
                start.wait(lambda: False)
            except FinishedError:
                return

    def interrupted(self, draw: random.Random) -> None:
        with self.started() as start:
            start.reach(draw)
            for process in start.ranks.values():
                start.send(process, signal.SIGKILL)

    def newest_checkpoint(self) -> list[Path]:
        """Its files."""
        saved = sorted(path for path in self.run_dir.glob("checkpoints/step-*") if not path.name.endswith(".damaged"))
        return sorted(path for path in (saved[-1], *saved[-1].rglob("*")) if path.is_file()) if saved else []


Strike = Callable[[Round, random.Random], str]  # strikes a round; what it did, in words


def signal_to_a_rank(number: int) -> Strike:
    def fault(round: Round, draw: random.Random) -> str:
        with round.started() as start:
            start.reach(draw)
            rank = draw.choice(sorted(start.ranks))
            start.send(start.ranks[rank], number)
        return f"rank {rank}"

    return fault


def signal_to_all(first: int, then: int) -> Strike:
    """Two signals to every rank, each rank at its own time."""

    def fault(round: Round, draw: random.Random) -> str:
        with round.started() as start:
            start.reach(draw)
            skews = []
            for number in (first, then):
                for rank in draw.sample(sorted(start.ranks), len(start.ranks)):
                    skews.append(draw.uniform(0.0, 0.15))
                    start.send(start.ranks[rank], number)
                    time.sleep(skews[-1])
        return f"{', '.join(f'{1000 * skew:.0f}' for skew in skews)} ms apart"

    return fault


def signal_to_the_launcher(number: int) -> Strike:
    def fault(round: Round, draw: random.Random) -> str:
        with round.started() as start:
            start.reach(draw)
            start.send(None, number)
        return ""

    return fault


def truncated_checkpoint(round: Round, draw: random.Random) -> str:
    round.interrupted(draw)
    return _damaged(round.newest_checkpoint(), draw, _truncate)


def flipped_checkpoint(round: Round, draw: random.Random) -> str:
    round.interrupted(draw)
    return _damaged(round.newest_checkpoint(), draw, _flip)


def corrupted_shard(round: Round, draw: random.Random) -> str:
    round.interrupted(draw)
    files = sorted(path for path in (round.root / "cache").rglob("*") if path.is_file() and path.suffix == ".bin")
    return _damaged(files, draw, draw.choice((_truncate, _flip)))


def _damaged(files: list[Path], draw: random.Random, how: Callable[[Path, random.Random], str]) -> str:
    files = [path for path in files if path.stat().st_size]
    if not files:
        return "there was none yet"
    path = draw.choice(files)
    return f"{path.parent.name}/{path.name} {how(path, draw)}"


def _truncate(path: Path, draw: random.Random) -> str:
    size = draw.randrange(path.stat().st_size)
    os.truncate(path, size)
    return f"cut to {size} bytes"


def _flip(path: Path, draw: random.Random) -> str:
    position = draw.randrange(path.stat().st_size)
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1 << draw.randrange(8)]))
    return f"one bit of byte {position} flipped"


def full_disk(round: Round, draw: random.Random) -> str:
    """A file that cannot grow: the writer sees an error in the middle of its bytes, as on a full disk."""
    largest = max((path.stat().st_size for path in round.newest_checkpoint()), default=300_000)
    room = int(math.exp(draw.uniform(math.log(2_000), math.log(1.5 * largest))))
    with round.started(file_bytes=room) as start:
        try:
            start.wait(lambda: start.new_steps() >= 6)  # beyond a checkpoint
            start.send(None, signal.SIGTERM)
        except StuckError:
            pass
    return f"no file beyond {room} bytes"


def killed_loader(round: Round, draw: random.Random) -> str:
    with round.started("data.num_workers=2") as start:
        start.wait(lambda: start.new_steps() >= draw.randint(1, 4))
        rank = draw.choice(sorted(start.ranks))
        process = start.ranks[rank]
        children = Path(f"/proc/{process}/task/{process}/children")
        loaders = children.read_text().split() if children.exists() else []
        if loaders:
            start.send(int(draw.choice(loaders)), signal.SIGKILL)
        else:
            start.send(process, signal.SIGKILL)
    return f"one of {len(loaders)} of rank {rank}"


def lost_tails(round: Round, draw: random.Random) -> str:
    """The power goes: what no fsync has put on disk may be gone."""
    round.interrupted(draw)
    notes = (round.folder / "synced").read_text().splitlines() if (round.folder / "synced").exists() else []
    synced = {int(inode): int(size) for inode, size in (line.split() for line in notes)}
    lost = 0
    for path in sorted(path for path in round.run_dir.rglob("*") if path.is_file()):
        status = path.stat()
        safe = synced.get(status.st_ino, 0)
        if status.st_size > safe:
            size = draw.randint(safe, status.st_size)
            os.truncate(path, size)
            lost += status.st_size - size
    return f"{lost} bytes"


KINDS: dict[str, Strike] = {
    "SIGKILL to a rank": signal_to_a_rank(signal.SIGKILL),
    "SIGTERM to a rank": signal_to_a_rank(signal.SIGTERM),
    "SIGTERM, then SIGKILL to all": signal_to_all(signal.SIGTERM, signal.SIGKILL),
    "truncated checkpoint": truncated_checkpoint,
    "flipped checkpoint": flipped_checkpoint,
    "full disk": full_disk,
    "corrupted shard": corrupted_shard,
    "killed loader": killed_loader,
    "lost tails": lost_tails,
}
OF_SEVERAL_RANKS: dict[str, Strike] = {
    "SIGKILL to the launcher": signal_to_the_launcher(signal.SIGKILL),
    "SIGTERM to the launcher": signal_to_the_launcher(signal.SIGTERM),
}


def kinds(ranks: int) -> dict[str, Strike]:
    return KINDS if ranks == 1 else KINDS | OF_SEVERAL_RANKS


# ---------------------------------------------------------------------------------------------------------------- chaos


@dataclass
class Fault:
    """outcome: "" until the round has ended; then survived; hung, where processes did not end; stuck, where the run did
    not go on; wrong, where the finished run differs from the undisturbed one. said: what was shown, or what differs."""

    number: int
    round: int
    kind: str
    detail: str = ""
    outcome: str = ""
    said: str = ""
    seconds: float = 0.0


@dataclass
class State:
    """What chaos.json holds."""

    seed: int
    ranks: int
    kinds: list[str]
    round: int = 0
    faults: list[Fault] = field(default_factory=list)

    def unsettled(self) -> list[Fault]:
        """The faults of this round, which has not ended."""
        return [fault for fault in self.faults if fault.round == self.round and not fault.outcome]


class Chaos:
    def __init__(self, root: Path, seed: int, ranks: int, names: list[str]):
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        self.file = root / "chaos.json"
        self.state = State(seed, ranks, names)
        if self.file.exists():
            tree = json.loads(self.file.read_text())
            self.state = State(**tree | {"faults": [Fault(**fault) for fault in tree["faults"]]})
        self.reference = Round(root, "undisturbed", self.state.ranks)

    def run(self, faults: int, show: Callable[[Fault], None] = lambda fault: None) -> None:
        """Go on until there were so many faults, and the round of the last one is finished and compared."""
        self._prepare()
        while len(self.state.faults) < faults:
            self._inject(len(self.state.faults), show)
            if len(self.state.unsettled()) >= FAULTS_A_ROUND:
                self._finish_round(show)
        if self.state.unsettled():
            self._finish_round(show)

    def _prepare(self) -> None:
        corpus = self.root / "corpus"
        if not corpus.exists():
            corpus.mkdir()
            draw = random.Random(0)
            words = ["low", "precision", "training", "of", "language", "models", "needs", "care", "\n"]
            for number in range(40):
                (corpus / f"{number}.txt").write_text(" ".join(draw.choice(words) for _ in range(200)))
        if not finished(self.reference.run_dir):
            self.reference.undisturbed()
        if not (self.root / "pristine").exists():
            shutil.copytree(self.root / "cache", self.root / "pristine")

    @property
    def round(self) -> Round:
        return Round(self.root, f"round-{self.state.round:03}", self.state.ranks)

    def _inject(self, number: int, show: Callable[[Fault], None]) -> None:
        draw = random.Random(f"{self.state.seed} {number}")
        kind = self._kind(number)
        fault, began = Fault(number, self.state.round, kind), time.monotonic()
        try:
            fault.detail = kinds(self.state.ranks)[kind](self.round, draw)
        except FinishedError:
            self._finish_round(show)
            return
        except HungError as error:
            fault.outcome, fault.said = "hung", str(error)
        except StuckError as error:  # it never got as far: the fault before is to blame
            self._stuck(str(error), show)
            return
        fault.seconds = round(time.monotonic() - began, 1)
        self.state.faults.append(fault)
        self._save()
        show(fault)

    def _kind(self, number: int) -> str:
        """Each kind once among as many faults as there are kinds, in an order of their own."""
        names = self.state.kinds
        order = random.Random(f"{self.state.seed} order {number // len(names)}").sample(names, len(names))
        return order[number % len(names)]

    def _stuck(self, said: str, show: Callable[[Fault], None]) -> None:
        waiting = self.state.unsettled()
        if not waiting:
            raise RuntimeError(f"the run does not start, without any fault: {said}")
        for fault in waiting:
            fault.outcome = "survived"
        waiting[-1].outcome, waiting[-1].said = "stuck", said
        show(waiting[-1])
        self._next_round()

    def _finish_round(self, show: Callable[[Fault], None]) -> None:
        try:
            if not finished(self.round.run_dir):
                self.round.undisturbed()
        except StuckError as error:
            self._stuck(str(error), show)
            return
        difference = differences(self.round.run_dir, self.reference.run_dir)
        for fault in self.state.unsettled():
            fault.outcome, fault.said = ("wrong", difference) if difference else ("survived", "")
        self._next_round()

    def _next_round(self) -> None:
        shutil.rmtree(self.root / "cache")
        shutil.copytree(self.root / "pristine", self.root / "cache")
        self.state.round += 1
        self._save()

    def _save(self) -> None:
        write_atomically(self.file, json.dumps(asdict(self.state), indent=1) + "\n")

    def table(self) -> str:
        lines = [f"{'kind':<30}{'injected':>9}{'survived':>9}"]
        for kind in (*self.state.kinds, "all"):
            of_kind = [fault for fault in self.state.faults if kind in (fault.kind, "all")]
            survived = sum(fault.outcome == "survived" for fault in of_kind)
            lines.append(f"{kind:<30}{len(of_kind):>9}{survived:>9}")
        return "\n".join(lines)

    @property
    def survived(self) -> bool:
        return all(fault.outcome == "survived" for fault in self.state.faults)


def differences(run_dir: Path, other: Path) -> str:
    """How a finished run differs from another: its weights, or a line of its metrics. "" if it does not."""
    ours, theirs = (qtrain.load_run(path).state_dict() for path in (run_dir, other))
    unequal = [name for name, weight in ours.items() if not torch.equal(weight, theirs[name])]
    if unequal or ours.keys() != theirs.keys():
        return f"{len(unequal)} weights differ, the first is {unequal[0]}" if unequal else "other weights"
    pairs = zip(_metrics(run_dir), _metrics(other), strict=False)
    line = next((f"{one} instead of {two}" for one, two in pairs if one != two), "")
    if line or len(_metrics(run_dir)) != len(_metrics(other)):
        return line or f"{len(_metrics(run_dir))} lines of metrics instead of {len(_metrics(other))}"
    losses = [json.loads((path / "summary.json").read_text())["val_loss"] for path in (run_dir, other)]
    return "" if losses[0] == losses[1] else f"val_loss {losses[0]} instead of {losses[1]}"


def _metrics(run_dir: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]
