"""Weights gathered as codes: which recipes can, that a pair of codes and their mask fit nine bits, and the bits of
training on two ranks (runs of the whole machinery are in test_ranks)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_ranks import ROOT, Ranks
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from qtrain import convert, set_step
from qtrain.config.recipe import QuantSpec, read_recipe
from qtrain.config.settings import group_names
from qtrain.errors import UserError
from qtrain.quant import check_quantized_gather, quant_linears, quantize_gathers
from qtrain.quant.functional import Numerics
from qtrain.quant.gather import _join_mask, _split_mask, joins_mask, obstacle
from qtrain.quant.quantizer import Quantizer
from qtrain.train import compose
from qtrain.training.parallel import check_strategy
from qtrain_kernels import qtensor

NUMERICS = {
    name: Numerics.build(recipe, "auto") for name in group_names("recipe") if (recipe := read_recipe(name)).operands()
}
# One recipe for each way in which a weight is quantised for the forward and gathered as codes.
EXACT = {numerics.fprop.right: name for name, numerics in NUMERICS.items() if obstacle(numerics) is None}
FEATURES = 256


def test_the_readme_says_which_recipes_gather_codes_and_why_others_do_not() -> None:
    section = (ROOT / "README.md").read_text().partition("<summary>Which recipes gather codes")[2]
    told = {}
    for names, answer in re.findall(r"^\| (`.*`) \| (.*) \|$", section.partition("</details>")[0], re.MULTILINE):
        told |= dict.fromkeys(re.findall(r"`(\w+)`", names), answer)
    assert told.keys() == NUMERICS.keys()
    for name, numerics in NUMERICS.items():
        reason = obstacle(numerics)
        assert told[name].startswith("exact") if reason is None else told[name] in reason, (name, reason)


# ------------------------------------------------------------------------------------------------- codes and their mask


@pytest.mark.parametrize("spec", [{"format": "mxfp4", "estimator": "clip"}, {"format": "mxfp4", "estimator": "trust"}])
@pytest.mark.parametrize("backend", ["reference", "compiled"])
def test_codes_and_mask_of_a_pair_in_nine_bits(spec: dict[str, Any], backend: str) -> None:
    """Of real weights with every pair of symbols: what comes out is what went in, in 4.5 bits an element."""
    quantizer = Quantizer.build(QuantSpec(**spec, scale="std"), backend)  # pyright: ignore[reportArgumentType]
    assert quantizer.plan is not None and joins_mask(quantizer.plan)
    x = torch.randn(512, 256, generator=torch.Generator().manual_seed(0)) ** 3
    layout = quantizer.layout((512, 256), storage="packed")
    parts = qtensor.quantize(x, layout, backend=backend).tensors()
    together = _join_mask(parts, quantizer.plan, backend)
    assert sum(part.nbytes for part in together) * 8 == x.numel() * (4.5 + 8 / 32)
    pairs = together[0].view(-1).int() | qtensor.bytes_of(together[-1], (512 * 128,)).int() << 8
    assert pairs.unique().numel() == 18**2 and int(pairs.max()) == 18**2 - 1
    for ours, was in zip(_split_mask(together, layout, backend), parts, strict=True):
        assert torch.equal(ours, was)


def test_what_a_mask_stops_inside_the_grid_needs_all_its_bits() -> None:
    """QuEST's threshold for fp4_e2m1 stops codes of every size, as does a clip below the largest code."""
    for spec in (
        {"format": "fp4_e2m1", "estimator": "trust"},
        {"format": "mxfp4", "estimator": "clip", "clip_scale": 0.9},
        {"format": "mxfp4", "estimator": "clip", "rounding": "stochastic"},
        {"format": "mxfp8_e4m3", "estimator": "clip"},
    ):
        plan = Quantizer.build(QuantSpec(**spec)).plan  # pyright: ignore[reportArgumentType]
        assert plan is not None and not joins_mask(plan), spec


# ---------------------------------------------------------------------------------------------------- training the same


def sharded(recipe: str) -> nn.Module:
    torch.manual_seed(0)
    linears = [nn.Linear(FEATURES, FEATURES, bias=False) for _ in range(2)]
    model = nn.Sequential(linears[0], nn.SiLU(), linears[1])
    convert(model, recipe, skip=[])
    for linear in quant_linears(model):
        fully_shard(linear)
    return fully_shard(model)  # pyright: ignore[reportReturnType]


