import io
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from qtrain.config import Config
from qtrain.config.recipe import LinearRecipe
from qtrain.config.settings import configs_dir, group_names, parse
from qtrain.errors import UserError
from qtrain.metrics import flops_per_token
from qtrain.plan import describe_recipe, make_plan, resolve_precision
from qtrain.train import compose
from qtrain_kernels import precision

QUANTISED = {
    "name": "mine",
    "bits": 4,
    "fprop": {"x": {}, "w": {"format": "mxfp4"}},
    "dgrad": {"dy": {"format": "none"}, "w": {"format": "none", "source": "forward"}},
    "wgrad": {"dy": {"format": "none"}, "x": {"format": "fp8_e4m3"}},
}


def config(**changes: Any) -> Config:
    """The shipped defaults without Hydra: the first option of each group, then changes as {group: {key: value}}."""
    options = {
        "model": "nano",
        "data": "stdlib",
        "tokenizer": "bytes",
        "recipe": "bf16",
        "optimizer": "adamw",
        "scheduler": "cosine",
        "callbacks": "default",
        "logger": "none",
        "debug": "none",
    }
    tree: dict[str, Any] = {
        group: yaml.safe_load((configs_dir() / group / f"{option}.yaml").read_text())
        for group, option in options.items()
    }
    tree["trainer"] = {"tokens": 100_000, "batch_tokens": 4096, "micro_batch_size": 8, "precision": "bf16-mixed"}
    tree["name"] = "test"
    for group, values in changes.items():
        tree[group] = tree[group] | values if isinstance(values, dict) else values
    return parse(Config, tree)


def test_a_budget_in_tokens() -> None:
    plan = make_plan(config())
    assert (plan.steps, plan.tokens, plan.micro_batches, plan.batch_tokens) == (24, 98304, 2, 4096)
    assert (plan.parameters, plan.non_embedding_parameters, plan.vocab_size) == (492416, 426624, 257)
    assert plan.flops == 98304 * flops_per_token(config().model, 257)
    assert plan.warmup_steps == 2


