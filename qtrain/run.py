"""One run: settings -> data -> model -> convert -> fit -> report."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger
from rich.console import Console
from rich.logging import RichHandler
from rich.panel import Panel
from rich.text import Text
from torch import nn

from qtrain.callbacks import (
    Checkpoints,
    DivergedError,
    LeaveTrunk,
    Measure,
    Progress,
    StopRequest,
    Telemetry,
    Validate,
)
from qtrain.callbacks.measure import Recorder
from qtrain.checkpoint import AtomicCheckpointIO, load_checkpoint, newest_checkpoint, tidy
from qtrain.config import Config, config_hash
from qtrain.data import Corpus, check_vocab, prepare, same_text
from qtrain.data.datamodule import TokenDataModule
from qtrain.errors import UserError, first_line
from qtrain.lightning_module import CausalLM, computes_in_high_precision
from qtrain.loggers import build_loggers, check_logger, close_loggers, mirror_summary
from qtrain.models.llama import Llama, generate
from qtrain.plan import RunPlan, budget_tokens, make_plan
from qtrain.quant import Report, check_backend, convert, set_high_precision
from qtrain.report.loss import plot_loss
from qtrain.runs.directory import RunDirectory
from qtrain.runs.environment import commit
from qtrain.runs.files import write_atomically
from qtrain.runs.status import FAILED
from qtrain.runs.table import read_run, record, recorded
from qtrain.trunk import Trunk, metrics_beside

log = logging.getLogger("qtrain")


def run(config: Config) -> float | None:
    """Do the run, or take it up where it stopped; the final validation loss in nats per token (None for a dry run).

    UserError before anything is trained for settings that cannot work here; DivergedError for a loss that is not
    finite; KeyboardInterrupt after a checkpoint when asked to stop.
    """
    console = Console(highlight=False, quiet=not is_main_process(), width=None if sys.stdout.isatty() else 120)
    speak_through(console)
    device = pick_device(config)
    log.info("%s", check_model(config))
    directory = RunDirectory.of(config)
    directory.check(config)
    if config.dry_run:
        plan = make_plan(config, world_size=config.trainer.devices)
        console.print(plan.table(config, device=str(device), run_directory=str(directory.path)))
        return None
    if not config.force:
        done, said = _ended(config, directory)
        if said:
            console.print(said, soft_wrap=True)
            return done
    with open_session(config, console) as session:
        return session.run()


def _ended(config: Config, directory: RunDirectory) -> tuple[float | None, str | None]:
    """(validation loss, what to say) of a run that is not to be done again; (None, None) of one that is."""
    summary = directory.summary
    if directory.finished:
        if not _read_this_text(config, summary):
            raise UserError(
                f"{directory.path} is finished, on data {summary.get('data_hash')}; the same settings now name another "
                "text. Restore the text, or set force=true to move that run aside and train on the new one"
            )
        loss = summary["val_loss"]
        _record(config, directory)
        return loss, f"{directory.path} is finished (validation loss {loss:.4f}); force=true runs it again"
    rows = recorded(Path(config.results)).get((config.name, config_hash(config)), []) if config.results else []
    row = next((row for row in rows if _read_this_text(config, row)), None)
    if row is not None:
        return row["val_loss"], f"{config.results} has this run's row (validation loss {row['val_loss']:.4f})"
    if summary.get("status") in FAILED and not config.retry_failed:
        return None, f"{directory.path} {summary['status']}: {summary.get('reason')}; retry_failed=true tries it again"
    return None, None


def _read_this_text(config: Config, ended: Mapping[str, Any]) -> bool:
    """Whether a run that is over, by its summary or row, read the text that the settings name now."""
    return bool(same_text(config.data, config.tokenizer, ended, budget_tokens=budget_tokens(config)))


def _record(config: Config, directory: RunDirectory) -> None:
    if config.results:
        record(Path(config.results), read_run(directory.path))


@contextmanager
def open_session(config: Config, console: Console | None = None) -> Iterator[Session]:
    """Everything a run needs, built and ready; its directory is open (and locked) while the block runs."""
    device = pick_device(config)
    check_logger(config)
    if config.recipe.operands():
        check_backend(config.backend, config.gemm, device.type)
    budget = budget_tokens(config)
    corpus = prepare(config.data, config.tokenizer, budget_tokens=budget)
    plan = make_plan(config, world_size=config.trainer.devices, vocab_size=corpus.vocab_size)
    check_vocab(corpus, plan.vocab_size)
    model = build_model(config, plan.vocab_size)
    with RunDirectory.of(config) as directory:
        if is_main_process():
            directory.open(config)
        yield Session(config, plan, corpus, model, directory, device, console or Console(quiet=True))


def is_main_process() -> bool:
    """Whether this process writes the files and speaks: rank zero of a run on several devices."""
    return getattr(rank_zero_only, "rank", 0) == 0


def pick_device(config: Config) -> torch.device:
    """The device to train on. UserError when the one asked for is not there."""
    asked, count = config.trainer.device, config.trainer.devices
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "cuda" and found == 0:
        raise UserError(f"trainer.device=cuda: torch {torch.__version__} finds no CUDA device; use trainer.device=cpu")
    device = "cuda" if asked != "cpu" and found else "cpu"
    if device == "cuda" and count > found:
        raise UserError(f"trainer.devices={count}: this machine has {found} CUDA devices; use trainer.devices={found}")
    return torch.device(device)


def build_model(config: Config, vocab_size: int) -> Llama:
    """The model as it stands before step 0, a function of the settings alone: the global random state is left as it
    was, the weights depend on config.seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = Llama(config.model, vocab_size)
    convert(model, config.recipe, seed=config.seed, backend=config.backend, gemm=config.gemm)
    return model


