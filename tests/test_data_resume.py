"""Batches and weights of a run that is stopped and resumed equal those of one that never was, bit for bit."""

import contextlib
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.nn import functional as F

from qtrain.config import DataConfig, TokenizerConfig
from qtrain.data import Corpus, WindowOrder, prepare
from qtrain.data.datamodule import RunLoader, TokenDataModule, TrainBatches, ValBatches
from qtrain.errors import UserError

# Lightning 2.6.6 tests tree specs in a way that torch 2.13 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")

# B micro-batch, T seq_len, W world size
T, B, SAMPLES = 16, 4, 96


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    generator = np.random.default_rng(0)
    for i in range(40):
        (folder / f"{i}.txt").write_text("".join(map(chr, generator.integers(97, 123, size=30))))
    data = DataConfig(
        source="text",
        files=(str(folder / "*.txt"),),
        val_tokens=10 * T,
        val_fraction=0.2,
        cache_dir=str(folder / "cache"),
    )
    return prepare(data, TokenizerConfig(kind="bytes"), progress=False)


class TinyModel(pl.LightningModule):
    """A bigram model that keeps every batch it is trained and validated on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(257, 257)
        self.seen: list[torch.Tensor] = []
        self.validated: list[torch.Tensor] = []

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        self.seen.append(batch.clone())
        return F.cross_entropy(self.table(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def validation_step(self, batch: torch.Tensor) -> None:
        self.validated.append(batch.clone())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


class KilledError(Exception):
    pass


class SaveAt(Callback):
    """Saves after batch number `batch` (from 1) and ends the run there, by an exception that nobody expects."""

    def __init__(self, batch: int, path: Path) -> None:
        self.batch, self.path = batch, path

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        if args[2] == self.batch - 1:
            trainer.save_checkpoint(self.path)
            raise KilledError


def fit(
    corpus: Corpus,
    *,
    workers: int = 0,
    micro_batch: int = B,
    accumulate: int = 1,
    validate_every: int | None = None,
    stop: SaveAt | None = None,
    resume: Path | None = None,
) -> TinyModel:
    model = TinyModel()
    data = TokenDataModule(
        corpus,
        seq_len=T,
        seed=3,
        total_samples=SAMPLES,
        micro_batch_size=micro_batch,
        val_tokens=5 * T,
        num_workers=workers,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        val_check_interval=validate_every,
        limit_val_batches=None if validate_every else 0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[stop] if stop else [],
    )
    with contextlib.suppress(KilledError):
        trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=True if resume else None)
    return model


@pytest.mark.parametrize(
    ("accumulate", "validate_every", "stops", "workers"),
    [
        (1, None, [1], [0, 0]),
        (1, None, [7, 23], [0, 2, 0]),
        (2, 4, [6, 16], [2, 0, 2]),
        (2, 4, [24 - 2], [0, 2]),
    ],
)
def test_resumed_run_equals_undisturbed_run(
    corpus: Corpus, tmp_path: Path, accumulate: int, validate_every: int | None, stops: list[int], workers: list[int]
) -> None:
    options = {"accumulate": accumulate, "validate_every": validate_every}
    whole = fit(corpus, **options)
    assert len(whole.seen) == SAMPLES // B

    seen, checkpoint = [], None
    for i, batch in enumerate(stops):
        stop = SaveAt(batch, tmp_path / f"{i}.ckpt")
        part = fit(corpus, **options, workers=workers[i], stop=stop, resume=checkpoint)
        seen += part.seen
        checkpoint = stop.path
        assert len(seen) == batch
    last = fit(corpus, **options, workers=workers[-1], resume=checkpoint)
    seen += last.seen

    assert torch.equal(torch.stack(seen), torch.stack(whole.seen))
    assert torch.equal(last.table.weight, whole.table.weight)


def test_resume_with_another_micro_batch(corpus: Corpus, tmp_path: Path) -> None:
    """The counter is in samples: Lightning's own count of batches is turned into the new size's."""
    whole = fit(corpus, micro_batch=B, accumulate=2, validate_every=4)
    stop = SaveAt(6, tmp_path / "x.ckpt")
    first = fit(corpus, micro_batch=B, accumulate=2, validate_every=4, stop=stop)
    second = fit(corpus, micro_batch=2 * B, accumulate=1, validate_every=2, resume=stop.path)
    seen = torch.cat([*first.seen, *second.seen])
    assert torch.equal(seen, torch.cat(whole.seen))
    assert len(second.seen) == (SAMPLES - 6 * B) // (2 * B)
    # validations after batches 4, 8, ... 24 of B samples: one before the stop, five after, three windows and then two
    assert [len(batch) for batch in first.validated] == [4, 1]
    assert len(second.validated) == 5
    torch.testing.assert_close(second.table.weight, whole.table.weight)


def test_checkpoint_holds_one_counter(corpus: Corpus, tmp_path: Path) -> None:
    stop = SaveAt(6, tmp_path / "x.ckpt")
    fit(corpus, workers=2, stop=stop)
    checkpoint = torch.load(stop.path, weights_only=True)
    assert checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] == [{"samples": 6 * B}]


def test_ranks_share_each_micro_batch(corpus: Corpus) -> None:
    def batches(world: int, micro_batch: int) -> list[torch.Tensor]:
        order = WindowOrder(3, (corpus.train.n_tokens - 1) // T)
        ranks = [TrainBatches(corpus.train, order, r, world, micro_batch, T, overfit=False) for r in range(world)]
        return [torch.cat([rank[i] for rank in ranks]) for i in range(SAMPLES // (world * micro_batch))]

    alone = torch.cat(batches(1, 8))
    assert torch.equal(torch.cat(batches(4, 2)), alone)
    assert torch.equal(torch.cat(batches(2, 4)), alone)


def test_samples_are_the_ordered_windows_of_the_stream(corpus: Corpus) -> None:
    stream = corpus.train.window(0, corpus.train.n_tokens)
    n_windows = (len(stream) - 1) // T
    order = WindowOrder(3, n_windows)(np.arange(SAMPLES))
    assert n_windows < SAMPLES  # more than one epoch
    expected = np.stack([stream[i * T : i * T + T + 1] for i in order])
    assert np.array_equal(torch.cat(list(module(corpus).train_dataloader())).numpy(), expected)


def test_overfit_repeats_the_first_batch(corpus: Corpus) -> None:
    batches = list(module(corpus, overfit=True).train_dataloader())
    first = next(iter(module(corpus).train_dataloader()))
    assert len(batches) == SAMPLES // B
    assert all(torch.equal(batch, first) for batch in batches)


@pytest.mark.parametrize(
    ("n_windows", "world", "micro_batch"), [(10, 1, 4), (9, 2, 4), (9, 2, 5), (7, 3, 2), (3, 3, 4)]
)
def test_validation_covers_every_window_once(corpus: Corpus, n_windows: int, world: int, micro_batch: int) -> None:
    stream = corpus.val.window(0, corpus.val.n_tokens)
    ranks = [ValBatches(corpus.val, np.arange(n_windows), r, world, micro_batch, T) for r in range(world)]
    batches = [[rank[i] for i in range(rank.n_batches)] for rank in ranks]
    assert len({len(rank) for rank in batches}) == 1
    assert all(1 <= len(batch) <= micro_batch for rank in batches for batch in rank)
    windows = torch.cat([batch for rank in batches for batch in rank]).numpy()
    assert np.array_equal(windows, np.stack([stream[i * T : i * T + T + 1] for i in range(n_windows)]))


def test_loading_leaves_the_global_generator_alone(corpus: Corpus) -> None:
    before = torch.get_rng_state()
    list(module(corpus).train_dataloader())
    list(module(corpus).val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def module(corpus: Corpus, **changes: object) -> TokenDataModule:
    options = {"seq_len": T, "seed": 3, "total_samples": SAMPLES, "micro_batch_size": B, "val_tokens": 5 * T}
    return TokenDataModule(corpus, **(options | {"num_workers": 0} | changes))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seq_len": 10_000}, "train split of text-0 has .* too few for one sequence of 10001"),
        ({"seq_len": 400}, "val split of text-0 has .* too few for one sequence of 401"),
        ({"val_tokens": T - 1}, "data.val_tokens=15 is less than one sequence of 16"),
    ],
)
def test_too_little_text_is_told_before_training(corpus: Corpus, changes: dict[str, int], told: str) -> None:
    with pytest.raises(UserError, match=told):
        module(corpus, **changes)


def test_sizes_that_do_not_divide_are_told(corpus: Corpus) -> None:
    with pytest.raises(UserError, match="96 samples does not divide into micro-batches of 5 on 1 devices"):
        module(corpus, micro_batch_size=5).train_dataloader()
    loader: RunLoader = module(corpus, micro_batch_size=8).train_dataloader()
    with pytest.raises(UserError, match="after 12 samples, no whole number of micro-batches of 8"):
        loader.load_state_dict({"samples": 12})