@pytest.mark.parametrize(
    ("nominal", "ratio", "steps"),
    [(None, 10, 10 * 426624 // 4096), (1_000_000, 10, 2441), (None, 0.5, 52), (None, 0.001, 1)],
)
def test_a_budget_per_parameter_counts_nominal_ones_where_given(nominal: int | None, ratio: float, steps: int) -> None:
    budget = {"tokens": None, "tokens_per_parameter": ratio}
    assert make_plan(config(trainer=budget, model={"nominal_parameters": nominal})).steps == steps


def test_a_budget_below_one_batch_is_one_step() -> None:
    plan = make_plan(config(trainer={"tokens": 5}))
    assert (plan.steps, plan.val_every_steps, plan.checkpoint_every_steps) == (1, 1, 1)


def test_debug_caps_the_steps() -> None:
    plan = make_plan(config(debug={"max_steps": 5}))
    assert (plan.steps, plan.tokens, plan.val_every_steps) == (5, 5 * 4096, 1)
    assert make_plan(config(debug={"max_steps": 500})).steps == 24


def test_intervals_are_a_tenth_of_the_run_unless_given() -> None:
    long = {"tokens": 4096 * 257}
    plan = make_plan(config(trainer=long))
    assert (plan.val_every_steps, plan.checkpoint_every_steps, plan.log_every_steps) == (26, 26, 10)
    given = {"val_every_steps": 7, "checkpoint_every_steps": 9, "log_every_steps": 3}
    plan = make_plan(config(trainer=long, callbacks=given))
    assert (plan.val_every_steps, plan.checkpoint_every_steps, plan.log_every_steps) == (7, 9, 3)


def test_the_batch_is_split_over_devices_and_micro_batches() -> None:
    assert make_plan(config(trainer={"devices": 2})).micro_batches == 1
    assert make_plan(config(trainer={"micro_batch_size": 2, "devices": 4})).micro_batches == 2


@pytest.mark.parametrize(
    ("trainer", "devices", "message"),
    [
        (
            {"batch_tokens": 5000},
            1,
            r"batch_tokens=5,000 must be a multiple of 2,048 = trainer.micro_batch_size=8 x model.seq_len=256 x "
            r"1 device; use trainer.batch_tokens=4096 or 6144$",
        ),
        (
            {},
            4,
            r"4,096 must be a multiple of 8,192 = trainer.micro_batch_size=8 x model.seq_len=256 x 4 devices; "
            r"use trainer.micro_batch_size=4, which keeps the batch, or trainer.batch_tokens=8192$",
        ),
        ({"batch_tokens": 100}, 1, r"use trainer.batch_tokens=2048$"),
    ],
)
def test_a_batch_that_does_not_split_is_refused(trainer: dict[str, int], devices: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_plan(config(trainer=trainer | {"devices": devices}))


@pytest.mark.parametrize("model", [name for name in group_names("model") if name != "hf"])  # its own checkpoint says
def test_each_listed_model_runs_with_the_default_batch(model: str) -> None:
    settings = compose([f"model={model}"])
    assert make_plan(settings).batch_tokens == settings.trainer.batch_tokens == 2048


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        (["model=nano"], 8),
        (["model=llama_30m"], 4),
        (["trainer.batch_tokens=1280"], 5),
        (["trainer.devices=2"], 8),  # with another number of devices a run goes on: it is the same run
        (["model=llama_30m", "trainer.micro_batch_size=2"], 2),
    ],
)
def test_sequences_a_forward_follow_from_the_batch(overrides: list[str], size: int) -> None:
    assert compose(overrides).trainer.micro_batch_size == size


def test_a_batch_of_no_whole_sequence_is_told_the_nearest() -> None:
    long = ["model.seq_len=4096"]
    with pytest.raises(UserError, match=r"= trainer.micro_batch_size=1 x .*; use trainer.batch_tokens=4096$"):
        make_plan(compose(long))
    assert make_plan(compose([*long, "trainer.batch_tokens=4096"])).micro_batches == 1


def test_what_the_error_proposes_works() -> None:
    for batch, micro_batches in ((4096, 2), (6144, 3)):
        assert make_plan(config(trainer={"batch_tokens": batch})).micro_batches == micro_batches
    assert make_plan(config(trainer={"micro_batch_size": 4, "devices": 4})).micro_batches == 1


def test_where_the_vocabulary_comes_from() -> None:
    hub = {"kind": "huggingface", "path": "some/tokenizer"}
    assert make_plan(config(tokenizer={"kind": "bpe", "vocab_size": 4096})).vocab_size == 4096
    assert make_plan(config(tokenizer=hub), vocab_size=1000).vocab_size == 1000
    assert make_plan(config(tokenizer=hub, model={"vocab_size": 32000}), vocab_size=1000).vocab_size == 32000
    with pytest.raises(UserError, match=r"vocabulary of tokenizer\.path=some/tokenizer .* set model\.vocab_size"):
        make_plan(config(tokenizer=hub))


def test_the_table_names_a_data_set_of_the_hub() -> None:
    data = {"source": "huggingface", "path": "allenai/c4", "subset": "en", "val_tokens": 4096}
    console = Console(width=200, file=io.StringIO(), record=True)
    settings = config(data=data)
    console.print(make_plan(settings).table(settings))
    assert " of allenai/c4 (en), " in console.export_text()


def test_the_table_tells_the_numbers() -> None:
    settings = config(
        model={"n_heads": 4, "n_kv_heads": 2, "tie_embeddings": True}, trainer={"micro_batch_size": 2, "devices": 4}
    )
    plan = make_plan(settings)
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(plan.table(settings, device="cpu", run_directory="runs/test-1234"))
    text = console.export_text()
    for part in (
        "nano (tie_embeddings=True, n_heads=4, n_kv_heads=2): llama, 2 layers, dim 128, 4 heads on 2, ffn 384",
        f"{plan.parameters:,} ({plan.non_embedding_parameters:,} non-embedding; tied embeddings)",
        "98,304 of stdlib, 0.25 per non-embedding parameter",
        "24 of 4,096 tokens (2 x 2 sequences of 256 on 4 devices)",
        "cosine after 2 steps of warm-up, weight decay 0.1, clip 1.0",
        "run directory  runs/test-1234",
    ):
        assert part in text, text


class Machine:
    """Another machine: whether its processor has bfloat16 units, and its CUDA device; None: it has no such device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cpu: bool, cuda: bool | None = None) -> None:
        monkeypatch.setattr(precision, "BFLOAT16_UNITS_ON_CPU", cpu)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda is not None)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: cuda or including_emulation
        )


@pytest.mark.parametrize(
    ("cpu", "cuda", "trainer", "gemm", "expected"),
    [
        (True, None, {}, "auto", "bf16-mixed"),
        (False, None, {}, "auto", "32-true"),
        (False, None, {}, "fp8", "bf16-mixed"),
        (False, None, {}, "fp8_fast", "bf16-mixed"),
        (False, None, {"device": "cuda"}, "auto", "bf16-mixed"),  # planned here, trained elsewhere
        (False, True, {}, "auto", "bf16-mixed"),
        (True, False, {}, "auto", "32-true"),
        (False, True, {"device": "cpu"}, "auto", "32-true"),
        (True, False, {"device": "cpu"}, "auto", "bf16-mixed"),
        (True, None, {"precision": "32-true"}, "auto", "32-true"),
        (False, None, {"precision": "bf16-mixed"}, "auto", "bf16-mixed"),
    ],
)
def test_auto_is_the_precision_that_the_device_has_units_for(
    monkeypatch: pytest.MonkeyPatch, cpu: bool, cuda: bool | None, trainer: dict[str, str], gemm: str, expected: str
) -> None:
    Machine(monkeypatch, cpu, cuda)
    asked = config(trainer={"precision": "auto"} | trainer, gemm=gemm)
    assert resolve_precision(asked).trainer.precision == expected
    assert resolve_precision(asked) == config(trainer=trainer | {"precision": expected}, gemm=gemm), "no more changes"


@pytest.mark.parametrize(
    ("cpu", "trainer", "gemm", "words"),
    [
        (True, {"precision": "bf16-mixed"}, "auto", "bf16-mixed: the cpu device has bfloat16 units"),
        (False, {"precision": "32-true"}, "auto", "32-true: the cpu device has no bfloat16 units"),
        (True, {"precision": "32-true"}, "auto",
         "32-true: the cpu device has bfloat16 units, which bf16-mixed would use"),
        (False, {"precision": "bf16-mixed"}, "auto",
         "bf16-mixed: the cpu device has no bfloat16 units and takes bfloat16 products in float32; 32-true is faster"),
        (False, {"precision": "auto"}, "fp8",
         "bf16-mixed: the cpu device has no bfloat16 units and takes bfloat16 products in float32; "
         "gemm=fp8 needs bf16-mixed"),
    ],
)  # fmt: skip
def test_the_table_tells_the_precision_and_why(
    monkeypatch: pytest.MonkeyPatch, cpu: bool, trainer: dict[str, str], gemm: str, words: str
) -> None:
    Machine(monkeypatch, cpu)
    settings = resolve_precision(config(trainer=trainer, gemm=gemm))
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(make_plan(settings).table(settings))
    line = next(line for line in console.export_text().splitlines() if line.startswith("precision"))
    assert line.split(maxsplit=1)[1].rstrip() == words


def test_describe_recipe() -> None:
    recipe = parse(LinearRecipe, QUANTISED)
    assert describe_recipe(recipe) == (
        "mine: fprop int4 x mxfp4, dgrad high precision x forward's w, wgrad high precision x fp8_e4m3; not in lm_head"
    )
    assert describe_recipe(LinearRecipe(name="bf16")) == "bf16: every linear in the compute dtype"
    mixed = parse(LinearRecipe, {"name": "bf16", "overrides": {"*.up": "quest"}, "high_precision_after": 0.8})
    assert describe_recipe(mixed) == (
        "bf16: every linear in the compute dtype; quest in *.up; high precision after 80% of the steps"
    )
