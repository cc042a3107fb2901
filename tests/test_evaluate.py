"""`qtrain evaluate`: the loss of a run, a checkpoint and a Hugging Face folder, and lm-eval's scores of them."""

from __future__ import annotations

import json
import math
import random
import shutil
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qtrain.cli import start
from qtrain.data.batches import TokenBatches
from qtrain.data.prepare import prepare
from qtrain.data.tokenizer import ByteTokenizer, tokenizer_files
from qtrain.errors import UserError, is_installed
from qtrain.evaluate.perplexity import losses
from qtrain.evaluate.target import load
from qtrain.export import compressed_tensors, gguf, huggingface
from qtrain.quant.linear import quant_linears
from qtrain.runs.directory import RunDirectory
from qtrain.train import compose, main
from qtrain.training.checkpoint import list_checkpoints
from qtrain.training.observers.tasks import Tasks, by_task, check_tasks
from qtrain.training.parallel import Ranks
from qtrain.training.session import run as run_config

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

NANO = [f"model.{size}" for size in ("dim=128", "ffn_dim=128", "n_layers=1", "n_heads=2", "n_kv_heads=1", "seq_len=32")]


def train(folder: Path, recipe: str, *settings: str) -> RunDirectory:
    common = (
        f"recipe={recipe} trainer.batch_tokens=256 trainer.micro_batch_size=8 trainer.precision=32-true "
        "trainer.device=cpu trainer.tokens=4096 optimizer.lr=0.01 data=text data.val_tokens=320 "
        f"callbacks.progress_bar=false data.files={folder}/a.txt data.cache_dir={folder}/cache "
        f"run_dir={folder}/{recipe}"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *common.split(), *NANO, *settings])
        main()
    return RunDirectory(folder / recipe)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "a.txt").write_text("".join(f"the cat sat on mat {i}. " for i in range(1200)))
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> RunDirectory:
    return train(folder, "quest", "tokenizer=bpe", "tokenizer.vocab_size=280", "callbacks.checkpoint_every_steps=8")


@pytest.fixture(scope="module")
def of_bytes(folder: Path) -> RunDirectory:
    """A run whose inputs stay as they are: a reader of its codes computes what it computes."""
    return train(folder, "quest_weight_only")


def told(*arguments: object) -> Any:
    """What `qtrain evaluate ... --json` prints."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as said:
        patch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments), "--json"])
        assert start("evaluate") == 0
    return json.loads("{" + said.getvalue().partition("{")[2])  # a training in this process has left a log on stdout


def test_a_run_has_the_loss_of_its_own_validation(run: RunDirectory) -> None:
    last = [*run.lines("val_loss")][-1]
    found = told(run.path)["all"]
    assert found["loss"] == pytest.approx(last["val_loss"], rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(last["val_bits_per_byte"], rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(last["val_loss"]), rel=1e-6)
    assert (found["tokens"], found["sequences"]) == (320, 10)


def test_the_standard_error_is_that_of_the_mean_over_sequences(run: RunDirectory) -> None:
    target = load(run.path)
    loss = losses(target, batch=1)[""]
    config = run.read_config()
    data = TokenBatches(prepare(config.data, config.tokenizer), seq_len=32, seed=0, micro_batch_size=1, num_workers=0)
    means = []
    for batch in data.validation[""].batches():
        with torch.no_grad():
            scores = target.model(batch[:, :-1]).double().log_softmax(-1)
        means.append(-scores.gather(-1, batch[:, 1:, None]).mean())
    wanted = torch.stack(means)
    assert loss.loss == pytest.approx(float(wanted.mean()), rel=1e-6)
    assert loss.standard_error == pytest.approx(float(wanted.std() / math.sqrt(10)), rel=1e-5)


def test_a_checkpoint_has_the_loss_of_its_step(run: RunDirectory) -> None:
    (step, first), (last, _) = list_checkpoints(run.checkpoints)
    losses_of = {line["step"]: line["val_loss"] for line in run.lines("val_loss")}
    assert (step, last) == (8, 16)
    found = load(first)
    assert found.step == 8
    assert losses(found)[""].loss != pytest.approx(losses_of[16], rel=1e-3)
    with pytest.raises(UserError, match="no good checkpoint of step 9"):
        load(first.with_name("step-00000009"))


def test_another_text_is_read_whole_with_the_tokenizer_of_the_run(run: RunDirectory, tmp_path: Path) -> None:
    text = "the mat sat on the cat. " * 200
    (tmp_path / "b.txt").write_text(text)
    setting = [f"data.files={tmp_path}/b.txt", f"data.cache_dir={tmp_path}/cache", "data.val_tokens=1000000"]
    found = told(run.path, "data=text", *setting)["all"]
    tokens = len(load(run.path).tokenizer.encode(text)) + 1
    assert found["tokens"] == (tokens - 1) // 32 * 32
    assert found["bytes"] == round(found["tokens"] * len(text) / tokens)


def test_further_sources_and_borders_of_documents_count_as_in_the_run(folder: Path) -> None:
    """And an exported model is judged on a run's text as the run is: each token sees its own document alone."""
    for number in range(30):
        (folder / f"short{number}.txt").write_text(f"mat {number} sat. ")
    masked = RunDirectory(folder / "apart")
    train(
        folder, "bf16", f"run_dir={masked.path}", "data.document_mask=true", f"data.files={folder}/short*.txt",
        "data.val_fraction=0.5",
        "data.val_tokens=64", "+data@validation.cats=text", f"validation.cats.files={folder}/a.txt",
        "validation.cats.val_tokens=96",
    )  # fmt: skip
    found, summary = told(masked.path), masked.summary
    assert found["all"]["loss"] == pytest.approx(summary["val_loss"], rel=1e-6)
    assert found["cats"]["loss"] == pytest.approx(summary["validation"]["cats"]["loss"], rel=1e-6)
    assert (found["all"]["tokens"], found["cats"]["tokens"]) == (64, 96)

    huggingface.export(masked.path, folder / "masked")
    exported = told(folder / "masked", "--like", masked.path)
    assert exported["all"]["loss"] == pytest.approx(found["all"]["loss"], rel=1e-3)  # weights are rounded to bfloat16
    text = ["data=text", f"data.files={folder}/short*.txt", f"data.cache_dir={folder}/cache", "data.val_tokens=320"]
    apart, together = (told(folder / "masked", *text, f"data.document_mask={yes}") for yes in ("true", "false"))
    assert abs(apart["all"]["loss"] - together["all"]["loss"]) > 0.005
    assert told(masked.path, *text)["all"]["loss"] == pytest.approx(apart["all"]["loss"], rel=1e-3)
    theirs = replace(load(folder / "masked"), model=torch.nn.Identity())
    with pytest.raises(UserError, match=r"document_mask=true lets no token .* transformers computes this model"):
        losses(theirs, masked.read_config().data)


