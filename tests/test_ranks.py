"""Several processes train what one does: by DDP and FSDP2, started by torchrun, by Fabric, and stopped in every way."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import lightning
import pytest
import torch
from conftest import be_a_command, write_corpus
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import qtrain.train
from qtrain.data.batches import TokenBatches
from qtrain.data.prepare import prepare
from qtrain.errors import UserError
from qtrain.plan import make_plan
from qtrain.train import compose
from qtrain.training import checkpoint, parallel, session
from qtrain.training.build import build_model
from qtrain.training.causal_lm import CausalLM
from qtrain.training.checkpoint import list_checkpoints
from qtrain.training.communication import plan_communication
from qtrain.training.observers import Observer
from qtrain.training.world import World, find_world

ROOT = Path(__file__).parents[1]
RECIPES = ("quest", "quartet_v1", "quartet_ii", "nvidia_nvfp4", "lsq", "mxfp8")
STEPS = 3
SMALL = [
    "backend=auto",
    "model.dim=128",  # which quest's rotation wants
    "model.ffn_dim=128",
    "model.n_layers=1",
    "model.seq_len=16",
    f"trainer.tokens={STEPS * 32}",
    "trainer.batch_tokens=32",  # two sequences, one for each rank
    "trainer.micro_batch_size=1",
    "trainer.device=cpu",
    "trainer.precision=32-true",  # whatever units the processor has
    "callbacks.log_every_steps=1",
    "callbacks.val_every_steps=100",
    "callbacks.checkpoint_every_steps=100",
    "callbacks.progress_bar=false",
    "data.source=text",
    "data.val_tokens=64",
]
LONG = ["model.dim=64", "model.ffn_dim=64", "trainer.tokens=1280", "recipe=quartet_v1"]

forked = multiprocessing.get_context("forkserver")
forked.set_forkserver_preload(["qtrain.training.session", "qtrain.train", "torch.distributed.tensor", "pytest"])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), ["low", "precision", "training", "needs", "care", "\n"], 40)


def settings(corpus: Path, run_dir: Path, *more: str) -> list[str]:
    paths = [f"data.files={corpus}/*.txt", f"data.cache_dir={corpus}/cache", f"run_dir={run_dir}"]
    return [*SMALL, *paths, *more]


def free_port() -> int:
    """Below those that the system gives away by itself, and apart from those of other workers of this suite: the ports
    that follow are used too."""
    first = 12_000 + 2_000 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 10)
    while True:
        port = first + random.randrange(1_900)
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port


def environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """As torchrun sets it for each rank."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    return address | {name: str(number) for name, number in numbers.items()}


def on_a_rank(work: Callable[..., None], rank: int, ranks: int, port: int, shown: Path, arguments: Any) -> None:
    be_a_command(shown)
    os.environ |= environment(rank, ranks, port)
    work(*arguments)


