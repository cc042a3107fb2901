"""Further sources to validate on: each has its own loss, and the run's own stays what it is, bit for bit."""

import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import data_settings, write_corpus
from torch.nn import functional as F

from qtrain.config import TokenizerConfig, config_hash, parse_saved
from qtrain.data.batches import TokenBatches
from qtrain.data.prepare import count_shared, prepare, prepare_validation
from qtrain.errors import UserError
from qtrain.report.page import write_report
from qtrain.runs.directory import RunDirectory
from qtrain.train import compose
from qtrain.training.build import load_run
from qtrain.training.session import run

T = 16
SMALL = [
    "model.dim=32", "model.ffn_dim=64", "model.n_layers=1", f"model.seq_len={T}", "trainer.batch_tokens=64",
    "trainer.micro_batch_size=4", "trainer.tokens=320", "trainer.precision=32-true", "trainer.device=cpu",
    "data=text", "data.val_tokens=64", "callbacks.val_every_steps=2", "callbacks.progress_bar=false",
]  # fmt: skip
NAMED = ("val_loss/", "val_bits_per_byte/", "val_tokens/")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "run").mkdir()
    write_corpus(folder / "run", ["red", "green", "blue"], 30)
    (folder / "digits.txt").write_text(" ".join(str(random.Random(0).random()) for _ in range(40)))
    rows = [{"body": f"{number}: ☕ und Kuchen"} for number in range(30)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(folder: Path, *more: str) -> list[str]:
    return [*SMALL, f"data.files={folder}/run/*.txt", f"data.cache_dir={folder}/cache", *more]


def named(folder: Path) -> list[str]:
    return [
        "+data@validation.digits=text", f"validation.digits.files={folder}/digits.txt",
        "validation.digits.val_tokens=96",
        "validation.rows.source=jsonl", "validation.rows.val_tokens=131_072",
        f"validation.rows.files={folder}/rows.jsonl", "validation.rows.text_field=body",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def runs(folder: Path) -> tuple[Path, Path]:
    """Directories of a run that validates on its own text alone, and of one that validates on two more."""
    places = []
    for name, more in (("alone", []), ("named", named(folder))):
        places.append(folder / name)
        assert run(compose(settings(folder, f"run_dir={folder / name}", *more))) is not None
    return places[0], places[1]


def lines(directory: Path) -> list[dict[str, float]]:
    found = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if "val_loss" in line]


def test_the_own_loss_stays_and_the_named_ones_stand_beside_it(runs: tuple[Path, Path]) -> None:
    alone, beside = map(lines, runs)
    assert len(alone) == 3
    assert [{key: value for key, value in line.items() if not key.startswith(NAMED)} for line in beside] == alone
    assert {key for key in beside[0] if key.startswith(NAMED)} == {
        f"{kind}{n}" for kind in NAMED for n in ("digits", "rows")
    }
    for name in ("digits", "rows"):
        assert len({line[f"val_loss/{name}"] for line in beside}) == 3, "each validation is of the weights of its step"
    summary = RunDirectory(runs[1]).summary
    assert summary["validation"]["rows"]["loss"] == beside[-1]["val_loss/rows"]
    assert "validation" not in RunDirectory(runs[0]).summary
    weights = [load_run(directory).state_dict() for directory in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(("name", "most"), [("digits", 96), ("rows", 131_072)])
def test_a_loss_is_the_cross_entropy_of_all_that_text(
    folder: Path, runs: tuple[Path, Path], name: str, most: int
) -> None:
    """Written out from the text itself: no document of a file that is named for validation is left out."""
    texts = [(folder / "digits.txt").read_text()]
    if name == "rows":
        texts = [json.loads(line)["body"] for line in (folder / "rows.jsonl").read_text().splitlines()]
    stream = np.concatenate([[*text.encode(), 256] for text in texts])
    count = min((len(stream) - 1) // T, most // T)
    starts = np.arange(count) * ((len(stream) - 1) // T) // count * T
    x = torch.tensor(np.stack([stream[start : start + T + 1] for start in starts]))
    model = load_run(runs[1])
    with torch.no_grad():
        loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).item()
    last = lines(runs[1])[-1]
    assert last[f"val_tokens/{name}"] == count * T
    assert last[f"val_loss/{name}"] == pytest.approx(loss, rel=1e-6)
    bytes_per_token = sum(len(text.encode()) for text in texts) / len(stream)
    assert last[f"val_bits_per_byte/{name}"] == pytest.approx(loss / math.log(2) / bytes_per_token, rel=1e-6)


def test_the_page_shows_each_source(runs: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    for name in ("config.yaml", "summary.json"):
        (tmp_path / "odd" / name).write_bytes((runs[1] / name).read_bytes())
    text = (runs[1] / "metrics.jsonl").read_text().replace("val_loss/digits", "val_loss/../../digits")
    (tmp_path / "odd" / "metrics.jsonl").write_text(text)
    (tmp_path / "page").mkdir()
    write_report([*runs, tmp_path / "odd"], tmp_path / "page" / "report.html", [], "bf16", "make it")
    page = (tmp_path / "page" / "report.html").read_text()
    last = lines(runs[1])[-1]
    cells = ["bf16", "0", "digits", f"{last['val_loss/digits']:.4f}", f"{last['val_bits_per_byte/digits']:.4f}", "96"]
    (row,) = [row for row in page.split("<tr>") if "<td>digits</td>" in row]
    assert re.findall(r"<td[^>]*>([^<]*)</td>", row) == cells
    figures = {path.stem for path in (tmp_path / "page" / "report").glob("*.png")}
    assert {"loss-on-digits", "loss-on-rows"} <= figures
    assert not list(tmp_path.rglob("*digits*.pdf"))[1:], "a name of a foreign file leads nowhere"
    write_report([runs[0]], tmp_path / "page" / "report.html", [], "bf16", "make it")
    assert "Validation sources" not in (tmp_path / "page" / "report.html").read_text()


def test_two_ranks_share_each_source(folder: Path) -> None:
    config = compose(settings(folder, *named(folder)))
    corpus = prepare(config.data, config.tokenizer, progress=False)
    further = prepare_validation(config.validation, config.data, config.tokenizer, corpus, progress=False)
    alone, *ranks = (
        TokenBatches(
            corpus, seq_len=T, seed=0, micro_batch_size=4, num_workers=0, validation=further, rank=rank, ranks=n
        )
        for rank, n in [(0, 1), (0, 2), (1, 2)]
    )
    for name in ("", "digits", "rows"):
        whole = torch.cat(list(alone.validation[name].batches()))
        shares = [list(rank.validation[name].batches()) for rank in ranks]
        assert len(shares[0]) == len(shares[1])
        assert torch.equal(torch.cat([batch for share in shares for batch in share]), whole)


def test_further_sources_are_in_the_name_and_none_leaves_it(folder: Path) -> None:
    plain, beside = compose(settings(folder)), compose(settings(folder, *named(folder)))
    assert config_hash(plain) != config_hash(beside)
    tree = plain.model_dump(mode="json")
    del tree["validation"]  # as versions without it wrote it
    assert config_hash(parse_saved(tree)) == config_hash(plain)
    assert parse_saved(beside.model_dump(mode="json")) == beside
    moved = beside.model_dump(mode="json")
    moved["validation"]["rows"]["files"] = [f"{folder}/run/../rows.jsonl"]
    assert config_hash(parse_saved(moved)) == config_hash(beside)


def test_all_sources_have_the_tokenizer_of_the_run(folder: Path) -> None:
    config = compose(settings(folder, *named(folder)))
    tokenizer = TokenizerConfig(kind="bpe", vocab_size=300)
    corpus = prepare(config.data, tokenizer, progress=False)
    further = prepare_validation(config.validation, config.data, tokenizer, corpus, progress=False)
    text = (folder / "digits.txt").read_text()
    assert further["digits"].val.window(0, further["digits"].val.n_tokens).tolist() == [
        *corpus.tokenizer.encode(text), corpus.tokenizer.eos_id,
    ]  # fmt: skip
    assert corpus.tokenizer.decode(corpus.tokenizer.encode(text)) == text


def test_a_run_does_not_go_on_with_another_text_of_a_name(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "watched.txt"
    text.write_text("one two three four " * 20)
    command = settings(
        folder, f"run_dir={tmp_path / 'run'}", "+data@validation.watched=text", f"validation.watched.files={text}",
        "validation.watched.val_tokens=64",
    )  # fmt: skip
    assert run(compose([*command])) is not None
    directory = RunDirectory(tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text(json.dumps(directory.summary | {"status": "interrupted"}))
    assert run(compose(command)) is not None, "of the same text it goes on"
    (tmp_path / "run" / "summary.json").write_text(json.dumps(directory.summary | {"status": "interrupted"}))
    text.write_text("five six seven eight " * 20)
    with pytest.raises(UserError, match=r"was started with another text of validation\.watched, whose losses"):
        run(compose(command))


def test_text_that_is_trained_on_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = data_settings(source="text", files=f"{folder}/run/*.txt", val_tokens=64, cache_dir=str(folder / "cache"))
    corpus = prepare(data, TokenizerConfig(kind="bytes"), progress=False)
    further = prepare_validation({"same": data}, data, TokenizerConfig(kind="bytes"), corpus, progress=False)
    assert further["same"].val.n_documents == 30
    assert count_shared(corpus.train, further["same"].val) == corpus.train.n_documents == 29
    assert "29 documents of validation.same are training text too" in caplog.text
    assert count_shared(corpus.train, corpus.val) == 0


@pytest.mark.parametrize(("override", "told"), [
    ("validation.a.source=txt", r"validation\.a\.source='txt': there is no such source; did you mean 'text'\?"),
    ("validation.a.files=x.txt", r"validation\.a\.source=None: there is no such source"),
    ("validation.digits.filez=x", r"unknown key 'validation\.digits\.filez'; did you mean 'validation\.digits\.files'"),
    ("validation.digits.num_workers=2", r"validation\.digits\.num_workers: all sources of a run have one; set data\."),
    ("validation={a/b:{source:stdlib,val_tokens:9}}", r"'a/b' cannot name a source: validation\.a/b; use letters"),
    ("validation.a.source=stdlib", r"missing key 'validation\.a\.val_tokens'; set it in a config file or as "),
    ("validation.digits.source=mixture", r"validation\.digits\.source='mixture': there is no such source"),
])  # fmt: skip
def test_mistakes_are_told_by_their_place(folder: Path, override: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        compose(settings(folder, *named(folder), override))


def test_a_source_that_is_not_there_is_told_by_its_name(folder: Path) -> None:
    config = compose(settings(folder, "+data@validation.a=text", "validation.a.files=/nowhere/x.txt"))
    corpus = prepare(config.data, config.tokenizer, progress=False)
    with pytest.raises(UserError, match=r"^validation\.a: data\.files=/nowhere/x\.txt matches no file"):
        prepare_validation(config.validation, config.data, config.tokenizer, corpus, progress=False)
