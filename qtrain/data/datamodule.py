"""Batches for Lightning: one map-style pass over the whole run, whose state is one counter of samples handed out.

A run of total_samples samples is one Lightning epoch. Sample g is window `WindowOrder(seed, n)(g)` of the training
split, so nothing about the order is stored: a checkpoint holds how many samples all ranks together were given, and
another worker count, world size or micro-batch size goes on from there. Lightning prefetches nothing from a loader
that has a length, so at any hook the counter equals the samples that the model has seen.
"""

# B micro-batch, T seq_len, W world size

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qtrain.data.corpus import Corpus, Split
from qtrain.data.order import WindowOrder
from qtrain.errors import UserError


class TrainBatches(Dataset[Tensor]):
    """Item i: this rank's share of micro-batch i of the run, (B, T + 1) int64: samples (i W + rank) B onwards."""

    def __init__(
        self, split: Split, order: WindowOrder, rank: int, world: int, micro_batch: int, seq_len: int, overfit: bool
    ) -> None:
        self.split, self.order, self.seq_len = split, order, seq_len
        self.rank, self.world, self.micro_batch, self.overfit = rank, world, micro_batch, overfit

    def __getitem__(self, index: int) -> Tensor:
        step = 0 if self.overfit else index
        first = (step * self.world + self.rank) * self.micro_batch
        return _windows(self.split, self.order(np.arange(first, first + self.micro_batch)), self.seq_len)