class Ranks:
    """Processes that have begun; each calls work(*arguments)."""

    def __init__(
        self, folder: Path, work: Callable[..., None], *arguments: Any, ranks: int = 2, only: int | None = None
    ):
        self.shown = [folder / f"rank{rank}.out" for rank in range(ranks)]
        port = free_port()
        self.processes = [
            forked.Process(target=on_a_rank, args=(work, rank, ranks, port, self.shown[rank], arguments))
            for rank in (range(ranks) if only is None else [only])
        ]
        for process in self.processes:
            process.start()

    def ended(self, seconds: float = 60.0) -> list[int | None]:
        """Their exit codes. AssertionError for a process that has not ended by then."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hung = [process for process in self.processes if process.is_alive()]
        for process in hung:
            process.kill()
        assert not hung, self.said()
        return [process.exitcode for process in self.processes]

    def said(self) -> str:
        return "\n".join(path.read_text()[-3000:] for path in self.shown if path.exists())

    def wait_for(self, run_dir: Path, step: int) -> None:
        while steps_done(run_dir) < step:
            assert all(process.is_alive() for process in self.processes), self.said()
            time.sleep(0.002)

    def catches(self, rank: int, number: int) -> bool:
        """Whether the process has a handler for a signal."""
        status = Path(f"/proc/{self.processes[rank].pid}/status").read_text()
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
        return bool(int(caught.split()[1], 16) >> number - 1 & 1)

    def send(self, rank: int, number: int) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)


def command(arguments: list[str]) -> None:
    """What train.py does."""
    sys.argv = ["train.py", *arguments]
    qtrain.train.main()


def steps_done(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


def weights(run_dir: Path) -> dict[str, Tensor]:
    return checkpoint.weights(list_checkpoints(run_dir / "checkpoints")[-1][1])


def status(run_dir: Path) -> str:
    return json.loads((run_dir / "summary.json").read_text())["status"]


# ---------------------------------------------------------------------------------------------------------- same result

WAYS = {
    "ddp": ["trainer.strategy=ddp"],
    "fsdp2": ["trainer.strategy=fsdp2"],
    "ddp-checkpointed": ["trainer.strategy=ddp", "trainer.checkpoint_activations=full"],
    "fsdp2-checkpointed": ["trainer.strategy=fsdp2", "trainer.checkpoint_activations=selective"],
}
QUANTIZED = ["trainer.strategy=fsdp2", "trainer.all_gather=quantized"]
GATHERED = {
    "quantized": QUANTIZED,
    "quantized-checkpointed": [*QUANTIZED, "trainer.checkpoint_activations=full"],
}
CASES = [(recipe, way) for recipe in RECIPES for way in WAYS]
CASES += [(recipe, way) for recipe in ("quest", "quartet_v1") for way in GATHERED]  # test_gather has all recipes


class Moved(TorchDispatchMode):
    """Adds up the whole tensors of torch.distributed's collectives within it, by kind."""

    WHOLE: ClassVar = {  # where among its arguments a collective has the whole tensor
        torch.ops.c10d._allgather_base_.default: ("all-gather", 0),
        torch.ops.c10d._reduce_scatter_base_.default: ("reduce-scatter", 1),
        torch.ops.c10d.allreduce_.default: ("all-reduce", 0),
    }

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in self.WHOLE:
            kind, at = self.WHOLE[function]
            tensors = args[at] if isinstance(args[at], list) else [args[at]]
            self.found[kind] = self.found.get(kind, 0) + sum(x.nbytes for x in tensors if x.nbytes > 64)
        return function(*args, **(kwargs or {}))

    def per_step(self) -> dict[str, float]:
        """Of all steps but the first; numbers of at most 64 bytes do not count."""
        return {kind: total / (STEPS - 1) for kind, total in self.found.items() if total}


class Watch(Observer):
    """What collectives moved in the steps after the first, in which learned scales get their start; without validation
    and checkpoints."""

    def __init__(self) -> None:
        self.moved = Moved()

    def on_step_start(self, step: int) -> None:
        if step > 0:
            self.moved.__enter__()

    def on_step_end(self, step: int) -> None:  # so many steps are done
        if step > 1:
            self.moved.__exit__(None, None, None)