def test_an_exported_run_has_the_loss_of_the_run(of_bytes: RunDirectory, folder: Path) -> None:
    """As codes to the rounding of its reader. In bfloat16 without quantisers it is another model."""
    run = of_bytes
    ours = told(run.path)["all"]["loss"]
    compressed_tensors.export(run.path, folder / "packed")
    theirs = told(folder / "packed", "--like", run.path, "--batch", 8)["all"]
    assert theirs["loss"] == pytest.approx(ours, rel=1e-4)
    huggingface.export(run.path, folder / "hf")
    plain = told(folder / "hf", "--like", run.path)["all"]
    assert abs(plain["loss"] - ours) > 1e-3
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    target = load(folder / "hf")
    tokens = torch.arange(32)[None]
    with torch.no_grad():
        torch.testing.assert_close(target.model(tokens), model(tokens).logits, rtol=1e-4, atol=1e-4)


def as_gguf(folder: Path, recipe: str, *settings: str) -> tuple[RunDirectory, Path]:
    pytest.importorskip("gguf", reason="the extra export is not installed")
    run, out = train(folder, recipe, *settings), folder / f"{recipe}-gguf"
    gguf.export(run.path, out)
    return run, out


@pytest.fixture(scope="module")
def in_bfloat16(folder: Path) -> tuple[RunDirectory, Path]:
    return as_gguf(folder, "bf16", "tokenizer=bpe", "tokenizer.vocab_size=280")


@pytest.fixture(scope="module")
def under_scales(folder: Path) -> tuple[RunDirectory, Path]:
    """Codes under a scale of each matrix, interleaved biases, other rotary positions, tied embeddings."""
    sizes = ("dim=256", "ffn_dim=256", "tie_embeddings=true", "qkv_bias=true", "o_bias=true", "rope_theta=1000")
    scaling = "{factor:8,low_freq_factor:1,high_freq_factor:4,original_seq_len:64}"
    return as_gguf(folder, "trilm", *(f"model.{size}" for size in sizes), f"model.rope_scaling={scaling}")


