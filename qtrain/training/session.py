"""One run: identity, decision, loop.

All processes of a run meet (`parallel`). Rank 0 decides what is to be done: nothing, because the run has ended; or
training, from which checkpoint and in which directory. It alone opens and locks the directory, makes the loggers and
writes. All train (`loop`).
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.wrappers import _FabricModule
from lightning.pytorch.loggers import Logger
from rich.console import Console

from qtrain.config import Config, config_hash
from qtrain.data.batches import TokenBatches
from qtrain.data.corpus import Corpus, check_vocab
from qtrain.data.mixture import MixedCorpus
from qtrain.data.order import describe_epochs, epochs, repetition_warning
from qtrain.data.prepare import find, prepare, prepare_validation, same_text
from qtrain.data.tokenizer import tokenizer_files
from qtrain.errors import DivergedError, LostRankError, RefusedError, StoppedError, UserError, first_line
from qtrain.models import hf
from qtrain.models.decoder import Decoder
from qtrain.optim.groups import build_optimizer
from qtrain.plan import RunPlan, budget_tokens, make_plan
from qtrain.quant import check_backend
from qtrain.report.loss import plot_loss
from qtrain.runs.directory import RunDirectory
from qtrain.runs.environment import commit
from qtrain.runs.files import write_atomically
from qtrain.runs.status import FAILED, Status
from qtrain.runs.table import read_run, record, recorded
from qtrain.training import tune
from qtrain.training.activations import checkpoint_activations
from qtrain.training.build import build_model, build_teacher, build_without_weights, check_model, pick_device
from qtrain.training.causal_lm import CausalLM
from qtrain.training.checkpoint import Saver, newest, refuse_earlier_format, tidy, whole_number
from qtrain.training.communication import plan_communication
from qtrain.training.divergence import MOST_IN_A_ROW, Guard, RewindError
from qtrain.training.loop import Training, train
from qtrain.training.memory import check_state_fits, measure_memory
from qtrain.training.observers import Best, Measure, Observer, Profile, Progress, Recorder, Tasks, Telemetry, Validate
from qtrain.training.observers.loggers import build_loggers, check_logger, close_loggers, mirror_summary
from qtrain.training.observers.measure import by_source
from qtrain.training.observers.tasks import by_task, check_tasks
from qtrain.training.parallel import Ranks, blocks_of, check_strategy, is_lost_rank, joined
from qtrain.training.saves import Saves
from qtrain.training.speed import planned_time
from qtrain.training.stop import QUEUE_AGAIN, StopRequest
from qtrain.training.trunk import Trunk, metrics_beside, tell_of_shorter
from qtrain.training.world import World, find_world

log = logging.getLogger("qtrain")


@dataclass(frozen=True)
class Ended:
    """Why a run is not to be done again: its validation loss, if it has one, and what to say."""

    loss: float | None
    said: str


@dataclass(frozen=True)
class Decision:
    """What rank 0 has found in the run's directory: the checkpoint to go on from (None: from step 0), and how many of
    its steps are another run's."""

    checkpoint: Path | None
    shared_steps: int


