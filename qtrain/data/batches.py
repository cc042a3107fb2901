"""Batches of a run, whose state is one number: how many samples all ranks together have been given.

Sample g is the window of the training split, or that of a part of a mixture, that `MixedOrder(seed, ...)(g)` tells.
So nothing about the order is stored, and another worker count, number of ranks or micro-batch size goes on from the
same number.
"""

# B micro-batch, T seq_len, W world size

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qtrain.data.corpus import Corpus, Stream
from qtrain.data.mixture import MixedCorpus
from qtrain.data.order import MixedOrder
from qtrain.errors import UserError


class TrainBatches(Dataset[Tensor]):
    """Item i: this rank's share of micro-batch i of the run, (B, T + 1) int64: samples (i W + rank) B onwards."""

    def __init__(
        self,
        splits: Sequence[Stream],
        order: MixedOrder,
        rank: int,
        world: int,
        micro_batch: int,
        seq_len: int,
        overfit: bool,
    ) -> None:
        self.splits, self.order, self.seq_len = splits, order, seq_len
        self.rank, self.world, self.micro_batch, self.overfit = rank, world, micro_batch, overfit

    def __getitem__(self, index: int) -> Tensor:
        step = 0 if self.overfit else index
        first = (step * self.world + self.rank) * self.micro_batch
        parts, windows = self.order(np.arange(first, first + self.micro_batch))
        return _windows([self.splits[part] for part in parts], windows, self.seq_len)