def all_ways(corpus: Path, folder: Path) -> None:
    """Every recipe by every way, one run after the other; what this rank holds of the state, and what collectives of
    weights and gradients moved in a step, in bytes of the whole tensors."""
    port, held, moved = int(os.environ["MASTER_PORT"]), {}, {}
    exact = session.train

    def counted(run: Any, *arguments: Any) -> int:
        counting = Watch()
        run.observers = [run.observers[0], counting, *run.observers[1:]]  # before the one that validates
        result = exact(run, *arguments)
        moved[name] = counting.moved.per_step()
        moments = [value for state in run.optimizer.state.values() for value in state.values() if value.ndim]
        tensors = [*run.module.parameters(), *moments]
        held[name] = sum((x.to_local() if isinstance(x, DTensor) else x).nbytes for x in tensors)
        return result

    session.train = counted
    for number, (recipe, way) in enumerate(CASES):
        name = f"{recipe}-{way}"
        os.environ["MASTER_PORT"] = str(port + number)
        more = ["trainer.devices=2", "trainer.grad_clip=null", f"recipe={recipe}", *(WAYS | GATHERED)[way]]
        session.run(compose(settings(corpus, folder / name, *more)))
    (folder / f"held{os.environ['RANK']}.json").write_text(json.dumps({"held": held, "moved": moved}))


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directories: <recipe>-<way> of two ranks, <recipe> of one process."""
    folder = tmp_path_factory.mktemp("ranks")
    for recipe in RECIPES:
        more = ["trainer.grad_clip=null", f"recipe={recipe}"]
        session.run(compose(settings(corpus, folder / recipe, *more)))
    ranks = Ranks(folder, all_ways, corpus, folder)
    assert ranks.ended(300) == [0, 0], ranks.said()
    return folder


@pytest.mark.parametrize(("recipe", "way"), CASES)
def test_two_ranks_end_as_one_process(trained: Path, recipe: str, way: str) -> None:
    """Bit for bit, where the sum of two gradients is the same in either order: of a learned scale it is a sum over all
    elements, which ranks cut elsewhere."""
    alone, ours = weights(trained / recipe), weights(trained / f"{recipe}-{way}")
    assert alone.keys() == ours.keys()
    for name, weight in alone.items():
        if recipe == "lsq":
            torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=1e-6, msg=name)
        else:
            assert torch.equal(ours[name], weight), name


def under_a_stock_trainer(corpus: Path, folder: Path) -> None:
    config = compose(settings(corpus, folder, "trainer.devices=2", "trainer.grad_clip=null", "recipe=quartet_v1"))
    plan = make_plan(config, vocab_size=257)
    module = CausalLM(config, plan, build_model(config, 257))
    text = prepare(config.data, config.tokenizer, progress=False)
    rank = int(os.environ["RANK"])
    data = TokenBatches(text, seq_len=16, seed=config.seed, micro_batch_size=1, num_workers=0, rank=rank, ranks=2)
    batches = list(data.train(0, STEPS * plan.micro_batches * data.per_batch))
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_steps=plan.steps, use_distributed_sampler=False,
        accumulate_grad_batches=plan.micro_batches, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))  # pyright: ignore[reportArgumentType]
    torch.save(module.model.state_dict(), folder / f"stock{rank}.pt")


def test_a_stock_trainer_on_two_ranks_trains_the_same(trained: Path, corpus: Path) -> None:
    ranks = Ranks(trained, under_a_stock_trainer, corpus, trained)
    assert ranks.ended() == [0, 0], ranks.said()
    ours = weights(trained / "quartet_v1-ddp")
    for rank in range(2):
        for name, weight in torch.load(trained / f"stock{rank}.pt").items():
            assert torch.equal(ours[name], weight), name


def test_a_rank_holds_half_of_what_is_sharded(trained: Path) -> None:
    for rank in range(2):
        held = json.loads((trained / f"held{rank}.json").read_text())["held"]
        for recipe in RECIPES:
            assert held[f"{recipe}-fsdp2"] <= 0.55 * held[f"{recipe}-ddp"]


@pytest.mark.parametrize(("recipe", "way"), CASES)
def test_ranks_send_what_the_plan_says(trained: Path, corpus: Path, recipe: str, way: str) -> None:
    more = ["trainer.devices=2", f"recipe={recipe}", "model.vocab_size=257", *(WAYS | GATHERED)[way]]
    config = compose(settings(corpus, trained / "planned", *more))
    planned: dict[str, int] = {}
    for each in plan_communication(config, make_plan(config)).collectives:
        kind = each.kind.split(", ")[1].split()[0]
        planned[kind] = planned.get(kind, 0) + each.times * each.payload
    assert json.loads((trained / "held0.json").read_text())["moved"][f"{recipe}-{way}"] == planned


def test_micro_batches_and_clipping_on_two_ranks(corpus: Path, tmp_path: Path) -> None:
    more = ["recipe=bf16", "trainer.batch_tokens=64", "trainer.tokens=320"]
    session.run(compose(settings(corpus, tmp_path / "one", *more)))
    alone = weights(tmp_path / "one")
    run_dir = tmp_path / "two"
    for way in ("ddp", "fsdp2"):  # the second moves the first aside
        watched = ["callbacks.telemetry_every_steps=2", "callbacks.telemetry_gradients=true"]
        more_ = [*more, *watched, "trainer.devices=2", f"trainer.strategy={way}", "force=true"]
        ranks = Ranks(tmp_path, command, settings(corpus, run_dir, *more_))
        assert ranks.ended() == [0, 0], ranks.said()
        for name, weight in weights(run_dir).items():
            torch.testing.assert_close(weight, alone[name], rtol=2e-4, atol=2e-6, msg=name)
    assert status(run_dir) == status(tmp_path / "two.old1") == "finished"


def test_two_groups_of_two_ranks_train_as_one_process(corpus: Path, tmp_path: Path) -> None:
    """Up to the order in which the gradients of four ranks are summed."""
    more = ["recipe=bf16", "trainer.batch_tokens=64", "trainer.tokens=192"]
    session.run(compose(settings(corpus, tmp_path / "one", *more)))
    groups = ["trainer.devices=4", "trainer.strategy=fsdp2", "trainer.sharding_groups=2"]
    ranks = Ranks(tmp_path, command, settings(corpus, tmp_path / "run", *more, *groups), ranks=4)
    assert ranks.ended() == [0] * 4, ranks.said()
    alone = weights(tmp_path / "one")
    for name, weight in weights(tmp_path / "run").items():
        torch.testing.assert_close(weight, alone[name], rtol=1e-5, atol=1e-6, msg=name)


# ------------------------------------------------------------------------------------------------------------ endings


def told_by_rank_0(arguments: list[str]) -> None:
    """As `command`, of a rank 1 that sees no checkpoint, as where a file system shows it late, and has no logger."""
    if os.environ["RANK"] == "1":
        session.newest = lambda *_, **__: None
        session.build_loggers = lambda *_: pytest.fail("rank 1 makes loggers")
    command(arguments)


def test_a_signal_to_one_rank_stops_both_and_the_run_goes_on(corpus: Path, tmp_path: Path) -> None:
    """Twice: to rank 1, as from a person; to rank 0, as from a scheduler. Each time both save the same step. The run
    goes on with other parts of the weights on a rank, and other bytes between the ranks. Its optimiser has states in 8
    bits, which both save by shards."""
    undisturbed, run_dir = tmp_path / "undisturbed", tmp_path / "stopped"
    two = [*LONG, "trainer.devices=2", "trainer.grad_clip=null"]  # a norm is a sum, which shards round otherwise
    two += ["optimizer=adamw8bit", "optimizer.block_size=64"]
    ranks = Ranks(tmp_path, command, settings(corpus, undisturbed, *two))
    assert ranks.ended() == [0, 0], ranks.said()
    for rank, number, code, way in ((1, signal.SIGTERM, 130, QUANTIZED), (0, signal.SIGUSR2, 75, WAYS["fsdp2"])):
        before = steps_done(run_dir)
        ranks = Ranks(tmp_path, command, settings(corpus, run_dir, *two, *way))
        ranks.wait_for(run_dir, before + 5)
        at = steps_done(run_dir)
        ranks.send(rank, number)
        assert ranks.ended() == [code, code], ranks.said()
        saved = list_checkpoints(run_dir / "checkpoints")[-1][0]
        assert saved == steps_done(run_dir) and at <= saved < 40
        assert status(run_dir) == "interrupted"
    ranks = Ranks(tmp_path, told_by_rank_0, settings(corpus, run_dir, *two, *QUANTIZED))
    assert ranks.ended() == [0, 0], ranks.said()
    ours, theirs = weights(run_dir), weights(undisturbed)
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())


def test_a_rank_that_dies_ends_the_other(corpus: Path, tmp_path: Path) -> None:
    for rank in range(2):
        run_dir = tmp_path / f"{rank}"
        ranks = Ranks(tmp_path, command, settings(corpus, run_dir, *LONG, "trainer.devices=2"))
        ranks.wait_for(run_dir, 3)
        ranks.send(rank, signal.SIGKILL)
        codes = ranks.ended(30)
        assert (codes[rank], codes[1 - rank]) == (-signal.SIGKILL, 75), ranks.said()
    assert status(tmp_path / "1") == "interrupted"


def calling_the_roll(arguments: list[str]) -> None:
    parallel.ROLL_CALL_SECONDS = 1.0
    command(arguments)


def test_a_rank_that_stops_answering_ends_the_other_and_is_named(corpus: Path, tmp_path: Path) -> None:
    waiting = settings(corpus, tmp_path / "run", *LONG, "trainer.devices=2", f"trainer.timeout_minutes={5 / 60}")
    ranks = Ranks(tmp_path, calling_the_roll, waiting)
    ranks.wait_for(tmp_path / "run", 3)
    ranks.send(1, signal.SIGSTOP)
    ranks.processes[0].join(30)
    ranks.processes[1].kill()
    assert ranks.processes[0].exitcode == 75, ranks.said()
    assert "rank 1 does not answer for 0:00:05" in ranks.said().replace("\n", " ")
    assert status(tmp_path / "run") == "interrupted"


def impatient(seconds: float, arguments: list[str]) -> None:
    parallel.MEETING_SECONDS = seconds
    command(arguments)


def test_ranks_that_never_meet_end_soon(corpus: Path, tmp_path: Path) -> None:
    assert parallel.MEETING_SECONDS < 60
    arguments = settings(corpus, tmp_path / "run", "trainer.devices=2")
    for rank in range(2):
        ranks = Ranks(tmp_path, impatient, 1.5, arguments, only=rank)
        assert ranks.ended(20) == [75], ranks.said()
        assert "2 processes did not meet within 2 s" in ranks.said()
    waiting = Ranks(tmp_path, impatient, 50.0, arguments, only=0)
    while not waiting.catches(0, signal.SIGTERM):
        time.sleep(0.01)
    time.sleep(1.0)  # until it waits for the other
    waiting.send(0, signal.SIGTERM)
    assert waiting.ended(5) == [130], waiting.said()
    assert not (tmp_path / "run").exists()


def test_the_wrong_number_of_processes_is_refused_before_anything_is_written(corpus: Path, tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, command, settings(corpus, tmp_path / "run"))
    assert ranks.ended() == [2, 2]
    assert "error: the launcher started 2 processes (WORLD_SIZE)" in ranks.said()
    assert not (tmp_path / "run").exists()


def test_a_refusal_of_rank_0_ends_all_and_is_said_once(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "strange").touch()
    ranks = Ranks(tmp_path, command, settings(corpus, tmp_path / "run", "trainer.devices=2"))
    assert ranks.ended() == [2, 2]
    assert ranks.said().count("error:") == 1 and "holds no run" in ranks.said()


# ----------------------------------------------------------------------------------------------------------- launchers

FOUND = [
    ({}, (1, 1), World(1, 0, "nobody")),
    ({"RANK": "1"}, (1, 1), World(1, 0, "nobody")),
    ({}, (2, 1), World(2, 0, "fabric", starts_others=True)),
    ({"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2"}, (2, 1), World(2, 1, "fabric")),
    (environment(1, 2, 1), (2, 1), World(2, 1, "torchrun")),
    ({"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}, (2, 2), World(4, 3, "slurm")),
    ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, (1, 1), World(1, 0, "nobody")),
    (
        {"MASTER_ADDR": "a", "MASTER_PORT": "1", "NODE_RANK": "1"},
        (2, 2),
        World(4, 2, "fabric", starts_others=True),
    ),
]
REFUSED = [
    (environment(0, 2, 1), (1, 1), r"started 2 processes \(WORLD_SIZE\), and .*devices=1 x .*num_nodes=1 is 1"),
    ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, (1, 1), r"started 2 processes \(SLURM_NTASKS\)"),
    ({"SLURM_NTASKS": "2"}, (2, 1), "start it with srun"),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, (2, 1), "use torchrun or srun"),
    ({"WORLD_SIZE": "2", "RANK": "1"}, (2, 1), "use torchrun or srun"),
    ({}, (2, 2), "set MASTER_ADDR, MASTER_PORT and NODE_RANK"),
]


def trainer(sizes: tuple[int, int]) -> Any:
    return compose([f"trainer.devices={sizes[0]}", f"trainer.num_nodes={sizes[1]}"]).trainer


@pytest.mark.parametrize(("environment", "sizes", "world"), FOUND)
def test_which_process_this_one_is(environment: dict[str, str], sizes: tuple[int, int], world: World) -> None:
    assert find_world(trainer(sizes), environment) == world


@pytest.mark.parametrize(("environment", "sizes", "message"), REFUSED)
def test_a_launcher_that_does_not_fit_is_refused(
    environment: dict[str, str], sizes: tuple[int, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        find_world(trainer(sizes), environment)


def started(launcher: Sequence[str], arguments: list[str], output: Path) -> subprocess.Popen[bytes]:
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    with output.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, *launcher, "train.py", *arguments],
            cwd=ROOT, env=os.environ | environment, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip


def test_the_real_commands(corpus: Path, tmp_path: Path) -> None:
    """`python train.py trainer.devices=2`, whose parent gets SIGTERM; then torchrun, with sharded weights."""
    run_dir, output = tmp_path / "run", tmp_path / "shown"
    arguments = settings(corpus, run_dir, *LONG, "trainer.devices=2")
    process, deadline = started([], arguments, output), time.monotonic() + 180
    try:
        while steps_done(run_dir) < 3:
            assert process.poll() is None and time.monotonic() < deadline, output.read_text()
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 130, output.read_text()
    finally:
        process.kill()  # where it hangs; the process that it started follows
    assert "same command continues" in output.read_text()
    saved = list_checkpoints(run_dir / "checkpoints")[-1][0]
    assert 3 <= saved == steps_done(run_dir) < 40

    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = started(torchrun, [*arguments, "trainer.strategy=fsdp2"], output)
    assert process.wait(120) == 0, output.read_text()
    assert f"resuming at step {saved}" in output.read_text()
    assert status(run_dir) == "finished"