def run(config: Config) -> float | None:
    """Do the run, or take it up where it stopped; the final validation loss in nats per token (None for a dry run, and
    on other ranks than 0).

    UserError before anything is trained for settings that cannot work here; DivergedError for a loss that is not
    finite; StoppedError, a KeyboardInterrupt, after a checkpoint when asked to stop.
    """
    world = World(1, 0, "nobody") if config.dry_run else find_world(config.trainer)  # of a dry run no rank is started
    console = Console(highlight=False, markup=False, quiet=world.rank > 0, width=None if sys.stdout.isatty() else 120)
    speak_through(console)
    device = pick_device(config)
    check_strategy(config)
    log.info("%s", check_model(config))
    directory = RunDirectory.of(config)
    if config.dry_run:
        check_tasks(config, Ranks())
        directory.check(config)
        plan = make_plan(config)
        memory = measure_memory(config, plan, device)
        sent = plan_communication(config, plan)
        corpus = find(config.data, config.tokenizer, budget_tokens=budget_tokens(config))
        read = describe_epochs(_text_read(config, plan, corpus)) if corpus else "known when the text is prepared"
        about = {
            "text_read": read,
            "memory": memory.describe(),
            "communication": sent.describe(),
            "time": planned_time(config, plan, sent),
            "device": str(device),
            "run_directory": str(directory.path),
        }
        console.print(plan.table(config, **about))
        if (excess := memory.excess(config, device)) is not None:
            log.warning("%s", excess)
        return None
    ended = _ended(config, directory) if world.alone else None  # before other processes are started
    if ended is None:
        with StopRequest() as stop, _together(config, world, device, stop) as (fabric, ranks):
            ended = ranks.decided(lambda: None if world.alone else _ended(config, directory))
            if ended is None:
                with _session(config, fabric, ranks, console) as session:
                    loss = session.run(stop)
                    ranks.meet()  # who leaves first would look lost to the others
                    return loss
    console.print(ended.said, soft_wrap=True)
    return ended.loss if world.rank == 0 else None


def _ended(config: Config, directory: RunDirectory) -> Ended | None:
    """UserError where the directory holds something else."""
    directory.check(config)
    if config.force:
        return None
    summary = directory.summary
    if directory.finished:
        loss = read_run(directory.path)["val_loss"]  # a number, or a UserError
        if not _read_this_text(config, summary):
            raise UserError(
                f"{directory.path} is finished, on data {summary.get('data_hash')}; the same settings now name another "
                "text. Restore the text, or set force=true to move that run aside and train on the new one"
            )
        _record(config, directory)
        said = f"{directory.path} is finished (validation loss {loss:.4f}); force=true runs it again"
        if config.callbacks.tasks and "tasks" not in summary:
            files = " ".join(config.callbacks.tasks)
            said += (
                f". It has no scores on callbacks.tasks; `qtrain evaluate {directory.path} --tasks {files}` takes them"
            )
        return Ended(loss, said)
    rows = recorded(Path(config.results)).get((config.name, config_hash(config)), []) if config.results else []
    row = next((row for row in rows if _read_this_text(config, row)), None)
    if row is not None:
        return Ended(row["val_loss"], f"{config.results} has this run's row (validation loss {row['val_loss']:.4f})")
    if summary.get("status") in FAILED and not config.retry_failed:
        how = f"{summary['status']}: {summary.get('reason')}"
        return Ended(None, f"{directory.path} {how}; retry_failed=true tries it again")
    return None


def _read_this_text(config: Config, ended: Mapping[str, Any]) -> bool:
    """Whether a run that is over, by its summary or row, read the text that the settings name now."""
    return bool(same_text(config.data, config.tokenizer, ended, budget_tokens=budget_tokens(config)))


def _record(config: Config, directory: RunDirectory) -> None:
    if config.results:
        record(Path(config.results), read_run(directory.path))


@contextmanager
def _together(config: Config, world: World, device: torch.device, stop: StopRequest) -> Iterator[tuple[Fabric, Ranks]]:
    """As `joined`; what is raised where another rank no longer answers is a LostRankError."""
    try:
        with joined(config, world, device, stop) as joint:
            yield joint
    except Exception as error:
        if world.size == 1 or not is_lost_rank(error):
            raise
        raise LostRankError(QUEUE_AGAIN, first_line(error)) from error


@contextmanager
def open_session(config: Config, console: Console | None = None) -> Iterator[Session]:
    """Everything a run needs, built and ready, in each of its processes; its directory is locked while the block
    runs."""
    world = find_world(config.trainer)
    with (
        StopRequest() as stop,
        joined(config, world, pick_device(config), stop) as (fabric, ranks),
        _session(config, fabric, ranks, console or Console(quiet=True)) as session,
    ):
        yield session


