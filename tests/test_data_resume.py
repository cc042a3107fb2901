"""Batches and weights of a run that is stopped and resumed equal those of one that never was, bit for bit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from qtrain.config import TokenizerConfig
from qtrain.data.batches import TokenBatches, TrainBatches, ValBatches
from qtrain.data.corpus import Corpus
from qtrain.data.order import MixedOrder, WindowOrder
from qtrain.data.prepare import prepare
from qtrain.data.sources.text import Text
from qtrain.errors import UserError

# B micro-batch, T seq_len, W world size
T, B, SAMPLES = 16, 4, 96


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    generator = np.random.default_rng(0)
    for i in range(40):
        (folder / f"{i}.txt").write_text("".join(map(chr, generator.integers(97, 123, size=30))))
    data = Text(
        source="text",
        files=(str(folder / "*.txt"),),
        val_tokens=10 * T,
        val_fraction=0.2,
        cache_dir=str(folder / "cache"),
    )
    return prepare(data, TokenizerConfig(kind="bytes"), progress=False)


class TinyModel:
    """A bigram model that keeps every batch it is trained on."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(257, 257)
        self.optimizer = torch.optim.AdamW(self.table.parameters(), lr=0.1)
        self.seen: list[torch.Tensor] = []

    def train(self, batch: torch.Tensor) -> None:
        self.seen.append(batch.clone())
        F.cross_entropy(self.table(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()


def fit(
    corpus: Corpus,
    *,
    workers: int = 0,
    micro_batch: int = B,
    accumulate: int = 1,
    first: int = 0,
    last: int = SAMPLES,
    model: TinyModel | None = None,
) -> TinyModel:
    """Train on the samples `first` to `last`, going on with the model and optimiser of what was done before."""
    model = model or TinyModel()
    data = module(corpus, micro_batch_size=micro_batch, num_workers=workers)
    for number, batch in enumerate(data.train(first, last), 1):
        model.train(batch)
        if number % accumulate == 0:
            model.optimizer.step()
            model.optimizer.zero_grad()
    return model


@pytest.mark.parametrize(
    ("accumulate", "stops", "workers"),
    [
        (1, [1], [0, 0]),
        (1, [7, 23], [0, 2, 0]),
        (2, [6, 16], [2, 0, 2]),
        (2, [24 - 2], [0, 2]),
    ],
)
def test_resumed_run_equals_undisturbed_run(
    corpus: Corpus, accumulate: int, stops: list[int], workers: list[int]
) -> None:
    whole = fit(corpus, accumulate=accumulate)
    assert len(whole.seen) == SAMPLES // B

    model = TinyModel()
    for first, last, count in zip([0, *stops], [*stops, SAMPLES // B], workers, strict=True):
        fit(corpus, accumulate=accumulate, workers=count, first=first * B, last=last * B, model=model)
        assert len(model.seen) == last
    assert torch.equal(torch.stack(model.seen), torch.stack(whole.seen))
    assert torch.equal(model.table.weight, whole.table.weight)


def test_resume_with_another_micro_batch(corpus: Corpus) -> None:
    whole = fit(corpus, micro_batch=B, accumulate=2)
    model = fit(corpus, micro_batch=B, accumulate=2, last=6 * B)
    assert len(model.seen) == 6
    for parameter in model.table.parameters():
        assert parameter.grad is None
    fit(corpus, micro_batch=2 * B, accumulate=1, first=6 * B, model=model)
    assert torch.equal(torch.cat(model.seen), torch.cat(whole.seen))
    assert len(model.seen) == 6 + (SAMPLES - 6 * B) // (2 * B)


def test_ranks_share_each_micro_batch(corpus: Corpus) -> None:
    def batches(world: int, micro_batch: int) -> list[torch.Tensor]:
        order = MixedOrder(3, [1], [(corpus.train.n_tokens - 1) // T])
        ranks = [TrainBatches([corpus.train], order, r, world, micro_batch, T, overfit=False) for r in range(world)]
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
    assert np.array_equal(torch.cat(list(module(corpus).train(0, SAMPLES))).numpy(), expected)


def test_overfit_repeats_the_first_batch(corpus: Corpus) -> None:
    batches = list(module(corpus, overfit=True).train(0, SAMPLES))
    first = next(iter(module(corpus).train(0, SAMPLES)))
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
    list(module(corpus).train(0, SAMPLES))
    list(module(corpus).validation[""].batches())
    assert torch.equal(torch.get_rng_state(), before)


def module(corpus: Corpus, **changes: object) -> TokenBatches:
    options = {"seq_len": T, "seed": 3, "micro_batch_size": B, "num_workers": 0} | changes
    return TokenBatches(replace(corpus, val_tokens=options.pop("val_tokens", 5 * T)), **options)


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
    with pytest.raises(UserError, match="samples 0 to 96 do not divide into batches of 5"):
        module(corpus, micro_batch_size=5).train(0, SAMPLES)
    with pytest.raises(UserError, match="samples 12 to 96 do not divide into batches of 8"):
        module(corpus, micro_batch_size=2, ranks=4).train(12, SAMPLES)
    with pytest.raises(UserError, match="validation sequences are fewer than 20 devices"):
        module(corpus, ranks=20)