def trained(model: nn.Module) -> list[Tensor]:
    """This rank's part of the weights after two steps on a batch of its own."""
    generator = torch.Generator().manual_seed(distributed.get_rank())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(2):
        set_step(model, step, distributed.get_rank())
        model(torch.randn(32, FEATURES, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [weight.to_local() for weight in model.parameters() if isinstance(weight, DTensor)]


def recipes_that_gather(folder: Path) -> None:
    """By recipe: the bytes of a parameter that travel before each forward and backward. Weights end as whole masters
    let them."""
    distributed.init_process_group("gloo")
    exact, sent = distributed.all_gather_single, []

    def counting(output: Tensor, input: Tensor, **rest: Any) -> Any:
        sent.append(input.nbytes)
        return exact(output, input, **rest)

    distributed.all_gather_single = counting
    found = {}
    for recipe in EXACT.values():
        whole = trained(sharded(recipe))
        model = sharded(recipe)
        quantize_gathers(model)
        sent.clear()
        codes = trained(model)
        assert len(codes) == 2 and all(map(torch.equal, codes, whole)), recipe
        assert len(sent) == 2 * 2 * 2 and len(set(sent)) == 1, recipe  # steps, layers, forward and backward
        found[recipe] = sent[0] / (FEATURES * FEATURES / 2)
    with pytest.raises(UserError, match=r"0: aten.* needs the values of the weight"), torch.no_grad():
        model[0].unshard()  # pyright: ignore
        model[0].weight.sum()  # pyright: ignore
    if distributed.get_rank() == 0:
        (folder / "bytes.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


def test_codes_on_the_wire_train_to_the_same_bits(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, recipes_that_gather, tmp_path)
    assert ranks.ended() == [0, 0], ranks.said()
    found = json.loads((tmp_path / "bytes.json").read_text())
    row = 4 / FEATURES  # a float32 for each row
    for name, wanted in {
        "quartet_v1": 0.59375, "quartet_phase": 0.59375 + row, "quest_weight_only": 0.625 + row,
        "ste": 0.5 + row, "clip": 0.5625 + row, "halo_2": 1.0, "luq_fp4_e2m1": 0.5, "quartet_ii_128": 0.5625,
        "mxfp8_fwd_nvfp4_bwd": 1.03125, "w4a16": 0.5625,
        "zeroquant_fp": 0.515625,
    }.items():  # fmt: skip
        assert found[name] == pytest.approx(wanted, abs=4 / (FEATURES * FEATURES / 2)), name


# -------------------------------------------------------------------------------------------------------------- refused


def test_layers_that_do_not_fit_the_shards_are_refused() -> None:
    def check(out_features: int, in_features: int, shards: int, recipe: Any = "ste") -> None:
        model = nn.Sequential(nn.Linear(in_features, out_features, device="meta"))
        convert(model, recipe, skip=[])
        check_quantized_gather(model, shards)

    check(64, 64, 2)
    for shape, message in (
        ((63, 64, 2), "0: its 63 rows do not divide among 2 devices; use trainer.all_gather=full"),
        ((64, 63, 2), "0: its rows of 63 elements are not a multiple of 4"),
        ((64, 64, 1), "each device holds whole weights"),
        ((64, 64, 2, "mxfp8"), "dgrad quantises the master weight again"),
        ((64, 64, 2, "mxfp4_2d"), "tiles of 32 rows"),
        ((64, 64, 2, "lsq"), "learned scale"),
        ((64, 64, 2, "trilm"), "absmean of all elements"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            check(*shape)  # pyright: ignore[reportArgumentType]
    drawn = {"fprop": {"x": {"format": "none"}, "w": {"format": "mxfp4", "rounding": "stochastic"}}}
    again = {"format": "none", "source": "forward"}
    rest = {"dgrad": {"dy": {"format": "none"}, "w": again}, "wgrad": {"dy": {"format": "none"}, "x": again}}
    with pytest.raises(UserError, match="rounded by stochastic"):
        check(64, 64, 2, {"name": "drawn", **drawn, **rest})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("trainer.strategy=ddp", "trainer.strategy=ddp; set it to fsdp2"),
        ("trainer.compile=true", "trainer.compile=True; set it to false"),
        ("callbacks.telemetry_gradients=true", "callbacks.telemetry_gradients=True; set it to false"),
        ("recipe.high_precision_after=0.8", "recipe.high_precision_after=0.8; set it to null"),
    ],
)
def test_what_reads_whole_weights_is_refused(setting: str, message: str) -> None:
    asked = ["trainer.devices=2", "trainer.strategy=fsdp2", "trainer.all_gather=quantized", "recipe=quartet"]
    check_strategy(compose(asked))
    with pytest.raises(UserError, match=re.escape(message)):
        check_strategy(compose([*asked, setting]))
