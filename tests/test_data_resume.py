"""Batches and weights of a run that is stopped and resumed equal those of one that never was, bit for bit."""

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


class SaveAt(Callback):
    """Saves after batch number `batch` (from 1) and stops there, like a run that is killed after its checkpoint."""

    def __init__(self, batch: int, path: Path) -> None:
        self.batch, self.path = batch, path

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        if args[2] == self.batch - 1:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


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