@contextmanager
def _session(config: Config, fabric: Fabric, ranks: Ranks, console: Console) -> Iterator[Session]:
    check_logger(config)
    check_tasks(config, ranks)
    if config.recipe.operands():
        check_backend(config.backend, config.gemm, fabric.device.type)
    corpus = prepare(config.data, config.tokenizer, budget_tokens=budget_tokens(config))
    validation = prepare_validation(config.validation, config.data, config.tokenizer, corpus)
    plan = make_plan(config, vocab_size=corpus.vocab_size)
    check_vocab(corpus, plan.vocab_size)
    check_state_fits(config, plan, fabric.device)
    if config.trainer.strategy == "fsdp2":
        model = build_without_weights(config, plan.vocab_size)
    else:
        model = build_model(config, plan.vocab_size, pretrained=config.tune is not None)
    if config.tune is not None and config.tune.freezes and ranks.is_zero:
        log.info("%s", tune.describe(model))
    with RunDirectory.of(config) as directory:
        ranks.decided(lambda: directory.open(config))
        yield Session(config, plan, corpus, validation, model, directory, fabric, ranks, console)


class Session:
    """The state of one run while it trains, on one rank."""

    def __init__(
        self,
        config: Config,
        plan: RunPlan,
        corpus: Corpus | MixedCorpus,
        validation: Mapping[str, Corpus],
        model: Decoder,
        directory: RunDirectory,
        fabric: Fabric,
        ranks: Ranks,
        console: Console,
    ):
        self.config, self.plan, self.corpus, self.directory = config, plan, corpus, directory
        self.fabric, self.ranks, self.console = fabric, ranks, console
        teacher = build_teacher(config, plan.vocab_size, fabric.device)
        self.module = CausalLM(
            config, plan, model, corpus.tokenizer.eos_id, counts_all=not corpus.is_masked, teacher=teacher
        )
        self.data = TokenBatches(
            corpus,
            seq_len=config.model.seq_len,
            seed=config.seed,
            micro_batch_size=config.trainer.micro_batch_size,
            validation=validation,
            num_workers=config.data.num_workers,
            overfit=config.debug.overfit,
            rank=ranks.rank,
            ranks=ranks.size,
            pin_memory=fabric.device.type == "cuda",
        )
        self.validation_hashes = {name: each.data_hash for name, each in validation.items()}
        self.trunk = Trunk(config, plan, corpus.data_hash) if config.trainer.share_trunk else None
        self.shared_steps = directory.summary.get("shared_steps", 0) if ranks.is_zero else 0
        self.loggers: list[Logger] = []
        self.last_step = plan.steps  # of the run, which may end before its plan
        self._rewinds, self._rewound_to = 0, -1

    @property
    def model(self) -> Decoder:
        return self.module.model  # pyright: ignore[reportReturnType]

    @property
    def device(self) -> torch.device:
        return self.fabric.device

    def run(self, stop: StopRequest | None = None) -> float | None:
        """Train and finish; the validation loss, on rank 0."""
        decision = self.ranks.decided(self._decide)
        self.shared_steps = decision.shared_steps
        read = _text_read(self.config, self.plan, self.corpus)
        about = {"text_read": describe_epochs(read), "device": _describe(self.device)}
        self.console.print(self.plan.table(self.config, **about, run_directory=str(self.directory.path)))
        repeated = repetition_warning(read)
        if repeated and self.ranks.is_zero:
            log.warning("%s", repeated)
        try:
            self.ranks.decided(self._begin)
            self._fit(decision.checkpoint, stop or StopRequest())
            loss = self.ranks.decided(self._finish)
            return loss if self.ranks.is_zero else None
        finally:
            close_loggers(self.loggers)

    def _begin(self) -> None:
        self._write_summary(Status.RUNNING)
        self.loggers = build_loggers(self.config, self.directory)

    def _fit(self, checkpoint: Path | None, stop: StopRequest) -> None:
        try:
            with stop.noting(), stop.ending_at_once():
                asked = self.train(checkpoint, stop)
                if asked:
                    self._write_summary(Status.INTERRUPTED)
                    self.ranks.meet()
        except DivergedError as error:
            self._write_summary(Status.DIVERGED, reason=str(error))
            if not self.ranks.is_zero:
                raise RefusedError("the run has diverged") from None
            raise DivergedError(f"{error}; {self._last_good()}") from None
        except KeyboardInterrupt:
            self._write_summary(Status.INTERRUPTED)
            raise
        except Exception as error:
            lost = self.ranks.size > 1 and is_lost_rank(error)
            self._write_summary(Status.INTERRUPTED if lost else Status.FAILED, reason=first_line(error))
            raise
        if asked:
            raise StoppedError(asked)

    def train(self, checkpoint: Path | None = None, stop: StopRequest | None = None) -> int:
        """The exit code that was asked for while training; 0 when it has come to its end."""
        forward = self._set_up()
        if checkpoint is None and self.config.tune is None and (pretrained := self.config.model.init_from):
            hf.load(self.model, pretrained)
        optimizer = build_optimizer(self.model, self.config.optimizer)
        self.module.rows = tune.row_choice(self.model, optimizer, self.config)
        tune.prepare_optimizer(self.model, optimizer, self.config)
        saver = Saver()
        observers = self.observers()
        measure = observers[0]
        assert isinstance(measure, Measure)
        best = next(observer for observer in observers if isinstance(observer, Best))
        guard = Guard(self.module, self.ranks)
        saves = Saves(self.directory, saver, self.module, optimizer, measure, guard, self.ranks, self.trunk)
        training = Training(
            self.fabric, self.ranks, self.module, forward, optimizer, self.data, measure, observers,
            guard, saves, stop or StopRequest(), best,
        )  # fmt: skip
        per_step = self.plan.micro_batches * self.data.per_batch
        step, samples = 0, 0
        try:
            if checkpoint is not None:
                values = saver.restore(checkpoint, self.model, optimizer)
                step, samples = values["step"], whole_number(checkpoint, values, "samples")
                guard.restore(values.get("guard", {}))
            while True:
                try:
                    with torch.autograd.set_detect_anomaly(self.config.debug.detect_anomaly):
                        asked = train(training, step, samples)
                    break
                except RewindError as wrong:
                    seen = samples + (wrong.step + 1 - step) * per_step
                    saver.wait()
                    step = self._rewind(wrong, saver, optimizer, measure)
                    samples = seen
            self.last_step = self.plan.steps if best.enough_at is None else best.enough_at
            if not asked and self.ranks.decided(lambda: self._last_validation() is None):
                for observer in observers:  # the line was lost with the machine's power
                    if isinstance(observer, Validate):
                        observer.on_step_end(self.plan.steps)
            return asked
        finally:
            try:
                self.data.close()
                for observer in observers:
                    observer.on_end()
            finally:
                saver.close()

    def _last_validation(self) -> dict[str, Any] | None:
        return self.directory.log.line_of(self.last_step, "val_loss")

    def _set_up(self) -> _FabricModule:
        """The model on its device, as the strategy wraps it."""
        checkpoint_activations(blocks_of(self.model), self.config.trainer.checkpoint_activations)
        forward = self.fabric.setup_module(self.model)
        if self.config.trainer.compile:
            self.model.compile()
        forward.train()
        return forward

    def observers(self) -> list[Observer]:
        """What watches the training, in the order in which it is told: every line of a step is written before its
        checkpoint is."""
        config, plan = self.config, self.plan
        progress = Progress(self.console, config.callbacks.progress_bar, plan.steps)
        recorder = Recorder(self.directory, self.module, self.ranks, self.loggers, [progress.listen])
        best = Best(recorder, self.directory.best if config.callbacks.keep_best else None, config.trainer.early_stop)
        profiled = config.callbacks.profile_steps
        return [
            Measure(recorder, config.callbacks.log_every_steps),
            Telemetry(recorder, plan.telemetry_every_steps, config.callbacks.telemetry_gradients),
            Validate(recorder, plan.val_every_steps, self.data.validation),
            best,
            *([self._tasks(recorder, best)] if config.callbacks.tasks else []),
            progress,
            *([Profile(self.directory.path / "profile", self.ranks.rank, self.device, profiled)] if profiled else []),
        ]

    def _tasks(self, recorder: Recorder, best: Best) -> Tasks:
        from qtrain.evaluate.target import Target

        config, settings = self.config, self.config.callbacks
        target = Target(
            str(self.directory.path), self.model, self.corpus.tokenizer, config.tokenizer, self.plan.vocab_size,
            config.model.seq_len, self.device, config.trainer.precision, config,
        )  # fmt: skip
        return Tasks(recorder, best, target, settings.tasks, settings.tasks_every_steps, settings.tasks_limit)

    # ------------------------------------------------------------------------------------------------------------ begin

    def _decide(self) -> Decision:
        """Where to go on from; takes back the metrics written after it. On rank 0."""
        directory = self.directory
        earlier = directory.summary.get("data_hash")
        if earlier not in (None, self.corpus.data_hash):
            raise UserError(
                f"{directory.path} was started on data {earlier}; the same settings now give data "
                f"{self.corpus.data_hash}. Restore the data, or set force=true to start anew"
            )
        for name, before in directory.summary.get("validation_hashes", {}).items():
            if name in self.validation_hashes and before != self.validation_hashes[name]:
                raise UserError(
                    f"{directory.path} was started with another text of validation.{name}, whose losses do not compare "
                    "with those of this one. Restore that text, give this one another name, or set force=true to start "
                    "anew"
                )
        refuse_earlier_format(directory.checkpoints)
        self._keep_tokenizer()
        tidy(directory.checkpoints)
        step, path = newest(directory.checkpoints, set_aside=True) or (0, None)
        dropped = directory.discard_metrics_after(step)
        if path is not None:
            log.info("resuming at step %d from %s", step, path.name)
            lost = directory.log.lost_before(step, self.plan.log_every_steps)
            if lost:
                log.warning("%s", lost)
        elif dropped:
            log.info("there is no good checkpoint: starting again from step 0")
        if dropped:
            log.info("%d later lines of metrics.jsonl are now in metrics.discarded.jsonl", dropped)
        return Decision(path, self.shared_steps) if path else self._start_of_trunk()

    def _keep_tokenizer(self) -> None:
        for name, text in tokenizer_files(self.corpus.tokenizer).items():
            self.directory.tokenizer.mkdir(exist_ok=True)
            if not (self.directory.tokenizer / name).exists():
                write_atomically(self.directory.tokenizer / name, text)

    def _start_of_trunk(self) -> Decision:
        """From the checkpoint that another run left of this one's trunk, whose metrics become this run's."""
        found = self.trunk.start() if self.trunk else None
        if found is None:
            tell_of_shorter(self.config, self.directory.path)
            return Decision(None, 0)
        step, path = found
        write_atomically(self.directory.metrics, metrics_beside(path).read_text())
        log.info("the first %d steps are another run's: starting from %s", step, path)
        return Decision(path, step)

    def _rewind(self, wrong: RewindError, saver: Saver, optimizer: torch.optim.Optimizer, measure: Measure) -> int:
        """Back to the last checkpoint; its step. DivergedError where that has been tried often enough."""

        def last() -> tuple[int, Path] | None:
            found = newest(self.directory.checkpoints)
            self.directory.discard_metrics_after(found[0] if found else 0)
            return found

        found = self.ranks.decided(last)
        step = found[0] if found else 0
        self._rewinds = self._rewinds + 1 if step == self._rewound_to else 1
        self._rewound_to = step
        if found is None or self._rewinds > MOST_IN_A_ROW:
            raise DivergedError(f"step {wrong.step + 1}: {wrong}")
        log.warning("step %d: %s: going back to step %d, on other data", wrong.step + 1, wrong, step)
        saver.restore(found[1], self.model, optimizer)
        optimizer.zero_grad()
        measure.forget()
        return step

    def _last_good(self) -> str:
        found = newest(self.directory.checkpoints)
        if found is None:
            return "no checkpoint had been written yet. Lower optimizer.lr or checkpoint more often"
        return f"the last good checkpoint is {found[1]} (step {found[0]}). Lower optimizer.lr or warm up longer"

    # -------------------------------------------------------------------------------------------------------------- end

    def _finish(self) -> float:
        """Summary, picture and the result. The last step's validation stands in metrics.jsonl. On rank 0."""
        last = self._last_validation()
        assert last is not None
        values = {key: last[key] for key in ("val_loss", "val_bits_per_byte")}
        named = {"validation": found} if (found := by_source(last)) else {}
        scored = by_task(self.directory.log.line_of(self.last_step, "tasks_seconds") or {})
        scores = {"tasks": scored} if scored else {}
        lowest = min(self.directory.lines("val_loss"), key=lambda line: line["val_loss"])
        best = {"best_val_loss": lowest["val_loss"], "best_step": lowest["step"]}
        speeds = [line["tokens_per_second"] for line in self.directory.lines("tokens_per_second")]
        speed = median(speeds) if speeds else None
        self._write_summary(Status.FINISHED, **values, **best, **named, **scores, tokens_per_second=speed)
        _record(self.config, self.directory)
        plot_loss(self.directory.path)
        self._show_end(values["val_loss"], values["val_bits_per_byte"], named.get("validation", {}), scored)
        return values["val_loss"]

    def _write_summary(self, status: Status, **results: float | str | Mapping[str, Any] | None) -> None:
        if not self.ranks.is_zero:
            return
        plan, config = self.plan, self.config
        tokens = self.last_step * plan.batch_tokens
        summary = {
            "status": status.value,  # W&B would write the name of an enum
            "name": config.name,
            "recipe": config.recipe.name,
            "seed": config.seed,
            "parameters": plan.parameters,
            "non_embedding_parameters": plan.non_embedding_parameters,
            "tokens": tokens,
            "steps": self.last_step,
            "flops": tokens * plan.flops_per_token,
            "val_loss": None,
            "val_bits_per_byte": None,
            "tokens_per_second": None,
            "bigram_cross_entropy": self.corpus.bigram_cross_entropy,
            "config_hash": config_hash(config),
            "data_hash": self.corpus.data_hash,
            "data_fingerprint": self.corpus.fingerprint,
            "commit": commit(),
            "shared_steps": self.shared_steps,
        }
        if self.validation_hashes:
            summary["validation_hashes"] = self.validation_hashes
        self.directory.write_summary(summary | results)
        mirror_summary(self.loggers, summary | results)

    def _show_end(
        self,
        val_loss: float,
        val_bits: float,
        named: Mapping[str, Mapping[str, float]],
        scored: Mapping[str, Mapping[str, float]],
    ) -> None:
        bigram = self.corpus.bigram_cross_entropy
        lines = [
            f"validation loss {val_loss:.4f} nats per token ({val_bits:.4f} bits per byte)",
            *(
                f"  of {name:<12} {found['loss']:.4f} nats per token ({found['bits_per_byte']:.4f} bits per byte), "
                f"{found['tokens']:,} tokens"
                for name, found in named.items()
            ),
            *(f"  {task} {metric} {value:.4g}" for task, found in scored.items() for metric, value in found.items()),
            f"bigram model    {bigram:.4f} nats per token: what the pair counts of the training text alone predict",
            f"run directory   {self.directory.path}  (loss.png, metrics.jsonl, summary.json, checkpoints/)",
        ]
        self.console.print("\n".join(lines), soft_wrap=True)


def _text_read(config: Config, plan: RunPlan, corpus: Corpus | MixedCorpus) -> dict[str, float]:
    """How often the run reads each part of its training text."""
    total = sum(part.weight for part in corpus.parts)
    return {
        part.name: epochs(plan.tokens * part.weight / total, part.corpus.train.n_tokens, config.model.seq_len)
        for part in corpus.parts
    }


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"


class _Spoken(logging.Handler):
    """Messages as they are, above a progress bar where one is shown; warnings begin with the word."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        told = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        self.console.print(told + self.format(record), markup=False, highlight=False, soft_wrap=True)


def speak_through(console: Console) -> None:
    """Messages of qtrain through the console; Lightning's about itself are left out."""
    log.handlers = [_Spoken(console)]
    log.setLevel(logging.INFO)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
