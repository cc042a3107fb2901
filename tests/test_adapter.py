"""LoRA and QLoRA: what trains, what is stored, and that other programs read the same model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import qtrain
from qtrain.config import Config, config_hash, differences, parse_saved
from qtrain.errors import UserError
from qtrain.models.decoder import Decoder
from qtrain.quant import QuantLinear
from qtrain.quant.adapter import Adapter, adapters, attach
from qtrain.quant.doubled import DYNAMIC_MAP, DoubledLinear, dequantize_scales, quantize_scales
from qtrain.quant.packed import pack
from qtrain.train import compose
from qtrain.training import tune
from qtrain.training.build import build_model, check_model
from qtrain_kernels.formats import get_format

# bitsandbytes 0.50.2 on CPU of torch.linspace(-2, 2, 64) ** 3: functional.quantize_4bit(..., quant_type="nf4"), two
# codes a byte, the first in the high bits.
BNB_CODES = "001112223344455566666777777777777777777777788888999aabbccddeeeff"
SMALL = [
    "model.dim=128", "model.ffn_dim=128", "model.n_layers=2", "model.n_heads=2", "model.seq_len=16",
    "trainer.precision=32-true", "model.init_hash=abc", "model.name=base",
]  # fmt: skip


def config_of(*more: str) -> Config:
    return compose([*SMALL, *more])


def tuned(*more: str) -> tuple[Decoder, Config]:
    """A model whose adapters have values."""
    config = config_of(*more)
    model = build_model(config, 61)
    generator = torch.Generator().manual_seed(3)
    for adapter in adapters(model).values():
        adapter.B.data = torch.randn(adapter.B.shape, generator=generator) * 0.05
    return model.eval(), config


def tokens() -> torch.Tensor:
    return torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(0))


def test_output_and_gradients_are_those_of_the_formula():
    layer = nn.Linear(24, 40)
    model = nn.ModuleDict({"up": layer, "lm_head": nn.Linear(40, 4)})
    assert attach(model, (), rank=4, alpha=6.0) == ["up"]
    adapter = adapters(model)["up"]
    nn.init.normal_(adapter.B)
    x = torch.randn(7, 24, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = layer(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    y.backward(dy)
    a, b, w, x64, dy64 = (each.detach().double() for each in (adapter.A, adapter.B, layer.weight, x, dy))
    rounding = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(y.double(), x64 @ w.T + layer.bias.double() + 1.5 * x64 @ a.T @ b.T, **rounding)
    torch.testing.assert_close(adapter.A.grad.double(), 1.5 * b.T @ dy64.T @ x64, **rounding)
    torch.testing.assert_close(adapter.B.grad.double(), 1.5 * dy64.T @ x64 @ a.T, **rounding)
    torch.testing.assert_close(x.grad.double(), dy64 @ (w + 1.5 * b @ a), **rounding)
    assert layer.weight.grad is None and layer.bias.grad is None
    with pytest.raises(UserError, match="up has an adapter already"):
        attach(model, (), rank=4, alpha=6.0)
    assert [name for name, each in model.named_parameters() if each.requires_grad] == ["up.adapter.A", "up.adapter.B"]


def test_a_quantised_base_makes_no_weight_gradient(monkeypatch):
    from qtrain.quant import functional

    made = []
    monkeypatch.setattr(functional, "wgrad", lambda *_: made.append(1))
    model, _ = tuned("recipe=quartet", "+tune=lora")
    qtrain.set_step(model, 0)
    model(tokens()).square().mean().backward()
    assert not made and all((adapter.B.grad != 0).any() for adapter in adapters(model).values())


def test_what_dropout_drops_is_a_function_of_step_and_micro_batch():
    adapter = Adapter(512, 8, 4, 4.0, 0.25, "up", seed=0)
    nn.init.normal_(adapter.B)
    x = torch.ones(64, 512)
    with pytest.raises(UserError, match="no step is set"):
        adapter(x)
    found = {}
    for step, micro_batch in ((0, 0), (0, 1), (1, 0), (0, 0)):
        adapter.set_step(step, micro_batch)
        dropped = adapter._dropped(x)
        assert found.setdefault((step, micro_batch), dropped).equal(dropped)
    assert not any(found[0, 0].equal(found[other]) for other in ((0, 1), (1, 0)))
    assert set(found[0, 0].unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs((found[0, 0] == 0).float().mean() - 0.25) < 4 * (0.25 * 0.75 / 64 / 512) ** 0.5
    assert adapter.eval()._dropped(x) is x


@pytest.mark.parametrize("more", [
    ("recipe=bf16", "+tune=lora"),
    ("recipe=quest_weight_only", "+tune=lora"),
    ("recipe=nf4", "+tune=qlora", "tune.adapter.rank=8"),
])  # fmt: skip
def test_a_merged_model_is_the_tuned_one(more):
    model, config = tuned(*more)
    plain = Decoder(config.model, 61).eval()
    plain.load_state_dict(tune.merged(model))
    torch.testing.assert_close(plain(tokens()), model(tokens()), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21.2 reads it
def test_peft_reads_the_adapter_to_the_same_logits(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    transformers = pytest.importorskip("transformers")
    from qtrain.models import hf

    model, config = tuned("recipe=bf16", "+tune=lora", "tune.adapter.layers=[q,layers.1.mlp.*]")
    base = build_model(config_of("recipe=bf16"), 61)
    hf.save(tmp_path, hf.config_of(config.model, 61, 0), {n: p.shape for n, p in base.named_parameters()},
            lambda name: base.state_dict()[name])  # fmt: skip
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    state = {hf.their_name(name): value for name, value in base.state_dict().items() if hf.their_name(name)}
    theirs.load_state_dict(state, strict=False)
    tune.save_adapter(model, config, tmp_path)
    with torch.no_grad():
        read = peft.PeftModel.from_pretrained(theirs, tmp_path)
        torch.testing.assert_close(read(tokens()).logits, model(tokens()), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(read.merge_and_unload()(tokens()).logits, model(tokens()), rtol=1e-4, atol=1e-5)


def test_an_adapter_is_read_back_and_one_of_another_base_is_refused(tmp_path):
    model, config = tuned("recipe=bf16", "+tune=lora")
    tune.save_adapter(model, config, tmp_path)
    again = build_model(config_of("recipe=bf16", "+tune=lora", "seed=1"), 61)
    again.load_state_dict({**again.state_dict(), **{n: v for n, v in model.state_dict().items() if "adapter" not in n}})
    tune.load_adapter(again, config, tmp_path)
    assert torch.equal(again.eval()(tokens()), model(tokens()))
    for settings, message in (
        (("model.init_hash=abd",), "is an adapter of another base: it was trained beside None"),
        (("tune.adapter.rank=8",), r"has r=16; set tune\.adapter\.rank to it \(found 8\)"),
        (("tune.adapter.layers=[q]",), "it adapts other layers"),
        (("model.ffn_dim=256",), "is an adapter of another base: .* is"),
    ):
        other = config_of("recipe=bf16", "+tune=lora", *settings)
        with pytest.raises(UserError, match=message):
            tune.load_adapter(build_model(other, 61), other, tmp_path)
    (tmp_path / tune.PEFT_CONFIG).write_text(json.dumps({"peft_type": "LOHA"}))
    with pytest.raises(UserError, match="is no plain LoRA adapter"):
        tune.load_adapter(again, config, tmp_path)
    with pytest.raises(UserError, match="holds no adapter_config"):
        tune.load_adapter(again, config, tmp_path / "nothing")


def test_another_adapter_in_the_same_folder_is_another_run(tmp_path):
    found = []
    for seed in (0, 1):
        settings = "recipe=bf16", "+tune=lora", f"seed={seed}"
        tune.save_adapter(*tuned(*settings), tmp_path)
        found.append(config_of("recipe=bf16", "+tune=lora", f"tune.adapter.init_from={tmp_path}"))
    assert [line.split(" was ")[0] for line in differences(*found)] == ["tune.adapter.init_hash"]
    assert config_hash(found[0]) != config_hash(found[1])
    assert parse_saved(found[0].model_dump(mode="json")) == found[0], "a run keeps what it started from"


@pytest.mark.parametrize("more, message", [
    (("recipe=bf16", "+tune=qlora"), "recipe bf16 quantises nothing"),
    (("recipe=quest", "+tune=qlora"), "double quantisation stores float32 scales"),
    (("recipe=bf16", "+tune=lora", "tune.adapter.layers=[gat]"), "there are: q, k, v, o, gate"),
    (("recipe=bf16", "+tune=lora", "trainer.strategy=fsdp2"), "tune does not shard"),
    (("recipe=bf16", "+tune=lora", "tune.adapter.layers=[lm_head]", "model.tie_embeddings=true"),
     "lm_head has the weight of the embedding, into which its adapter could not be merged"),
    (("recipe=bf16", "+tune=lora", "tune.adapter.layers=[q,lm_head]", "trainer.chunked_loss=true"),
     "without the adapter that tune.adapter.layers puts beside lm_head"),
])  # fmt: skip
def test_what_cannot_be_tuned_is_refused_before_any_text_is_read(more, message):
    with pytest.raises(UserError, match=message):
        check_model(config_of(*more))


# ------------------------------------------------------------------------------------------------------------------ nf4


def test_nf4_has_the_codes_of_bitsandbytes():
    x = torch.linspace(-2, 2, 64) ** 3
    table = get_format("nf4").element.levels()
    codes = qtrain.fake_quantize(x, "nf4") / x.abs().max()
    assert "".join(f"{np.argmin([abs(code - level) for level in table]):x}" for code in codes.tolist()) == BNB_CODES


def test_nf4_takes_the_nearest_of_its_codes_and_of_two_the_lower():
    table = torch.tensor(get_format("nf4").element.levels())
    middles = (table[1:] + table[:-1]) / 2
    inside = torch.cat((table, middles, torch.rand(33, generator=torch.Generator().manual_seed(0)) * 2 - 1))
    found = qtrain.fake_quantize(inside.view(1, 64), "nf4").flatten()
    nearest = table[(inside[:, None].double() - table.double()).abs().argmin(1)]
    assert torch.equal(found[:16], table) and torch.equal(found[16:31], table[:-1])
    assert torch.equal(found[31:], nearest[31:])
    assert torch.equal(qtrain.fake_quantize(torch.zeros(1, 64), "nf4"), torch.zeros(1, 64))
    assert qtrain.fake_quantize(torch.full((1, 64), torch.nan), "nf4").isnan().all()


@pytest.mark.parametrize("backend", ["compiled", "triton"])
def test_other_backends_refuse_a_table_by_name(backend, monkeypatch):
    from qtrain_kernels import cpu, gpu
    from qtrain_kernels.plans import Plan

    plan = Plan(get_format("nf4").element, "float32", 64, "absmax")
    with pytest.raises(ValueError, match=f"backend '{backend}' knows no codes of a table"):
        {"compiled": cpu, "triton": gpu}[backend].KNOWS.check(plan)
    with pytest.raises(UserError, match="nearest"):
        qtrain.fake_quantize(torch.ones(1, 64), "nf4", rounding="stochastic")


def test_the_map_of_double_quantisation():
    known = np.array(DYNAMIC_MAP)
    assert len(known) == 256 and known[-1] == 1 and known[0] == pytest.approx(-0.99296875) and 0 in known
    scales = torch.rand(700, generator=torch.Generator().manual_seed(0)) + 0.5
    codes, largest, mean = quantize_scales(scales)
    assert mean == scales.mean() and largest.shape == (3,)
    for start in (0, 256, 512):
        block = (scales[start : start + 256] - mean).double().numpy()
        assert largest[start // 256] == np.abs(block).max()
        nearest = np.abs(block[:, None] / np.abs(block).max() - known).argmin(1)
        assert codes[start : start + 256].tolist() == nearest.tolist()
    back = dequantize_scales(codes, largest, mean)
    assert (back - scales).abs().max() < 0.006


@pytest.mark.parametrize("doubled", [False, True])
def test_a_packed_base_multiplies_the_dequantised_weight(doubled):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 128))
    nn.init.normal_(model[0].weight, std=0.02, generator=generator)
    master = model[0].weight.detach().clone()
    qtrain.convert(model, "nf4")
    assert isinstance(model[0], QuantLinear)
    x = torch.randn(5, 512, generator=generator, requires_grad=True)
    before = model(x)
    pack(model, DoubledLinear if doubled else None)
    blocks = master.view(-1, 64)
    scale = blocks.abs().amax(1)
    codes = qtrain.fake_quantize(master, "nf4").view(-1, 64).double() / scale[:, None].double()
    kept = dequantize_scales(*quantize_scales(scale)) if doubled else scale
    weight = (codes * kept[:, None].double()).view(128, 512)
    y = model(x)
    expected = x.double() @ weight.T + model[0].bias.double()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    if not doubled:
        assert torch.equal(y, before)
    y.sum().backward()
    torch.testing.assert_close(x.grad.double(), weight.sum(0).expand(5, -1), rtol=1e-5, atol=1e-5)
    bits = 8 * sum(buffer.nbytes for buffer in model[0].buffers()) / weight.numel()
    assert bits == pytest.approx(4 + 8 / 64 + 32 / 64 / 256 + 32 / weight.numel() if doubled else 4.5, abs=1e-9)
    assert model[0].bits() == pytest.approx(bits)