@pytest.mark.parametrize("which", ["in_bfloat16", "under_scales"])
def test_a_gguf_file_has_the_loss_of_the_weights_that_went_out(which: str, request: pytest.FixtureRequest) -> None:
    """Those that nothing quantises went out in bfloat16."""
    run, out = request.getfixturevalue(which)
    target = load(run.path)
    quantised = {f"{layer.name}.weight" for layer in quant_linears(target.model)}
    with torch.no_grad():
        for name, value in target.model.named_parameters():
            if name not in quantised:
                value.copy_(value.bfloat16())
            assert value.ndim > 1 or value.unique().numel() > 1, name  # a bias of zeros would be in any order
    wanted = losses(target)[""].loss
    assert told(out, "--like", run.path)["all"]["loss"] == pytest.approx(wanted, rel=1e-6)
    names = {tensor.name for tensor in sys.modules["gguf"].GGUFReader(out / "model.gguf").tensors}
    assert ("blk.0.attn_q.scale" in names) == ("rope_freqs.weight" in names) == (which == "under_scales")


def test_a_gguf_file_has_the_logits_that_transformers_reads_of_it(in_bfloat16: tuple[RunDirectory, Path]) -> None:
    _, out = in_bfloat16
    model = transformers.AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf", dtype=torch.float32)
    tokens = torch.arange(32)[None]
    with torch.no_grad():
        torch.testing.assert_close(load(out).model(tokens), model(tokens).logits, rtol=1e-4, atol=1e-5)