class ValBatches(Dataset[Tensor]):
    """Item i: batch i of this rank's share of the windows given, in their order, (<= B, T + 1) int64.

    Every window is on one rank, and every rank has as many batches (FSDP needs each rank in each forward): full ones
    first, then what is left, at least one window in each.
    """

    def __init__(
        self, split: Stream, windows: np.ndarray, rank: int, world: int, micro_batch: int, seq_len: int
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
        windows = np.array(self.batches[index])
        return _windows([self.split] * len(windows), windows, self.seq_len)


class ValidationSet(NamedTuple):
    """Text that is validated on. batches: makes this rank's, (<= B, T + 1) int64 each. bytes_per_token: UTF-8 bytes of
    text. share: of the run's own val_loss; 0 of a further source."""

    batches: Callable[[], Iterable[Tensor]]
    bytes_per_token: float
    share: float


def spread(total: int, wanted: int) -> np.ndarray:
    """At most `wanted` of `total` windows, evenly over all of them: the first ones may all be of one document."""
    count = min(total, wanted)
    return np.arange(count) * total // max(1, count)


def _windows(splits: Sequence[Stream], windows: np.ndarray, seq_len: int) -> Tensor:
    pairs = zip(splits, windows, strict=True)
    return torch.from_numpy(np.stack([split.window(int(i) * seq_len, seq_len + 1) for split, i in pairs]))


class BatchLoader:
    """A pass over the chosen items of a dataset whose items are batches. len() is their number."""

    def __init__(self, dataset: Dataset[Tensor], chosen: range, pin_memory: bool, num_workers: int = 0) -> None:
        self._dataset, self._chosen = dataset, chosen
        self._pin_memory, self._num_workers = pin_memory, num_workers
        self._running: Any = None

    def __len__(self) -> int:
        return len(self._chosen)

    def __iter__(self) -> Iterator[Tensor]:
        self._running = iter(
            DataLoader(
                self._dataset,
                batch_size=None,
                sampler=self._chosen,
                num_workers=self._num_workers,
                pin_memory=self._pin_memory,
                worker_init_fn=_ignore_signals if self._num_workers else None,
                generator=torch.Generator(),  # or it would draw its workers' seed from the global one
            )
        )
        return self._running

    def close(self) -> None:
        """End the loader processes. Where an error's traceback keeps the pass alive, nobody else does: this process
        would wait for them at its end, since they ignore SIGTERM."""
        if self._num_workers and self._running is not None:
            self._running._shutdown_workers()


def _ignore_signals(_worker: int) -> None:
    """Signals reach the whole process group; the training process decides what they mean."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


class TokenBatches:
    """Batches of a corpus for one of `ranks` processes, (micro_batch_size, seq_len + 1) int64: inputs are [:, :-1],
    targets [:, 1:].

    Validation predicts corpus.val_tokens of the validation split, spread evenly over it, rounded down to whole
    sequences; and so of each part of a mixture, and of each further corpus in `validation`. overfit: every batch is
    the first one. UserError if a split is too small.
    """

    def __init__(
        self,
        corpus: Corpus | MixedCorpus,
        *,
        seq_len: int,
        seed: int,
        micro_batch_size: int,
        num_workers: int,
        validation: Mapping[str, Corpus] | None = None,
        overfit: bool = False,
        rank: int = 0,
        ranks: int = 1,
        pin_memory: bool = False,
    ) -> None:
        self.per_batch = micro_batch_size * ranks
        self._num_workers, self._pin_memory = num_workers, pin_memory
        parts = corpus.parts
        weights, corpora = [part.weight for part in parts], [part.corpus for part in parts]
        order = MixedOrder(seed, weights, [_count_windows(each, "train", seq_len) for each in corpora])
        splits = [each.train for each in corpora]
        self._train = TrainBatches(splits, order, rank, ranks, micro_batch_size, seq_len, overfit)
        self._passes: list[BatchLoader] = []

        held_out = partial(
            validation_set, seq_len=seq_len, micro_batch_size=micro_batch_size, rank=rank, ranks=ranks,
            pin_memory=pin_memory,
        )  # fmt: skip
        further = {name: held_out(f"validation.{name}", each) for name, each in (validation or {}).items()}
        own = {part.name: held_out(part.place, part.corpus, share=part.weight / sum(weights)) for part in parts}
        self.validation = own | further

    def train(self, first: int, last: int) -> BatchLoader:
        """This rank's batches of the samples `first` to `last` of the run. UserError where these are no whole batches
        of all ranks."""
        if first % self.per_batch or last % self.per_batch:
            raise UserError(
                f"samples {first} to {last} do not divide into batches of {self.per_batch} "
                "(trainer.micro_batch_size x devices); resume with the sizes that the checkpoint was made with"
            )
        chosen = range(first // self.per_batch, last // self.per_batch)
        self._passes.append(BatchLoader(self._train, chosen, self._pin_memory, self._num_workers))
        return self._passes[-1]

    def close(self) -> None:
        """End the loader processes."""
        while self._passes:
            self._passes.pop().close()


def validation_set(
    place: str,
    corpus: Corpus,
    *,
    seq_len: int,
    micro_batch_size: int,
    share: float = 0.0,
    rank: int = 0,
    ranks: int = 1,
    pin_memory: bool = False,
) -> ValidationSet:
    """corpus.val_tokens of the validation split, spread evenly over it, in whole sequences. place: of the settings that
    errors name. UserError where they are too few."""
    windows = _validation_windows(place, corpus, seq_len, ranks)
    batches = ValBatches(corpus.val, windows, rank, ranks, micro_batch_size, seq_len)
    # In this process: a split is small and read again and again; 16 x 257 tokens took 0.5 ms on a CPU core.
    load = partial(BatchLoader, batches, range(batches.n_batches), pin_memory)
    return ValidationSet(load, corpus.bytes_per_token, share)


def _validation_windows(place: str, corpus: Corpus, seq_len: int, ranks: int) -> np.ndarray:
    """The windows of the validation split that are read. UserError for too few, naming the setting."""
    windows = spread(_count_windows(corpus, "val", seq_len), corpus.val_tokens // seq_len)
    if len(windows) == 0:
        raise UserError(
            f"{place}.val_tokens={corpus.val_tokens} is less than one sequence of {seq_len} (model.seq_len); raise it"
        )
    if len(windows) < ranks:
        raise UserError(f"{len(windows)} validation sequences are fewer than {ranks} devices; raise {place}.val_tokens")
    return windows


def _count_windows(corpus: Corpus, name: str, seq_len: int) -> int:
    split: Stream = getattr(corpus, name)
    if split.n_tokens < seq_len + 1:
        raise UserError(
            f"the {name} split of {corpus.name} has {split.n_tokens} tokens, too few for one sequence of "
            f"{seq_len + 1} (model.seq_len + 1); add text or shorten model.seq_len"
        )
    return (split.n_tokens - 1) // seq_len