def check_model(config: Config) -> Report:
    """What the recipe will convert, found out on shapes alone, before any data is prepared. UserError for a width that
    the recipe's blocks do not divide."""
    with torch.device("meta"):
        model = Llama(config.model, vocab_size=1)
    return convert(model, config.recipe, seed=config.seed, backend=config.backend, gemm=config.gemm)


def load_run(path: str | Path) -> nn.Module:
    """The model of a run directory, converted as it was trained, with the weights of its newest good checkpoint, in
    eval mode on the CPU. UserError when the directory holds no run or no checkpoint."""
    directory = RunDirectory(Path(path).expanduser())
    config = directory.read_config()
    newest = newest_checkpoint(directory.checkpoints)
    if newest is None:
        raise UserError(f"{directory.path} has no checkpoint yet")
    checkpoint = load_checkpoint(newest[1])
    model = build_model(config, checkpoint["vocab_size"])
    prefix = "model."
    weights = {name.removeprefix(prefix): value for name, value in checkpoint["state_dict"].items()}
    model.load_state_dict(weights)
    plan = make_plan(config, world_size=config.trainer.devices, vocab_size=checkpoint["vocab_size"])
    set_high_precision(model, computes_in_high_precision(config, plan, newest[0] - 1))  # as in its last step
    return model.eval()


