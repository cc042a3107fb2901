"""The command from settings to run directory, in small: what it leaves behind, and what it says to mistakes."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_corpus
from run_state import last_weights, tensors_in
from torch._inductor import config as inductor
from torch._inductor import cpp_builder

import qtrain
from qtrain.cli import start
from qtrain.config.recipe import read_recipe
from qtrain.errors import DivergedError, UserError
from qtrain.quant import QuantLinear
from qtrain.runs.directory import RunDirectory
from qtrain.train import checked_overrides, compose
from qtrain.training.build import load_tokenizer, pick_device
from qtrain.training.checkpoint import list_checkpoints, save, tensors_of
from qtrain.training.session import run

ROOT = Path(__file__).parents[1]
STEPS = 12
SUMMARY = {
    "status", "recipe", "seed", "parameters", "non_embedding_parameters", "tokens", "steps", "flops", "val_loss",
    "val_bits_per_byte", "tokens_per_second", "config_hash", "data_hash", "commit",
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), ["red", "green", "blue"], 30)


@pytest.fixture
def small(corpus, tmp_path) -> list[str]:
    return [
        "backend=auto",
        "model.dim=64",
        "model.ffn_dim=96",
        "model.n_layers=1",
        "model.seq_len=32",
        f"trainer.tokens={STEPS * 128}",
        "trainer.batch_tokens=128",
        "trainer.micro_batch_size=4",
        "callbacks.log_every_steps=2",
        "callbacks.val_every_steps=4",
        "callbacks.checkpoint_every_steps=5",
        "data.source=text",
        f"data.files={corpus}/*.txt",
        f"data.cache_dir={corpus}/cache",
        "data.val_tokens=256",
        f"run_root={tmp_path}/runs",
    ]


def only_run(tmp_path: Path) -> RunDirectory:
    (path,) = (tmp_path / "runs").iterdir()
    return RunDirectory(path)


@pytest.mark.parametrize(("recipe", "tokenizer"), [
    ("quartet", []),  # a vocabulary of 257
    ("tetrajet_v2_baseline", ["tokenizer=bpe", "tokenizer.vocab_size=300"]),
])  # fmt: skip
def test_lm_head_is_quantised_from_the_command_line(small, tmp_path, recipe: str, tokenizer: list[str]) -> None:
    overrides = checked_overrides([*small, *tokenizer, f"recipe={recipe}", "recipe.skip=[]", "debug.max_steps=2"])
    loss = run(compose([*overrides]))
    assert loss is not None and loss < 7
    model = qtrain.load_run(only_run(tmp_path).path)
    assert isinstance(model.get_submodule("lm_head"), QuantLinear)


def test_a_run_leaves_what_it_promises(small, tmp_path, capsys):
    loss = run(compose([*small, "recipe=quartet"]))
    shown = capsys.readouterr().out
    directory = only_run(tmp_path)
    assert {path.name for path in directory.path.iterdir()} >= {
        "config.yaml", "environment.json", "metrics.jsonl", "summary.json", "loss.png", "checkpoints",
    }  # fmt: skip
    assert (directory.path / "loss.png").read_bytes().startswith(b"\x89PNG")
    summary = directory.summary
    assert summary.keys() >= SUMMARY
    assert summary["status"] == "finished" and summary["recipe"] == "quartet" and summary["steps"] == STEPS
    assert summary["val_loss"] == loss == directory.lines("val_loss")[-1]["val_loss"]
    assert [line["step"] for line in directory.lines("val_loss")] == [4, 8, 12]
    assert [line["step"] for line in directory.lines("lr")] == [2, 4, 6, 8, 10, 12]
    assert [step for step, _ in list_checkpoints(directory.checkpoints)] == [10, 12], "the newest two are kept"
    for line in directory.lines("lr"):
        assert line.keys() >= {"tokens", "flops", "loss", "grad_norm", "tokens_per_second", "memory_bytes"}
        assert line["tokens"] == 128 * line["step"]
    assert loss < math.log(257) - 1, "it has learned"
    for word in ("nano", "quartet", "cpu", str(directory.path.name), "bigram"):
        assert word in shown.replace("\n", "")


def test_fp8_products_are_said_and_counted(small, tmp_path):
    run(compose([*small, "recipe=mxfp8", "gemm=fp8", "debug.max_steps=4", "callbacks.telemetry_every_steps=2"]))
    directory = only_run(tmp_path)
    lines = [
        line
        for line in map(json.loads, directory.metrics.read_text().splitlines())
        if any(key.startswith("quant/") for key in line)
    ]
    shares = [value for line in lines for name, value in line.items() if name.endswith("/fp8_rounded")]
    assert len(shares) == len(lines) * 7 * 6 and 0 < max(shares) < 0.2  # one block of seven layers
    assert "gemms fp8_block fp8_block fp8_block" in repr(qtrain.load_run(directory.path))
    with pytest.raises(UserError, match=r"gemm=fp8 gives products in bfloat16, and trainer.precision is 32-true; set"):
        compose([*small, "recipe=quartet", "gemm=fp8", "trainer.precision=32-true"])


@pytest.mark.parametrize("tokenizer", [["tokenizer=bpe", "tokenizer.vocab_size=280"], []], ids=["bpe", "bytes"])
def test_a_run_continues_a_prompt(small, tmp_path, monkeypatch, capsys, tokenizer):
    run(compose([*small, *tokenizer, "recipe=quartet_v1"]))
    capsys.readouterr()
    path = only_run(tmp_path).path

    def text(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["generate.py", str(path), "--prompt", "red gr", "--tokens", "12", *options])
        assert start("generate") == 0
        return capsys.readouterr().out

    assert text().startswith("red gr") and len(text()) > len("red gr\n")
    assert text("--seed", "3") == text("--seed", "3") != text("--seed", "4")
    assert text("--temperature", "0", "--seed", "3") == text("--temperature", "0", "--seed", "4")
    if tokenizer:
        transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
        theirs = transformers.AutoTokenizer.from_pretrained(path / "tokenizer")
        ours = load_tokenizer(path)
        assert theirs("red green").input_ids == ours.encode("red green").tolist()
        assert theirs.eos_token_id == ours.eos_id


def test_a_finished_run_is_skipped_and_loads_with_its_recipe(small, tmp_path, capsys):
    first = run(compose([*small, "recipe=quartet_v1"]))
    directory = only_run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in directory.path.rglob("*")}
    assert run(compose([*small, "recipe=quartet_v1"])) == first
    assert "is finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in directory.path.rglob("*")} == before

    model = qtrain.load_run(directory.path)
    weights = last_weights(directory.path)
    assert weights.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name])
    assert "mxfp4" in repr(model)


def test_micro_batches_do_not_change_the_mathematics(small, tmp_path):
    """The same batch in one forward or in four: equal up to float32 rounding (a wrong mean would be off by 4)."""
    exact = [*small, "recipe=bf16", "trainer.precision=32-true"]
    losses = [run(compose([*exact, f"trainer.micro_batch_size={size}", f"name=m{size}"])) for size in (4, 1)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    rows = [[line["loss"] for line in RunDirectory(path).lines("lr")] for path in sorted((tmp_path / "runs").iterdir())]
    assert rows[0] == pytest.approx(rows[1], rel=1e-4)


def test_a_seed_is_a_run(small):
    settings = [*small, "recipe=bf16", "debug.max_steps=3"]
    losses = [
        run(compose([*settings, f"seed={seed}", f"name={name}"])) for seed, name in ((0, "a"), (0, "b"), (1, "c"))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_a_dry_run_touches_nothing(small, tmp_path, capsys):
    assert run(compose([*small, "recipe=quartet", "dry_run=true", "run_dir='[red]'"])) is None
    assert not (tmp_path / "runs").exists()
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "FLOP" in out
        and "run directory [red]" in out
        and all(f"quartet differs: {each}" in out for each in read_recipe("quartet").deviations)
    )


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(small, tmp_path, monkeypatch):
    import qtrain.training.causal_lm as module

    exact, calls = module.next_token_loss, []

    def poisoned(model, tokens, **more):
        calls.append(model.training)
        return exact(model, tokens, **more) * (float("nan") if sum(calls) == 8 else 1.0)

    monkeypatch.setattr(module, "next_token_loss", poisoned)
    with pytest.raises(DivergedError, match=r"step 8 is not finite.*last good checkpoint is .*step-00000005"):
        run(compose([*small, "recipe=bf16"]))
    directory = only_run(tmp_path)
    assert directory.summary["status"] == "diverged"
    assert [step for step, _ in list_checkpoints(directory.checkpoints)] == [5]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(small, tmp_path, capsys):
    settings = [*small, "recipe=quartet_v1"]
    loss = run(compose(settings))
    directory = only_run(tmp_path)
    newest = list_checkpoints(directory.checkpoints)[-1][1]
    weights = tensors_in(newest)
    file = next(newest.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:5000])
    directory.write_summary({**directory.summary, "status": "interrupted"})
    assert run(compose(settings)) == loss
    shown = " ".join(capsys.readouterr().out.split())
    assert "is damaged" in shown and "resuming at step 10" in shown
    again = tensors_in(newest)
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())


def test_other_data_under_the_same_settings_is_noticed(small, tmp_path, corpus):
    folder = tmp_path / "changing"
    folder.mkdir()
    for file in list(corpus.glob("*.txt"))[:20]:
        (folder / file.name).write_text(file.read_text())
    settings = [*small, "recipe=bf16", f"data.files={folder}/*.txt"]
    run(compose(settings))
    directory = only_run(tmp_path)
    directory.write_summary({**directory.summary, "status": "interrupted"})
    (folder / "more.txt").write_text("one more document " * 50)
    with pytest.raises(UserError, match="was started on data"):
        run(compose(settings))


def test_overfit_memorises_one_batch(small, tmp_path):
    settings = [*small, "recipe=quartet", "debug=overfit", "trainer.tokens=12800", "optimizer.lr=1e-2"]
    run(compose([*settings, "callbacks.val_every_steps=100"]))
    losses = [line["loss"] for line in only_run(tmp_path).lines("lr")]
    assert losses[-1] < 0.2 < 5 < losses[0]


# ---------------------------------------------------------------------------------------------------- mistakes

MISTAKES = [
    (["optimizer.lrr=3"], r"unknown key 'optimizer\.lrr'; did you mean 'optimizer\.lr'\?"),
    (["+optimizer.lrr=3"], r"did you mean 'optimizer\.lr'\?"),
    (["++lrr=3"], r"unknown key 'lrr'; did you mean 'optimizer\.lr'\?"),
    (["+experiment=quartt"], r"unknown experiment 'quartt'; did you mean 'quartet'\?"),
    (["+experiment=bf16,quartt"], r"did you mean 'quartet'\?"),
    (["model=nanno"], r"unknown model 'nanno'; did you mean 'nano'\?"),
    (["recipe=quartett"], r"did you mean 'quartet'\?"),
    (["recipe=mxfp4"], r"unknown recipe 'mxfp4': that is a number format; recipes in it: amd_mxfp4, .*quartet,"),
    (["recipe=ternary"], r"that is a number format, int1\.585; recipes in it: bitnet_b158, trilm$"),
    (["recipe=int7"], r"that is a number format; no recipe is in it by itself; there are: amd_mxfp4"),
    (["--experiment=quartet"], r"unknown flag '--experiment': settings have no dashes: \+experiment=quartet$"),
    (["--dry-run", "seed=3"], r"unknown flag '--dry-run': settings have no dashes: dry_run=true$"),
    (["--seed", "3"], r"settings have no dashes: seed=3$"),
    (
        ["--tokens", "5"],
        r"settings have no dashes, as 'tokens=5': unknown key 'tokens'; did you mean 'trainer\.tokens'\?",
    ),
    (["-m", "--jobs", "2"], r"unknown flag '--jobs': --jobs is `qtrain sweep`'s"),
    (["model.dim.size=3"], r"model\.dim is a value"),
    (["trainer.tokens=many"], r"trainer\.tokens='many'.*integer"),
    (["trainer.tokens_per_parameter=20"], r"exactly one of trainer\.tokens.*set the other to null"),
    (["model.n_heads=3"], r"model\.dim=128 must split into n_heads=3"),
    (["data.source=text"], r"needs data\.files"),
    (["recipe=quest", "recipe.format=mxfp3"], r"mxfp3.*mxfp4"),
    (["recipe=quest", "recipe.bits=9"], r"recipe\.bits=9"),
]


@pytest.mark.parametrize(
    ("overrides", "message"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_mistakes_are_named(overrides, message):
    with pytest.raises(UserError, match=message):
        if any("," in override for override in overrides):
            checked_overrides(overrides)
        else:
            compose(overrides)


def test_the_flags_of_hydra_go_on():
    flags = ["-m", "--multirun", "--cfg", "job", "-cjob", "-c", "all", "--config-dir=mine", "-cd", "mine", "--info"]
    assert checked_overrides([*flags, "--hydra-help", "--resolve", "--package", "model"])[: len(flags)] == flags


def test_a_device_that_is_not_there(small):
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    with pytest.raises(UserError, match=r"trainer\.device=cuda.*use trainer\.device=cpu"):
        run(compose([*small, "trainer.device=cuda"]))


def test_a_width_that_the_block_does_not_divide_is_said_before_anything_is_written(small, tmp_path):
    with pytest.raises(UserError, match=r"layers\.0.*(80|96).*recipe\.skip"):
        run(compose([*small, "recipe=quartet", "model.dim=80", "model.ffn_dim=96"]))
    assert not (tmp_path / "runs").exists()


def test_a_vocabulary_too_small_for_the_tokens(small):
    with pytest.raises(UserError, match=r"model\.vocab_size=100.*257"):
        run(compose([*small, "model.vocab_size=100"]))


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "train.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_a_mistake_on_the_command_line_is_one_message_without_a_traceback():
    done = command("+experiment=quartet", "+lrr=3")
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown key 'lrr'") and "Traceback" not in done.stderr


def test_a_run_ends_with_the_commands_that_come_next(small, tmp_path):
    """Each command exists: the target of the Makefile, the script, the run."""
    settings = [*small, "debug.max_steps=2"]
    shown = command(*settings).stdout
    after = [line.strip() for line in shown.split("next:\n", 1)[1].splitlines()]
    assert after[0].startswith("make compare ") and "\ncompare: " in (ROOT / "Makefile").read_text()
    path = only_run(tmp_path).path
    assert after[1].startswith(f"python scripts/report.py {path} --out report.html ")
    assert after[2].startswith(f"python scripts/generate.py {path} --prompt 'def ' ")
    assert after[3].startswith(f"python -c \"import qtrain; print(qtrain.load_run('{path}'))\"")


def test_help_lists_what_there_is():
    shown = command("--help").stdout
    for word in (
        "+experiment=quartet",
        "recipe: ",
        "quartet_v1",
        "llama_30m",
        "stdlib",
        "trainer.tokens",
        "force=true",
    ):
        assert word in shown


def test_a_multirun_leaves_comparable_runs_and_outlives_a_failing_one(small, tmp_path):
    overrides = [*small, "debug.max_steps=4"]
    done = command("-m", *overrides, "recipe=bf16,quest,quartet", "model.ffn_dim=96,128")
    assert done.returncode == 2, done.stderr
    assert "hadamard128" in done.stderr or "128" in done.stderr, (
        "quest rotates in blocks of 128, which 64 and 96 are not"
    )
    summaries = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/summary.json")]
    assert sorted(summary["recipe"] for summary in summaries) == ["bf16", "bf16", "quartet", "quartet"]
    assert len({summary["data_hash"] for summary in summaries}) == 1
    assert done.stdout.count("next:") == 1, "of all runs, not of each"


def test_the_last_part_of_a_run_can_be_in_high_precision(small, tmp_path, monkeypatch):
    """From that step on the layers are ordinary ones, in training, in validation, and in the model that is loaded."""
    from qtrain.training import causal_lm, losses

    seen = []
    loss = losses.next_token_loss

    def watched(model, tokens, **more):
        seen.append((model.training, next(m for m in model.modules() if isinstance(m, QuantLinear)).high_precision))
        return loss(model, tokens, **more)

    for module in (causal_lm, losses):
        monkeypatch.setattr(module, "next_token_loss", watched)
    run(compose([*small, "recipe=tetrajet_v2_baseline", "recipe.high_precision_after=0.5"]))
    training = [high for is_training, high in seen if is_training]
    assert training == [False] * 6 + [True] * 6
    assert seen[-1] == (False, True)
    directory = only_run(tmp_path)
    model = qtrain.load_run(directory.path)
    assert all(layer.high_precision for layer in model.modules() if isinstance(layer, QuantLinear))
    for _, folder in list_checkpoints(directory.checkpoints):
        shutil.rmtree(folder)
    save(directory.checkpoints, 6, tensors_of(model), {"vocab_size": 257})
    model = qtrain.load_run(directory.path)
    assert not any(layer.high_precision for layer in model.modules() if isinstance(layer, QuantLinear))


@pytest.mark.parametrize("found", ["", "/no/such/compiler"])
def test_compiling_without_a_compiler_is_refused_before_anything_is_prepared(
    found: str,
) -> None:
    cpp_builder.cpp_compiler_search.cache_clear()
    said = r"trainer.compile=true: no C\+\+ compiler was found; .* or leave trainer"
    try:
        with inductor.patch("cpp.cxx", (found,)), pytest.raises(UserError, match=said):
            pick_device(compose(["trainer.compile=true", "trainer.device=cpu"]))
    finally:
        cpp_builder.cpp_compiler_search.cache_clear()