def test_a_gguf_file_that_is_none_of_ours_is_told(
    in_bfloat16: tuple[RunDirectory, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gguf import GGUFWriter

    shutil.copytree(in_bfloat16[1], tmp_path / "out")
    file = tmp_path / "out" / "model.gguf"
    whole = file.read_bytes()
    for part in (0.0, 1e-4, 0.01, 0.1, 0.5, 0.99):
        file.write_bytes(whole[: int(part * len(whole))])
        with pytest.raises(UserError, match="it is cut short or damaged; copy it again, or export the run again"):
            load(tmp_path / "out")
    for architecture, key, message in (
        ("gemma", "block_count", "of architecture 'gemma'; qtrain reads llama, qwen2, qwen3.*with llama.cpp"),
        ("llama", "attention.a_window", "has the key llama.attention.a_window, .*export the run again"),
        ("llama", "block_count", "lacks the key llama.attention.head_count, .*export the run again"),
    ):
        writer = GGUFWriter(file, architecture)
        writer.add_uint32(f"{architecture}.{key}", 1)
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            write()
        writer.close()
        with pytest.raises(UserError, match=message):
            load(tmp_path / "out")
    file.write_bytes(whole.replace(b"blk.0.attn_norm.weight", b"blk.0.attn_form.weight"))
    with pytest.raises(UserError, match=r"attn_form\.weight is \(128,\), and a model .* has none; export the"):
        load(tmp_path / "out")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"a model\.gguf needs .*gguf"):
        load(tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"holds a model\.gguf and no tokenizer\.json.*export the run again"):
        load(tmp_path / "out")


def test_what_cannot_be_evaluated_is_told(run: RunDirectory, folder: Path, tmp_path: Path) -> None:
    huggingface.export(run.path, tmp_path / "hf")
    shutil.copytree(tmp_path / "hf", tmp_path / "other")
    for name, text in tokenizer_files(ByteTokenizer()).items():
        (tmp_path / "other" / name).write_text(text)
    settings = json.loads((tmp_path / "other" / "config.json").read_text())
    assert settings["vocab_size"] > 257
    target = load(tmp_path / "other")  # fewer tokens than the vocabulary is what many models have
    with pytest.raises(UserError, match="is of no run, so name the text"):
        losses(target)
    with pytest.raises(UserError, match=r"reads at most 32 tokens at once; 64 were asked for"):
        losses(load(run.path), context=64)
    (tmp_path / "empty.txt").write_text("")
    data = compose(["data=text", f"data.files={tmp_path}/empty.txt", f"data.cache_dir={tmp_path}/cache"]).data
    with pytest.raises(UserError, match=r"empty\.txt"):
        losses(load(run.path), data)
    with pytest.raises(UserError, match="holds neither a run"):
        load(tmp_path)
    (tmp_path / "hf" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no safetensors files"):
        load(tmp_path / "hf")


def test_a_tokenizer_beyond_the_vocabulary_is_told(run: RunDirectory, of_bytes: RunDirectory, tmp_path: Path) -> None:
    huggingface.export(of_bytes.path, tmp_path / "bytes")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(run.tokenizer / name, tmp_path / "bytes" / name)
    with pytest.raises(UserError, match=r"the tokenizer of .* has 280 tokens, and its model a vocabulary of 257"):
        load(tmp_path / "bytes")


def test_mistakes_of_the_command_are_told(run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for arguments, message in (
        (["trainer.tokens=5"], "evaluate takes settings of data alone"),
        (["--tasks", "missing.yaml"], "no such task file: missing.yaml"),
        (["--context", "0"], "no whole number above 0"),
    ):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", str(run.path), *arguments])
        try:
            assert start("evaluate") == 2
        except SystemExit as exit_:
            assert exit_.code == 2
        assert message in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------- lm-evaluation-harness

CHOICES = [
    ("the cat sat on", [" mat", " the", " cat"], 0),
    ("mat 3", [". the", ".the ", " on"], 0),
    ("on", [" m", "z"], 1),
]


@pytest.fixture(scope="module")
def tasks(folder: Path) -> list[Path]:
    rows = [{"question": question, "choices": choices, "gold": gold} for question, choices, gold in CHOICES * 4]
    (folder / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pages = [{"page": f"the cat sat on mat {i}. " * (2 + i)} for i in range(5)]
    (folder / "pages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pages))
    common = "dataset_path: json\ntest_split: test\n"
    (folder / "choice.yaml").write_text(
        f"task: choice\n{common}dataset_kwargs:\n  data_files:\n    test: {folder}/choice.jsonl\n"
        "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{gold}}'\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    )
    (folder / "pages.yaml").write_text(
        f"task: pages\n{common}dataset_kwargs:\n  data_files:\n    test: {folder}/pages.jsonl\n"
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{page}}'\nmetric_list:\n"
        "  - metric: word_perplexity\n  - metric: byte_perplexity\n  - metric: bits_per_byte\n"
    )
    (folder / "go_on.yaml").write_text(
        f"task: go_on\n{common}dataset_kwargs:\n  data_files:\n    test: {folder}/choice.jsonl\n"
        "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: ' mat'\n"
        "generation_kwargs:\n  until: ['.']\n  max_gen_toks: 6\nmetric_list:\n  - metric: exact_match\n"
    )
    return [folder / f"{name}.yaml" for name in ("choice", "pages", "go_on")]


def test_lm_eval_scores_an_imported_model_as_transformers_model(
    run: RunDirectory, tasks: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_installed("lm_eval"):
        pytest.skip("the extra eval is not installed")
    from lm_eval.models.huggingface import HFLM

    from qtrain.integrations.lm_eval import QtrainLM, run_tasks

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    huggingface.export(run.path, tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=32)
    ours = QtrainLM(load(tmp_path / "hf"), batch=4)
    wanted, found = run_tasks(theirs, tasks), run_tasks(ours, tasks)
    assert found.keys() == wanted.keys() == {"choice", "pages", "go_on"}
    for task, values in wanted.items():
        assert len(values) >= 2
        for metric, value in values.items():
            if metric.startswith(("acc", "exact_match")):
                assert found[task][metric] == value, (task, metric)
            else:
                assert found[task][metric] == pytest.approx(value, rel=1e-6, nan_ok=True), (task, metric)
    assert 0 < wanted["choice"]["acc"] < 1
    assert told(run.path, "--tasks", tasks[0])["choice"]["acc"] >= 0


def test_lm_eval_draws_each_repeat_anew_and_is_told_what_is_not_drawn_by(run: RunDirectory) -> None:
    if not is_installed("lm_eval"):
        pytest.skip("the extra eval is not installed")
    from lm_eval.api.instance import Instance

    from qtrain.integrations.lm_eval import QtrainLM

    model = QtrainLM(load(run.path))

    def continued(*contexts: str, **options: Any) -> list[str]:
        asked = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0} | options
        return model.generate_until([Instance("generate_until", {}, (each, asked), 0) for each in contexts])

    three = continued("the cat", "mat 3", "the cat")
    assert three[0] != three[2] and three == continued("the cat", "mat 3", "the cat")
    greedy = continued("the cat", temperature=0.0, do_sample=False, top_p=0.9)
    assert continued("the cat", top_k=1) == continued("the cat", "the cat", top_k=1, top_p=1.0)[1:] == greedy
    with pytest.raises(UserError, match=r"have top_p=0\.9, and a target here knows until, .* remove it from the task"):
        continued("the cat", top_p=0.9)
    with pytest.raises(UserError, match=r"have repetition_penalty=1\.2"):
        continued("the cat", temperature=0.0, repetition_penalty=1.2)


def global_state(tasks: Tasks) -> tuple[Any, ...]:
    drawn = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    return *drawn, [module.training for module in tasks.target.model.modules()]


def test_a_run_takes_the_scores_of_evaluate_and_trains_the_same(
    folder: Path, run: RunDirectory, tasks: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LSQ has learned scales, and its inputs one scale for a batch."""
    if not is_installed("lm_eval"):
        pytest.skip("the extra eval is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tokenizer = ("tokenizer=bpe", "tokenizer.vocab_size=280")
    asked = (f"callbacks.tasks=[{tasks[0]},{tasks[2]}]", "callbacks.tasks_every_steps=6", "callbacks.tasks_limit=5")
    around = []

    def watched(tasks: Tasks, scores: Any = Tasks._scores) -> Any:
        around.append(global_state(tasks))
        found = scores(tasks)
        around.append(global_state(tasks))
        return found

    monkeypatch.setattr(Tasks, "_scores", watched)
    train(folder, "lsq", *tokenizer, *asked, f"run_dir={tmp_path}/scored")
    scored = RunDirectory(tmp_path / "scored")
    assert len(around) == 6 and around[::2] == around[1::2]
    plain = train(folder, "lsq", *tokenizer)
    lines = [*scored.lines("tasks_seconds")]
    assert [line["step"] for line in lines] == [6, 12, 16]
    wanted = told(scored.path, "--tasks", tasks[0], tasks[2], "--limit", 5)
    assert by_task(lines[-1]) == wanted == json.loads((scored.path / "summary.json").read_text())["tasks"]
    assert wanted.keys() == {"choice", "go_on"}
    trained = [
        {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}
        for folder in (list_checkpoints(each.checkpoints)[-1][1] for each in (scored, plain))
    ]
    assert len(trained[0]) > 20 and trained[0].keys() == trained[1].keys()
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())
    assert [line["loss"] for line in scored.lines("loss")] == [line["loss"] for line in plain.lines("loss")]


def test_a_finished_run_says_how_its_scores_are_taken(
    folder: Path, run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    """callbacks is no part of a run's identity, so it is not trained again."""
    settings = ("tokenizer=bpe", "tokenizer.vocab_size=280", "callbacks.checkpoint_every_steps=8")
    train(folder, "quest", *settings, "callbacks.tasks=[mine.yaml]")
    assert f"`qtrain evaluate {run.path} --tasks mine.yaml` takes them" in capsys.readouterr().out


@pytest.mark.parametrize("settings, message", [
    (("callbacks.tasks=[missing.yaml]",), "callbacks.tasks: no such task file: missing.yaml"),
    (("callbacks.tasks=[pyproject.toml]",), "callbacks.tasks needs the package lm_eval"),
    (("callbacks.tasks=[pyproject.toml]", "trainer.strategy=fsdp2"), "set trainer.strategy=ddp"),
])  # fmt: skip
def test_tasks_that_a_run_cannot_take_are_told(
    settings: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.setattr("qtrain.errors.is_installed", lambda name: False)
    with pytest.raises(UserError, match=message):
        check_tasks(compose([*settings]), Ranks())
    with pytest.raises(UserError, match=message):
        run_config(compose([*settings, "dry_run=true"]))


@pytest.mark.parametrize("setting", ["tasks_every_steps=6", "tasks_limit=5"])
def test_settings_of_tasks_need_tasks(setting: str) -> None:
    with pytest.raises(UserError, match=rf"callbacks\.{setting} is about .* set callbacks\.tasks=\[FILE\.yaml\], or"):
        compose([f"callbacks.{setting}"])


NO_DATA = "dataset_path: none/such\n"
DATA = "dataset_path: json\ntest_split: test\ndataset_kwargs: {data_files: {test: FOLDER/a.jsonl}}\ndoc_to_text: a\n"


@pytest.mark.parametrize("more, reason", [
    (NO_DATA, ""),
    ("metric_list: [\n", r"ParserError: .* line \d"),
    (DATA + "doc_to_choice: [a, b]\ndoc_to_target: '{{nothing.there}}'\n", "UndefinedError: 'nothing' is undefined"),
])  # fmt: skip
def test_a_task_file_that_lm_eval_does_not_read_is_told(
    more: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_installed("lm_eval"):
        pytest.skip("the extra eval is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.jsonl").write_text('{"question": "the cat"}\n')
    text = "task: a\noutput_type: multiple_choice\n" + more
    (tmp_path / "a.yaml").write_text(text.replace("FOLDER", str(tmp_path)))
    with pytest.raises(UserError, match=rf"lm-eval cannot run .*a\.yaml: .*{reason}"):
        check_tasks(compose([f"callbacks.tasks=[{tmp_path}/a.yaml]"]), Ranks())