class ValBatches(Dataset[Tensor]):
    """Item i: batch i of this rank's share of the windows given, in their order, (<= B, T + 1) int64.

    Every window is on one rank, and every rank has as many batches (FSDP needs each rank in each forward): full ones
    first, then what is left, at least one window in each.
    """

    def __init__(
        self, split: Split, windows: np.ndarray, rank: int, world: int, micro_batch: int, seq_len: int
    ) -> None:
        self.split, self.seq_len = split, seq_len
        shares = [share.tolist() for share in np.array_split(windows, world)]
        self.n_batches = -(-max(map(len, shares)) // micro_batch)
        mine = shares[rank]
        self.batches: list[list[int]] = []
        for left in range(self.n_batches, 0, -1):
            size = min(micro_batch, len(mine) - (left - 1))
            self.batches.append(mine[:size])
            mine = mine[size:]

    def __getitem__(self, index: int) -> Tensor:
        return _windows(self.split, np.array(self.batches[index]), self.seq_len)


def spread(total: int, wanted: int) -> np.ndarray:
    """At most `wanted` of `total` windows, evenly over all of them: the first ones may all be of one document."""
    count = min(total, wanted)
    return np.arange(count) * total // max(1, count)


def _windows(split: Split, windows: np.ndarray, seq_len: int) -> Tensor:
    return torch.from_numpy(np.stack([split.window(int(i) * seq_len, seq_len + 1) for i in windows]))


class BatchLoader:
    """A pass over a dataset whose items are batches, in this process. len() is the number of batches."""

    def __init__(self, dataset: Dataset[Tensor], n_batches: int, pin_memory: bool, num_workers: int = 0) -> None:
        self.n_batches = n_batches
        self._dataset, self._pin_memory, self._num_workers = dataset, pin_memory, num_workers

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[Tensor]:
        return self._batches(range(self.n_batches))

    def _batches(self, chosen: range) -> Iterator[Tensor]:
        start = _ignore_interrupt if self._num_workers else None
        return iter(
            DataLoader(
                self._dataset,
                batch_size=None,
                sampler=chosen,
                num_workers=self._num_workers,
                pin_memory=self._pin_memory,
                worker_init_fn=start,
                generator=torch.Generator(),  # or it would draw its workers' seed from the global one
            )
        )


class RunLoader(BatchLoader):
    """The training batches of a whole run, which goes on where its state says.

    samples: handed out so far, over all ranks; the whole state. on_resume: told the batches that a loaded state stands
    for, in batches of this loader.
    """

    def __init__(
        self,
        dataset: TrainBatches,
        total_samples: int,
        pin_memory: bool,
        num_workers: int,
        on_resume: Callable[[int], None],
    ) -> None:
        self.samples = 0
        self._on_resume = on_resume
        self.per_batch = dataset.micro_batch * dataset.world
        if total_samples % self.per_batch:
            raise UserError(
                f"a run of {total_samples} samples does not divide into micro-batches of {dataset.micro_batch} on "
                f"{dataset.world} devices; change trainer.micro_batch_size or trainer.batch_tokens"
            )
        super().__init__(dataset, total_samples // self.per_batch, pin_memory, num_workers)

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self._batches(range(self.samples // self.per_batch, self.n_batches)):
            self.samples += self.per_batch
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"samples": self.samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if state["samples"] % self.per_batch:
            raise UserError(
                f"the checkpoint was made after {state['samples']} samples, no whole number of micro-batches of "
                f"{self.per_batch} (trainer.micro_batch_size x devices); resume with the sizes that it was made with"
            )
        self.samples = state["samples"]
        self._on_resume(self.samples // self.per_batch)


def _ignore_interrupt(_worker: int) -> None:
    """Ctrl-C reaches the whole process group; the training process decides what it means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class TokenDataModule(pl.LightningDataModule):
    """Batches of a corpus, (micro_batch_size, seq_len + 1) int64: inputs are [:, :-1], targets [:, 1:].

    total_samples: sequences of the whole run, over all ranks. val_tokens: validation predicts the first so many tokens
    of the validation split, rounded down to whole sequences. overfit: every batch is the first one.
    Needs Trainer(use_distributed_sampler=False, max_epochs=1). UserError if either split is too small.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        seq_len: int,
        seed: int,
        total_samples: int,
        micro_batch_size: int,
        val_tokens: int,
        num_workers: int,
        overfit: bool = False,
    ) -> None:
        super().__init__()
        self.corpus, self.seq_len, self.seed, self.total_samples = corpus, seq_len, seed, total_samples
        self.micro_batch_size, self.num_workers, self.overfit = micro_batch_size, num_workers, overfit
        self.n_train_windows = _count_windows(corpus, "train", seq_len)
        self.val_windows = spread(_count_windows(corpus, "val", seq_len), val_tokens // seq_len)
        if len(self.val_windows) == 0:
            raise UserError(
                f"data.val_tokens={val_tokens} is less than one sequence of {seq_len} (model.seq_len); raise it"
            )

    def train_dataloader(self) -> RunLoader:
        rank, world = self._place()
        order = WindowOrder(self.seed, self.n_train_windows)
        dataset = TrainBatches(self.corpus.train, order, rank, world, self.micro_batch_size, self.seq_len, self.overfit)
        return RunLoader(dataset, self.total_samples, self._pin_memory(), self.num_workers, self._align_progress)

    def val_dataloader(self) -> BatchLoader:
        rank, world = self._place()
        if len(self.val_windows) < world:
            raise UserError(
                f"{len(self.val_windows)} validation sequences are fewer than {world} devices; raise data.val_tokens"
            )
        dataset = ValBatches(self.corpus.val, self.val_windows, rank, world, self.micro_batch_size, self.seq_len)
        # In this process: the split is small and read again and again; 16 x 257 tokens took 0.5 ms on a CPU core.
        return BatchLoader(dataset, dataset.n_batches, self._pin_memory())

    def _align_progress(self, batches: int) -> None:
        """Lightning counts the batches of the world and micro-batch size that the checkpoint was made with. Count them
        in this run's, or it ends the run, validates and steps at the wrong batch."""
        if self.trainer is not None:
            progress = self.trainer.fit_loop.epoch_loop.batch_progress
            progress.increment_by(batches - progress.current.ready)

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _pin_memory(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"


def _count_windows(corpus: Corpus, name: str, seq_len: int) -> int:
    split: Split = getattr(corpus, name)
    if split.n_tokens < seq_len + 1:
        raise UserError(
            f"the {name} split of {corpus.manifest['source']} has {split.n_tokens} tokens, too few for one sequence of "
            f"{seq_len + 1} (model.seq_len + 1); add text or shorten model.seq_len"
        )
    return (split.n_tokens - 1) // seq_len
