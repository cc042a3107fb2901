"""A trained run out to transformers, and in again."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from qtrain.data.tokenizer import ByteTokenizer
from qtrain.errors import UserError
from qtrain.export.huggingface import export
from qtrain.models.decoder import Decoder
from qtrain.runs.directory import RunDirectory
from qtrain.train import main
from qtrain.training.checkpoint import newest, weights

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")


def train(folder: Path, *settings: str) -> RunDirectory:
    """A run in folder/run: 64 steps on a text whose words soon are known."""
    common = (
        "recipe=quartet trainer.batch_tokens=256 trainer.micro_batch_size=8 trainer.precision=32-true "
        "trainer.device=cpu trainer.tokens=16384 optimizer.lr=0.01 data=text data.val_tokens=256 "
        f"callbacks.progress_bar=false data.files={folder}/a.txt data.cache_dir={folder}/cache run_dir={folder}/run"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *common.split(), *settings])
        main()
    return RunDirectory(folder / "run")


NANO = [f"model.{size}" for size in ("dim=64", "ffn_dim=64", "n_layers=1", "n_heads=2", "n_kv_heads=1", "seq_len=32")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    folder = tmp_path_factory.mktemp("run")
    (folder / "a.txt").write_text("the cat sat on the mat. " * 400)
    return train(folder, *NANO)


@pytest.fixture(scope="module")
def exported(run: RunDirectory) -> Path:
    out = run.path.parent / "exported"
    said = export(run.path, out)
    assert (said.step, said.recipe) == (64, "quartet")
    assert said.weight_bytes == 2 * said.parameters
    return out


def test_transformers_reads_the_weights_and_gives_their_logits(run: RunDirectory, exported: Path) -> None:
    found = newest(run.checkpoints)
    assert found is not None
    ours = Decoder(run.read_config().model, 257)
    ours.load_state_dict({name: value.bfloat16().float() for name, value in weights(found[1]).items()})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    batch = torch.randint(257, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs(batch).logits, ours(batch), rtol=1e-4, atol=1e-4)


def test_transformers_reads_the_tokenizer(exported: Path) -> None:
    theirs, text = transformers.AutoTokenizer.from_pretrained(exported), "Grüße, 世界!\n\t \x00 <|endoftext|>"
    ours = ByteTokenizer()
    assert theirs.eos_token_id == ours.eos_id
    assert np.array_equal(theirs(text, split_special_tokens=True)["input_ids"], ours.encode(text))
    assert theirs.decode([*ours.encode(text)]) == text


def test_a_run_starts_from_the_exported_weights_and_goes_on_without_them(run: RunDirectory, exported: Path) -> None:
    """With a learning rate of next to nothing, what it ends with is what it started from."""
    folder = run.path.parent / "again"
    folder.mkdir()
    shutil.copy(run.path.parent / "a.txt", folder)
    shutil.copytree(exported, folder / "model")
    settings = (f"model=hf:{folder}/model", "optimizer.lr=1e-12", "optimizer.weight_decay=0", "trainer.tokens=512")
    again = train(folder, *settings, "debug.max_steps=1")
    config = again.read_config()
    assert (config.model.name, config.model.seq_len, config.tokenizer.kind) == ("model", 32, "huggingface")
    assert again.summary["val_loss"] == pytest.approx(run.summary["val_loss"], abs=0.02)
    assert run.summary["val_loss"] < 4  # of ln(257) = 5.5
    shutil.rmtree(folder / "model")
    assert RunDirectory(again.path).read_config() == config


def test_nothing_is_written_where_it_cannot_be(run: RunDirectory, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"exported exists; give a new folder"):
        export(run.path, exported)
    shutil.copytree(run.path, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match=r"has no checkpoint yet"):
        export(tmp_path / "run", tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file/out"):
        export(run.path, tmp_path / "file" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]


def test_the_folder_says_what_it_is(exported: Path) -> None:
    assert sorted(path.name for path in exported.iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    config = json.loads((exported / "config.json").read_text())
    assert (config["architectures"], config["eos_token_id"], config["vocab_size"]) == (["LlamaForCausalLM"], 256, 257)