class Session:
    """The state of one run while it trains."""

    def __init__(
        self,
        config: Config,
        plan: RunPlan,
        corpus: Corpus,
        model: Llama,
        directory: RunDirectory,
        device: torch.device,
        console: Console,
    ):
        self.config, self.plan, self.corpus, self.directory = config, plan, corpus, directory
        self.device, self.console = device, console
        self.module = CausalLM(config, plan, model)
        self.data = TokenDataModule(
            corpus,
            seq_len=config.model.seq_len,
            seed=config.seed,
            total_samples=plan.steps * plan.batch_tokens // config.model.seq_len,
            micro_batch_size=config.trainer.micro_batch_size,
            val_tokens=config.data.val_tokens,
            num_workers=config.data.num_workers,
            overfit=config.debug.overfit,
        )
        self.bytes_per_token = corpus.bytes_per_token
        self.trunk = Trunk(config, plan, corpus.data_hash) if config.trainer.share_trunk else None
        self.shared_steps = directory.summary.get("shared_steps", 0)
        self.loggers: list[Logger] = []

    @property
    def model(self) -> Llama:
        return self.module.model  # pyright: ignore[reportReturnType]

    def run(self) -> float:
        checkpoint = self._resume_point()
        self._announce()
        self._write_summary("running")
        try:
            self._fit(checkpoint)
            return self._finish() if is_main_process() else float("nan")
        finally:
            close_loggers(self.loggers)

    def _fit(self, checkpoint: Path | None) -> None:
        with StopRequest() as stop:
            trainer = self.trainer(stop)
            if self.config.trainer.compile:
                self.model.compile()
            try:
                trainer.fit(self.module, datamodule=self.data, ckpt_path=checkpoint, weights_only=True)
                stopped = trainer.global_step < self.plan.steps
            except DivergedError as error:
                self._write_summary("diverged", reason=str(error))
                raise DivergedError(f"{error}; {self._last_good()}") from None
            except Exception as error:
                self._write_summary("failed", reason=first_line(error))
                raise
            except (SystemExit, KeyboardInterrupt):  # after a signal Lightning ends the process in ways of its own
                stopped = True
            if stopped:
                self._write_summary("interrupted")
                raise KeyboardInterrupt

    # ------------------------------------------------------------------------------------------------------------ begin

    def _resume_point(self) -> Path | None:
        """The checkpoint to go on from; takes back the metrics written after it."""
        earlier = self.directory.summary.get("data_hash")
        if earlier not in (None, self.corpus.data_hash):
            raise UserError(
                f"{self.directory.path} was started on data {earlier}; the same settings now give data "
                f"{self.corpus.data_hash}. Restore the data, or set force=true to start anew"
            )
        if is_main_process():
            tidy(self.directory.checkpoints)
        newest = newest_checkpoint(self.directory.checkpoints)
        step, path = newest if newest else (0, None)
        dropped = self.directory.discard_metrics_after(step) if is_main_process() else 0
        if path is not None:
            log.info("resuming at step %d from %s", step, path.name)
        elif dropped:
            log.info("there is no good checkpoint: starting again from step 0")
        if dropped:
            log.info("%d later lines of metrics.jsonl are now in metrics.discarded.jsonl", dropped)
        return path or self._start_of_trunk()

    def _start_of_trunk(self) -> Path | None:
        """The checkpoint that another run left of this one's trunk, whose metrics become this run's."""
        found = self.trunk.start() if self.trunk else None
        self.shared_steps = found[0] if found else 0
        if found is None:
            return None
        step, path = found
        if is_main_process():
            write_atomically(self.directory.metrics, metrics_beside(path).read_text())
        log.info("the first %d steps are another run's: starting from %s", step, path)
        return path

    def _announce(self) -> None:
        self.console.print(
            self.plan.table(self.config, device=_describe(self.device), run_directory=str(self.directory.path))
        )

    def trainer(self, stop: StopRequest) -> lightning.Trainer:
        config, plan = self.config, self.plan
        progress = Progress(self.console, config.callbacks.progress_bar, plan.steps)
        recorder = Recorder(self.directory, [progress.listen])
        measure = Measure(recorder, config.callbacks.log_every_steps)
        checkpoints = Checkpoints(
            self.directory, plan.checkpoint_every_steps, config.callbacks.keep_checkpoints, stop, measure
        )
        self.loggers = build_loggers(config, self.directory)
        telemetry = Telemetry(recorder, plan.telemetry_every_steps, config.callbacks.telemetry_gradients)
        validate = Validate(recorder, plan.val_every_steps, self.bytes_per_token)
        trunk = [LeaveTrunk(self.trunk, self.directory, measure)] if self.trunk else []
        precision = config.trainer.precision
        assert precision != "auto"  # the settings of a run are resolved
        return lightning.Trainer(
            accelerator="gpu" if self.device.type == "cuda" else "cpu",
            devices=config.trainer.devices,
            precision=precision,
            max_steps=plan.steps,
            max_epochs=1,  # the data module's one epoch spans the run
            accumulate_grad_batches=plan.micro_batches,
            callbacks=[measure, telemetry, validate, progress, *trunk, checkpoints],
            logger=self.loggers,
            plugins=[AtomicCheckpointIO()],
            default_root_dir=self.directory.path,
            use_distributed_sampler=False,  # the data module slices each batch by rank itself
            enable_checkpointing=False,
            log_every_n_steps=1,  # nothing is logged by Lightning itself; larger values only make it warn
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            detect_anomaly=config.debug.detect_anomaly,
        )

    def _last_good(self) -> str:
        newest = newest_checkpoint(self.directory.checkpoints)
        if newest is None:
            return "no checkpoint had been written yet. Lower optimizer.lr or checkpoint more often"
        return f"the last good checkpoint is {newest[1]} (step {newest[0]}). Lower optimizer.lr or warm up longer"

    # -------------------------------------------------------------------------------------------------------------- end

    def _finish(self) -> float:
        """Summary, picture, sample and the result. The last step's validation stands in metrics.jsonl."""
        last = self.directory.lines("val_loss")[-1]
        values = {key: last[key] for key in ("val_loss", "val_bits_per_byte")}
        speeds = [line["tokens_per_second"] for line in self.directory.lines("tokens_per_second")]
        self._write_summary("finished", **values, tokens_per_second=median(speeds))
        _record(self.config, self.directory)
        plot_loss(self.directory.path)
        self._show_sample()
        self._show_end(values["val_loss"], values["val_bits_per_byte"])
        return values["val_loss"]

    def _write_summary(self, status: str, **results: float | str) -> None:
        if not is_main_process():
            return
        plan, config = self.plan, self.config
        summary = {
            "status": status,
            "name": config.name,
            "recipe": config.recipe.name,
            "seed": config.seed,
            "parameters": plan.parameters,
            "non_embedding_parameters": plan.non_embedding_parameters,
            "tokens": plan.tokens,
            "steps": plan.steps,
            "flops": plan.flops,
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
        self.directory.write_summary(summary | results)
        mirror_summary(self.loggers, summary | results)

    def _show_sample(self) -> None:
        settings = self.config.callbacks
        if settings.sample_tokens == 0:
            return
        tokenizer = self.corpus.tokenizer
        prompt = [int(token) for token in tokenizer.encode(settings.sample_prompt)]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.trainer.precision == "bf16-mixed"):
            ids = generate(
                self.model.cpu(), prompt, settings.sample_tokens, temperature=0.8, top_k=50, seed=self.config.seed
            )
        text = tokenizer.decode(ids)
        self.console.print(Panel(Text(text), title="sample", title_align="left", border_style="dim"))

    def _show_end(self, val_loss: float, val_bits: float) -> None:
        bigram = self.corpus.bigram_cross_entropy
        lines = [
            f"validation loss {val_loss:.4f} nats per token ({val_bits:.4f} bits per byte)",
            f"bigram model    {bigram:.4f} nats per token: what the pair counts of the training text alone predict",
            f"run directory   {self.directory.path}  (loss.png, metrics.jsonl, summary.json, checkpoints/)",
        ]
        self.console.print("\n".join(lines), soft_wrap=True)


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"


def speak_through(console: Console) -> None:
    """Messages of qtrain through the console; Lightning's and torch's chatter about workers and processors silenced."""
    log.handlers = [RichHandler(console=console, show_time=False, show_path=False, markup=False)]
    log.setLevel(logging.INFO)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _CHATTER:
        warnings.filterwarnings("ignore", message=message)


_CHATTER = (
    ".*does not have many workers.*",  # tokens come from memory maps: workers would only cost processes
    ".*but have no `validation_step`.*",  # validation is a callback, see qtrain.callbacks.Validate
    ".*GPU available but not used.*",
    ".*isinstance\\(treespec, LeafSpec\\).*",  # Lightning 2.6 on torch 2.13
)
