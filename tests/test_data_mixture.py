"""Mixtures: the proportion at every prefix, each part in its own order, the same tokens wherever a run is resumed."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from qtrain.config import Config, TokenizerConfig, config_hash, parse_saved
from qtrain.config.settings import proportions
from qtrain.data.batches import TokenBatches
from qtrain.data.bigram import bigram_cross_entropy
from qtrain.data.mixture import MixedCorpus, Read
from qtrain.data.order import MixedOrder, WindowOrder
from qtrain.data.prepare import fingerprint, prepare, same_text
from qtrain.errors import UserError
from qtrain.runs.table import read_run
from qtrain.sweep import find_points
from qtrain.train import compose
from qtrain.training.build import load_run
from qtrain.training.session import run

T, SAMPLES = 16, 960
SMALL = [
    "model.dim=32", "model.ffn_dim=64", "model.n_layers=1", f"model.seq_len={T}", "trainer.batch_tokens=64",
    "trainer.micro_batch_size=4", "trainer.tokens=320", "trainer.precision=32-true", "trainer.device=cpu",
    "callbacks.progress_bar=false",
]  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(weights=st.lists(st.integers(1, 1000), min_size=1, max_size=6), first=st.integers(0, 10**15))
def test_at_every_prefix_a_part_has_its_share(weights: list[int], first: int) -> None:
    order = MixedOrder(0, weights, [7] * len(weights))
    parts = np.array([order._place(number)[0] for number in range(300)])
    n = np.arange(1, 301)
    for part, weight in enumerate(weights):
        off = np.cumsum(parts == part) - n * weight / sum(weights)
        assert np.abs(off).max() <= 0.5 * (part + 1) + 1e-9
    far = [order._place(number) for number in range(first, first + 50)]
    for part in range(len(weights)):  # however far on, a part's samples are counted on without a gap
        numbers = [number for found, number in far if found == part]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else True


def test_each_part_is_read_in_its_own_order() -> None:
    parts, windows = MixedOrder(5, [3, 1], [40, 9])(np.arange(400))
    for part, count in enumerate((40, 9)):
        expected = WindowOrder(5, count)(np.arange(np.count_nonzero(parts == part)))
        assert np.array_equal(windows[parts == part], expected)
    assert np.bincount(parts).tolist() == [300, 100]
    alone = MixedOrder(5, [2], [40])(np.arange(100))
    assert np.array_equal(alone[1], WindowOrder(5, 40)(np.arange(100))) and not alone[0].any()


def test_order_is_pinned() -> None:
    """A change here would change every mixture that was ever resumed: it must be on purpose."""
    assert MixedOrder(0, [3, 1], [9, 9])(np.arange(8))[0].tolist() == [0, 0, 1, 0, 0, 0, 1, 0]
    assert MixedOrder(0, [1, 1, 2], [9, 9, 9])(np.arange(8))[0].tolist() == [2, 0, 1, 2, 2, 0, 1, 2]


def test_weights_count_by_their_proportion() -> None:
    assert proportions({"b": 0.25, "a": 0.75}) == {"a": 3, "b": 1} == proportions({"a": 6, "b": 2})
    assert proportions({"a": 0.1, "b": 0.2, "c": 0.7}) == {"a": 1, "b": 2, "c": 7}
    assert proportions({"a": 1e-7}) == {"a": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for name, words, count in (("web", ["red", "green", "blue"], 12), ("code", ["01", "23", "456"], 5)):
        (folder / name).mkdir()
        write_corpus(folder / name, words, count)
    return folder


def mixed(folder: Path, *more: str, weights: str = "{web: 3, code: 1}") -> Config:
    parts = [
        override
        for name in ("web", "code")
        for override in (
            f"+data@data.parts.{name}=text", f"data.parts.{name}.files={folder}/{name}/*.txt",
            f"data.parts.{name}.val_tokens=64",
        )
    ]  # fmt: skip
    places = [f"data.cache_dir={folder}/cache", f"run_root={folder}/runs"]
    return compose([*SMALL, "data=mixture", *parts, f"data.weights={weights}", *places, *more])


@pytest.fixture(scope="module")
def corpus(folder: Path) -> MixedCorpus:
    config = mixed(folder)
    found = prepare(config.data, config.tokenizer, progress=False)
    assert isinstance(found, MixedCorpus)
    return found


def batches(corpus: MixedCorpus, ranks: int, micro_batch: int, first: int, last: int) -> torch.Tensor:
    """The samples first to last as all ranks together get them."""
    options = {"seq_len": T, "seed": 3, "micro_batch_size": micro_batch, "num_workers": 0, "ranks": ranks}
    loaders = [TokenBatches(corpus, rank=rank, **options).train(first, last) for rank in range(ranks)]
    return torch.cat([torch.cat(step) for step in zip(*loaders, strict=True)])


def test_a_stopped_run_gets_the_same_tokens_on_one_rank_and_on_two(corpus: MixedCorpus) -> None:
    whole = batches(corpus, 1, 4, 0, SAMPLES)
    order = {part.name: WindowOrder(3, (part.corpus.train.n_tokens - 1) // T) for part in corpus.parts}
    assert [part.name for part in corpus.parts] == ["code", "web"]
    given = {"code": 0, "web": 0}
    for sample in whole.tolist():  # written out: whose token it is, the digits or the colours
        name = "code" if set(sample) <= {*b"0123456 ", 256} else "web"
        window = int(order[name](np.array([given[name]]))[0])
        stream = corpus.parts[name == "web"].corpus.train
        assert sample == stream.window(window * T, T + 1).tolist()
        given[name] += 1
    assert given == {"code": SAMPLES // 4, "web": 3 * SAMPLES // 4}
    n_windows = [order[name].n_windows for name in ("code", "web")]
    assert given["code"] > n_windows[0] or given["web"] > n_windows[1], "a part begins a second epoch"
    for stop in (4, 100, 956):
        for ranks, micro_batch in ((1, 4), (2, 2), (2, 1), (4, 1)):
            rest = batches(corpus, ranks, micro_batch, stop, SAMPLES)
            assert torch.equal(torch.cat([whole[:stop], rest]), whole)
    again = [batches(corpus, 2, 2, 0, 100), batches(corpus, 1, 2, 100, 180), batches(corpus, 2, 1, 180, SAMPLES)]
    assert torch.equal(torch.cat(again), whole)


def test_a_run_on_a_mixture(folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    config = mixed(folder, f"run_dir={folder}/run", "trainer.tokens=6400")
    loss = run(config)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "val_loss" in line][-1]
    assert (
        loss == last["val_loss"] == pytest.approx(0.25 * last["val_loss/code"] + 0.75 * last["val_loss/web"], rel=1e-12)
    )
    assert last["val_loss/code"] != last["val_loss/web"]
    assert last["val_tokens/code"] == last["val_tokens/web"] == 64
    bits = last["val_loss"] / math.log(2) / (0.25 * 801 / 802 + 0.75)  # nearly a byte a token
    assert last["val_bits_per_byte"] == pytest.approx(bits, rel=2e-3)
    row = read_run(folder / "run")
    assert (row["data"], row["val_tokens"]) == ("mixture", 128)
    shown = " ".join(capsys.readouterr().out.split())
    assert "text read code: " in shown and "; web: " in shown
    assert "6,400 of mixture (1 code, 3 web)" in shown
    assert run(config) == loss
    assert "is finished" in capsys.readouterr().out
    (point,) = find_points([config])
    assert point.state == "done" and point.is_certain


def test_the_plan_says_how_often_each_part_is_read(folder: Path, corpus: MixedCorpus, capsys) -> None:
    config = mixed(folder, "dry_run=true", "trainer.tokens=64000")
    run(config)
    n = [(part.corpus.train.n_tokens - 1) // T for part in corpus.parts]
    expected = f"text read code: {1000 / n[0]:.3g} times; web: {3000 / n[1]:.3g} times"
    assert expected in " ".join(capsys.readouterr().out.split())


def test_one_part_is_the_source_alone(folder: Path) -> None:
    files = f"{folder}/web/*.txt"
    alone = compose([*SMALL, "data=text", f"data.files={files}", "data.val_tokens=64", f"run_dir={folder}/alone",
                     f"data.cache_dir={folder}/cache"])  # fmt: skip
    one = compose([*SMALL, "data=mixture", "+data@data.parts.web=text", f"data.parts.web.files={files}",
                   "data.parts.web.val_tokens=64", "data.weights={web: 7}", f"run_dir={folder}/one",
                   f"data.cache_dir={folder}/cache"])  # fmt: skip
    assert run(alone) == run(one)
    weights = [load_run(folder / name).state_dict() for name in ("alone", "one")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_parts_and_weights_are_in_the_name(folder: Path) -> None:
    config = mixed(folder)
    assert parse_saved(config.model_dump(mode="json")) == config
    assert config_hash(config) == config_hash(mixed(folder, weights="{code: 0.25, web: 0.75}"))
    others = [
        mixed(folder, weights="{web: 2, code: 1}"),
        mixed(folder, "data.weights.web=4"),
        mixed(folder, "data.parts.web.val_fraction=0.1"),
    ]
    assert len({config_hash(other) for other in [config, *others]}) == 4


def test_the_text_of_a_mixture_is_that_of_its_parts(folder: Path, corpus: MixedCorpus, tmp_path: Path) -> None:
    config, other = mixed(folder), mixed(folder, weights="{web: 2, code: 1}")
    ended = {"data_hash": corpus.data_hash, "data_fingerprint": corpus.fingerprint}
    assert fingerprint(config.data, config.tokenizer) == corpus.fingerprint
    assert same_text(config.data, config.tokenizer, ended, may_prepare=False) is True
    assert same_text(config.data, config.tokenizer, {"data_hash": corpus.data_hash}) is True
    assert same_text(other.data, other.tokenizer, ended) is False
    elsewhere = mixed(folder, f"data.cache_dir={tmp_path}/cache")
    assert same_text(elsewhere.data, config.tokenizer, {"data_hash": "x"}, may_prepare=False) is None
    assert prepare(elsewhere.data, config.tokenizer, progress=False).data_hash == corpus.data_hash
    assert corpus.bigram_cross_entropy < math.log(257) / 4
    read = Read(np.concatenate([part.corpus.train.window(0, part.corpus.train.n_tokens) for part in corpus.parts]))
    losses = [bigram_cross_entropy(read, part.corpus.val, 257) for part in corpus.parts]
    assert corpus.bigram_cross_entropy == pytest.approx(0.25 * losses[0] + 0.75 * losses[1])


def test_parts_share_a_trained_tokenizer(folder: Path) -> None:
    config, bpe = mixed(folder), TokenizerConfig(kind="bpe", vocab_size=300)
    corpus = prepare(config.data, bpe, progress=False)
    first, second = (part.corpus.tokenizer for part in corpus.parts)
    assert first.hash == second.hash
    for text in ("red green", "0123 456"):
        assert len(first.encode(text)) < len(text) / 2, "it has seen both texts"
    assert prepare(config.data, bpe, progress=False).fingerprint == corpus.fingerprint
    assert fingerprint(config.data, TokenizerConfig(kind="bpe", vocab_size=301)) != corpus.fingerprint


def test_text_of_one_part_that_another_is_validated_on_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = mixed(folder, f"data.parts.code.files={folder}/web/*.txt", "data.parts.code.val_fraction=0.2")
    prepare(config.data, config.tokenizer, progress=False)
    assert "documents of data.parts.code are training text too" in caplog.text


@pytest.mark.parametrize(("override", "told"), [
    ("data.weights.web=0", r"data\.weights\.web=0: Input should be greater than 0"),
    ("data.weights.wb=1", r"data\.weights names code, wb, web, and data\.parts code, web; give each part its weight"),
    ("data.parts.code.cache_dir=x", r"data\.parts\.code\.cache_dir: all sources of a run have one; set data\.cache_d"),
    ("data.parts.code.source=mixture", r"data\.parts\.code\.source='mixture': there is no such source"),
    ("data.parts.code.filez=x", r"unknown key 'data\.parts\.code\.filez'; did you mean 'data\.parts\.code\.files'"),
    ("+data@validation.code=stdlib", r"validation\.code is a part of data too"),
    ("data.files=x", r"unknown key 'data\.files' \(found 'x'\)"),
])  # fmt: skip
def test_mistakes_are_told_by_their_place(folder: Path, override: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        mixed(folder, override)


def test_a_mixture_of_nothing_says_how_to_write_one() -> None:
    with pytest.raises(UserError, match=r"needs data\.parts and data\.weights: \+data@data\.parts\.web=c4"):
        compose([*SMALL, "data=mixture"])
