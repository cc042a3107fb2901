"""A trained run, quantised without training: read, generated from and exported as any other."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qtrain.post_training
from qtrain.errors import UserError
from qtrain.evaluate.perplexity import losses
from qtrain.evaluate.target import load
from qtrain.export import compressed_tensors, fp_quant, gguf, huggingface, peft
from qtrain.export.trained import open_run
from qtrain.models.decoder import Decoder
from qtrain.post_training import METHODS, quantize
from qtrain.quant import PackedLinear
from qtrain.quant.ptq import Split
from qtrain.runs.directory import RunDirectory
from qtrain.train import compose, main
from qtrain.training.build import load_run

RECIPE = ("recipe=quest_weight_only", "recipe.bits=3", "recipe.fprop.x.rotation=hadamard64",
          "recipe.fprop.w.rotation=hadamard64")  # fmt: skip
TOKENS = 8192


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    folder = tmp_path_factory.mktemp("run")
    text = " ".join(f"the {('cat', 'dog', 'hen')[n % 3]} number {n * n % 97} sat on mat {n % 11}." for n in range(3000))
    (folder / "a.txt").write_text(text)
    settings = (
        "recipe=bf16 trainer.batch_tokens=512 trainer.micro_batch_size=16 trainer.precision=32-true trainer.device=cpu "
        "trainer.tokens=49152 optimizer.lr=0.01 data=text data.val_tokens=2048 callbacks.progress_bar=false "
        f"data.files={folder}/a.txt data.cache_dir={folder}/cache run_dir={folder}/run tokenizer=bpe "
        "tokenizer.vocab_size=300 model.dim=64 model.ffn_dim=128 model.n_layers=2 model.n_heads=2 model.n_kv_heads=1 "
        "model.seq_len=32"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *settings.split()])
        main()
    return RunDirectory(folder / "run")


@pytest.fixture(scope="module")
def gptq(run: RunDirectory) -> Path:
    out = run.path.parent / "gptq"
    quantize(str(run.path), out, RECIPE, "gptq", TOKENS)
    return out


def stopping(layers: list[str], after: int = 9) -> Callable[[str], None]:
    """Notes what is said of each layer, and stops the quantisation after so many; the first block has 7."""

    def note(text: str) -> None:
        layers.append(text)
        if len(layers) == after:
            raise KeyboardInterrupt

    return note


def state(path: Path) -> dict[str, torch.Tensor]:
    return load_run(path).state_dict()


def test_compensation_lowers_each_error_and_the_loss(run: RunDirectory, gptq: Path, tmp_path: Path) -> None:
    said = json.loads((gptq / "quantization.json").read_text())
    assert said["val_loss_before"] == pytest.approx(run.summary["val_loss"], rel=1e-6)
    layers = said["layers"]
    assert [layer["layer"] for layer in layers[:7]] == [
        f"layers.0.{name}" for name in ("attention.q", "attention.k", "attention.v", "attention.o",
                                        "mlp.gate", "mlp.up", "mlp.down")]  # fmt: skip
    assert len(layers) == 14 and all(0 < layer["error"] < layer["nearest"] for layer in layers)
    nearest = quantize(str(run.path), tmp_path / "rtn", RECIPE, "rtn", TOKENS)
    assert all(each.error == each.nearest for each in nearest.layers)
    lost = [RunDirectory(path).summary["val_loss"] - run.summary["val_loss"] for path in (gptq, tmp_path / "rtn")]
    assert lost[0] < 0.5 * lost[1] and lost[1] == pytest.approx(nearest.val_loss - nearest.val_loss_before, abs=1e-6)


def test_the_model_is_read_as_any_run(run: RunDirectory, gptq: Path) -> None:
    model = load_run(gptq)
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert len(packed) == 14 and packed[0].codes.dtype == torch.uint8
    plain, there = state(run.path), state(gptq)
    assert torch.equal(there["embed.weight"], plain["embed.weight"])
    assert not any(name.endswith("q.weight") for name in there)
    assert sorted(path.name for path in gptq.iterdir()) == [
        "checkpoints", "config.yaml", "quantization.json", "summary.json", "tokenizer",
    ]  # fmt: skip
    assert (gptq / "tokenizer" / "tokenizer.json").read_text() == (run.tokenizer / "tokenizer.json").read_text()


def test_exports_hold_the_chosen_codes(gptq: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="the extra export is not installed")
    trained = open_run(gptq)
    layer = trained.layers["layers.1.mlp.down"]
    packed = load_run(gptq).get_submodule("layers.1.mlp.down")
    assert isinstance(packed, PackedLinear)
    codes = trained.codes(layer)
    assert torch.equal(codes.codes * codes.line_scale, packed.weight.dequantize())
    exported = compressed_tensors.export(gptq, tmp_path / "packed")
    assert exported.kinds == {"pack-quantized": 14} and exported.bits_per_weight < 6
    huggingface.export(gptq, tmp_path / "hf")
    theirs = load_file(tmp_path / "hf" / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    identity = torch.eye(layer.in_features)
    torch.testing.assert_close(packed(identity).detach().T, theirs.float(), rtol=1e-2, atol=1e-4)


def test_4_bits_with_float16_scales_go_out_as_q4_0_and_in_groups(run: RunDirectory, tmp_path: Path) -> None:
    """GPTQ's codes and scales, in 4.5 bits a weight; each file read by its own library."""
    peer = pytest.importorskip("gguf", reason="the extra export is not installed")
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    from safetensors.torch import load_file

    out = tmp_path / "w4"
    done = quantize(str(run.path), out, ["recipe=w4a16"], "gptq", TOKENS)
    assert all(layer.error < layer.nearest for layer in done.layers)
    layer = load_run(out).get_submodule("layers.1.mlp.down")
    assert isinstance(layer, PackedLinear)
    assert layer.block_scale.dtype == torch.float16 and layer.codes.dtype == torch.uint8
    wanted = layer.weight.dequantize()
    ggml = gguf.export(out, tmp_path / "gguf")
    assert (ggml.kinds, ggml.bits_per_weight, ggml.notes) == ({"Q4_0": 14}, 4.5, ())
    stored = {each.name: each for each in peer.GGUFReader(tmp_path / "gguf" / "model.gguf").tensors}
    down = stored["blk.1.ffn_down.weight"]
    assert torch.equal(torch.from_numpy(peer.dequantize(down.data, down.tensor_type)), wanted)
    assert compressed_tensors.export(out, tmp_path / "packed").kinds == {"pack-quantized": 14}
    state = load_file(tmp_path / "packed" / "model.safetensors")
    codes, scale, _ = (state[f"model.layers.1.mlp.down_proj.weight_{part}"] for part in ("packed", "scale", "shape"))
    assert scale.dtype == torch.float16
    values = helpers.unpack_from_int32(codes, 4, wanted.shape).unflatten(1, (-1, 32)) * scale.float()[:, :, None]
    assert torch.equal(values.flatten(1), wanted)


def test_codes_that_are_kept_in_floats_go_out_too(run: RunDirectory, tmp_path: Path) -> None:
    """float32 scales of blocks have no packed form here, and one in the export."""
    pytest.importorskip("compressed_tensors", reason="the extra export is not installed")
    plain = ("recipe=quest_weight_only", "recipe.format=int4_sym/32/float32", "recipe.fprop.x.rotation=null",
             "recipe.fprop.w.rotation=null", "recipe.fprop.w.scale=absmax", "recipe.fprop.w.estimator=ste",
             "recipe.fprop.x.estimator=ste")  # fmt: skip
    quantize(str(run.path), tmp_path / "out", plain, "gptq", TOKENS)
    exported = compressed_tensors.export(tmp_path / "out", tmp_path / "packed")
    assert exported.kinds == {"pack-quantized": 14}


def test_outliers_stay_in_the_run_and_lower_its_errors(run: RunDirectory, gptq: Path, tmp_path: Path) -> None:
    """They are read, evaluated and exported with it, also where the quantisation was stopped; a format of codes alone
    refuses them."""
    out, layers = tmp_path / "out", []

    split = Split(columns=2, weights=0.2)
    with pytest.raises(KeyboardInterrupt):
        quantize(str(run.path), out, RECIPE, "gptq", TOKENS, stopping(layers), split)
    with pytest.raises(UserError, match=r"it has another method"):
        quantize(str(run.path), out, RECIPE, "gptq", TOKENS)
    done = quantize(str(run.path), out, RECIPE, "gptq", TOKENS, layers.append, split)
    said, plain = (json.loads((path / "quantization.json").read_text()) for path in (out, gptq))
    assert len(layers) == 9 + 7 and said["method"]["split"] == {"columns": 2, "above": None, "weights": 0.2}
    assert all(
        each["error"] < 0.9 * before["error"] and each["bits"] > before["bits"]
        for each, before in zip(said["layers"], plain["layers"], strict=True)
    )
    tensors = {name: value for name, value in state(out).items() if "attention." in name or "mlp." in name}
    weights = sum(layer.in_features * layer.out_features for layer in open_run(out).layers.values())
    bits = 8 * sum(value.nbytes for value in tensors.values()) / weights
    assert bits == pytest.approx(done.bits_per_weight) == pytest.approx(said["bits_per_weight"])
    assert bits > plain["bits_per_weight"] + 0.3
    assert losses(load(out))[""].loss == pytest.approx(done.val_loss, rel=1e-5)
    assert done.val_loss < RunDirectory(gptq).summary["val_loss"]
    assert RunDirectory(out).read_config().name.endswith("-gptq-columns2-weights0.2-quest_weight_only")
    with pytest.raises(UserError, match="stay in 16 bits beside the codes"):
        gguf.export(out, tmp_path / "gguf")
    huggingface.export(out, tmp_path / "hf")
    layer = load_run(out).get_submodule("layers.1.mlp.down")
    theirs = load_file(tmp_path / "hf" / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    torch.testing.assert_close(layer(torch.eye(128)).detach().T, theirs.float(), rtol=1e-2, atol=1e-4)


def test_a_low_rank_part_stays_in_the_run_and_lowers_its_loss(run: RunDirectory, tmp_path: Path) -> None:
    """At 2 bits, also where the quantisation was stopped. It is read, evaluated and exported with its codes."""
    two, out, layers = [*RECIPE, "recipe.bits=2"], tmp_path / "out", []

    plain = quantize(str(run.path), tmp_path / "plain", two, "gptq", TOKENS)
    with pytest.raises(KeyboardInterrupt):
        quantize(str(run.path), out, two, "gptq", TOKENS, stopping(layers), None, 4)
    done = quantize(str(run.path), out, two, "gptq", TOKENS, layers.append, None, 4)
    assert len(layers) == 9 + 7 and done.val_loss < plain.val_loss
    tensors = {name: value for name, value in state(out).items() if "attention." in name or "mlp." in name}
    weights = sum(layer.in_features * layer.out_features for layer in open_run(out).layers.values())
    assert 8 * sum(value.nbytes for value in tensors.values()) / weights == pytest.approx(done.bits_per_weight)
    assert done.bits_per_weight > plain.bits_per_weight + 1
    assert losses(load(out))[""].loss == pytest.approx(done.val_loss, rel=1e-5)
    assert RunDirectory(out).read_config().name.endswith("-gptq-rank4-quest_weight_only")
    for module, reason in (
        (gguf, "stay in 16 bits beside the codes"),
        (peft, "export all of its weights with --to hf"),
    ):
        with pytest.raises(UserError, match=reason):
            module.export(out, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    huggingface.export(out, tmp_path / "hf")
    layer = load_run(out).get_submodule("layers.1.mlp.down")
    theirs = load_file(tmp_path / "hf" / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    torch.testing.assert_close(layer(torch.eye(128)).detach().T, theirs.float(), rtol=1e-2, atol=1e-3)
    with pytest.raises(UserError, match=r"layers.0.attention.k: .* rank of at most 32, and --low-rank is 33"):
        quantize(str(run.path), tmp_path / "refused", two, "rtn", TOKENS, low_rank=33)
    with pytest.raises(UserError, match="at least 0; found -1"):
        quantize(str(run.path), tmp_path / "refused", two, "rtn", TOKENS, low_rank=-1)
    assert not (tmp_path / "refused").exists()


def test_outliers_that_leave_nothing_or_have_no_bound_are_refused(run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"found columns=-1, above=None, weights=None"):
        quantize(str(run.path), tmp_path / "out", RECIPE, "rtn", TOKENS, split=Split(columns=-1))
    with pytest.raises(UserError, match=r"finite bounds above 0; found columns=0, above=inf"):
        quantize(str(run.path), tmp_path / "out", RECIPE, "rtn", TOKENS, split=Split(above=float("inf")))
    with pytest.raises(UserError, match=r"layers.0.attention.q: all of its 64 input columns would be outliers"):
        quantize(str(run.path), tmp_path / "out", RECIPE, "rtn", TOKENS, split=Split(above=1e-6))
    assert not (tmp_path / "out").exists()


def test_a_stopped_quantisation_goes_on_and_ends_with_the_same_bits(
    run: RunDirectory, gptq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, layers = tmp_path / "out", []

    with pytest.raises(KeyboardInterrupt):
        quantize(str(run.path), out, RECIPE, "gptq", TOKENS, stopping(layers, 10))
    assert sorted(path.name for path in (out / "quantization").iterdir()) == ["00000.safetensors", "task.json"]
    with pytest.raises(UserError, match=r"it has another method"):
        quantize(str(run.path), out, RECIPE, "rtn", TOKENS)
    with pytest.raises(UserError, match="is no run directory"):
        RunDirectory(out).read_config()
    done = quantize(str(run.path), out, RECIPE, "gptq", TOKENS, layers.append)
    assert len(layers) == 10 + 7 and len(done.layers) == 14
    for name, value in state(gptq).items():
        assert torch.equal(state(out)[name], value), name


@pytest.mark.parametrize("method", ["quarot", "smoothquant", "awq"])
def test_changes_of_the_model_are_no_changes_of_what_it_computes(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """With weights in 8 bits the loss stays; a stop in between changes no bit of it."""
    eight = [*RECIPE, "recipe.bits=8"]
    done = quantize(str(run.path), tmp_path / "out", eight, method, TOKENS)
    assert abs(done.val_loss - done.val_loss_before) < 2e-3
    there, plain = state(tmp_path / "out"), state(run.path)
    changed = ["embed.weight"] if method == "quarot" else [name for name in plain if "norm" in name]
    assert any(not torch.allclose(there[name], plain[name], rtol=1e-3) for name in changed)
    if method != "awq":
        return
    with pytest.raises(KeyboardInterrupt):
        quantize(str(run.path), tmp_path / "again", eight, method, TOKENS, stopping([]))
    quantize(str(run.path), tmp_path / "again", eight, method, TOKENS)
    again = state(tmp_path / "again")
    assert all(torch.equal(again[name], value) for name, value in there.items())


def test_a_norm_is_smoothed_also_where_a_layer_that_reads_it_stays_as_it_is(run: RunDirectory, tmp_path: Path) -> None:
    eight = [*RECIPE, "recipe.bits=8", "recipe.skip=[lm_head,q]"]
    done = quantize(str(run.path), tmp_path / "out", eight, "smoothquant", TOKENS)
    assert len(done.layers) == 12 and abs(done.val_loss - done.val_loss_before) < 2e-3
    there, plain = state(tmp_path / "out"), state(run.path)
    factors = plain["layers.1.attention_norm.weight"] / there["layers.1.attention_norm.weight"]
    assert (factors - 1).abs().max() > 0.01
    name = "layers.1.attention.q.weight"
    torch.testing.assert_close(there[name], plain[name] * factors, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["rtn_mse", "gptq", "awq"])
def test_zero_points_stay_in_the_run(run: RunDirectory, tmp_path: Path, method: str) -> None:
    """Also where it was stopped; at 3 bits their errors are below those of symmetric codes."""
    settings = ["recipe=w4a16_asym", "recipe.format=int3_asym/32/bfloat16"]

    with pytest.raises(KeyboardInterrupt):
        quantize(str(run.path), tmp_path / "out", settings, method, TOKENS, stopping([]))
    done = quantize(str(run.path), tmp_path / "out", settings, method, TOKENS)
    whole = quantize(str(run.path), tmp_path / "whole", settings, method, TOKENS)
    there, again = state(tmp_path / "out"), state(tmp_path / "whole")
    assert all(torch.equal(again[name], value) for name, value in there.items())
    zeros = there["layers.1.mlp.down.zero_point"]
    assert zeros.shape == (64, 2) and len(zeros.unique()) > 8  # four of four bits in two bytes
    assert done.bits_per_weight == 4 + (16 + 4) / 32 and done.val_loss == whole.val_loss
    symmetric = ["recipe=w4a16", "recipe.format=int3_sym/32/bfloat16"]
    other = quantize(str(run.path), tmp_path / "symmetric", symmetric, method, TOKENS)
    assert sum(each.error for each in done.layers) < 0.9 * sum(each.error for each in other.layers)
    assert losses(load(tmp_path / "out"))[""].loss == pytest.approx(done.val_loss, rel=1e-5)
    if method != "gptq":
        return
    pytest.importorskip("compressed_tensors", reason="the extra export is not installed")
    codes = open_run(tmp_path / "out").codes(open_run(tmp_path / "out").layers["layers.1.mlp.down"])
    packed = load_run(tmp_path / "out").get_submodule("layers.1.mlp.down")
    assert isinstance(packed, PackedLinear)
    assert torch.equal(codes.codes * codes.block_scale.repeat_interleave(32, 1), packed.weight.dequantize())
    assert compressed_tensors.export(tmp_path / "out", tmp_path / "packed").kinds == {"pack-quantized": 14}


FP4 = ("recipe=zeroquant_fp", "recipe.fprop.x.format=e2m1/row/float32", "recipe.fprop.w.format=e2m1/32/float16")


def test_formats_that_layers_chose_are_settings_of_the_run(run: RunDirectory, tmp_path: Path) -> None:
    """LLM-FP4, also where the quantisation was stopped. The run is read, evaluated and exported by the formats of each
    layer; a recipe without a choice is refused before anything is written."""
    out, layers = tmp_path / "out", []

    with pytest.raises(KeyboardInterrupt):
        quantize(str(run.path), out, FP4, "llm_fp4", TOKENS, stopping(layers))
    done = quantize(str(run.path), out, FP4, "llm_fp4", TOKENS, layers.append)
    assert len(layers) == 9 + 7 and all(
        text.endswith(f"{e.x} x {e.w}") for text, e in zip(layers[9:], done.layers[7:], strict=True)
    )
    found = {each.layer: (each.x, each.w) for each in done.layers}
    own = "e2m1/row/float32", "e2m1/32/float16"
    changed = {name for name, formats in found.items() if formats != own}
    config = RunDirectory(out).read_config()
    assert changed and set(config.recipe.overrides) == changed and any(name.startswith("layers.0") for name in changed)
    packed = {module.name: module for module in load_run(out).modules() if isinstance(module, PackedLinear)}
    for name, formats in found.items():
        sides = packed[name].numerics.fprop.left, packed[name].numerics.fprop.right
        assert tuple(side.spec.format for side in sides) == formats, name
    assert losses(load(out))[""].loss == pytest.approx(done.val_loss, rel=1e-5)
    assert sum(each.error for each in done.layers) < 0.9 * sum(each.nearest for each in done.layers)
    huggingface.export(out, tmp_path / "hf")
    for recipe, reason in (
        ("w4a16", "of int4_sym/32/float16 its codes are no minifloats"),
        ("quartet_ii", "four_over_six"),
    ):
        with pytest.raises(UserError, match=f"recipe {recipe} leaves no choice .* layers.0.attention.q: .*{reason}"):
            quantize(str(run.path), tmp_path / "refused", [f"recipe={recipe}"], "llm_fp4", TOKENS)
    assert not (tmp_path / "refused").exists()


def test_a_hugging_face_checkpoint_is_quantised_too(run: RunDirectory, tmp_path: Path) -> None:
    huggingface.export(run.path, tmp_path / "model")
    text = (f"data=text data.files={run.path.parent}/a.txt data.cache_dir={tmp_path}/cache data.val_tokens=1024 "
            "model.seq_len=32").split()  # fmt: skip
    mxfp4 = ("recipe=quartet", "recipe.fprop.x.format=none", "recipe.fprop.x.scale=null",
             "recipe.fprop.x.estimator=ste")  # fmt: skip
    done = quantize(str(tmp_path / "model"), tmp_path / "out", [*mxfp4, *text], "mr_gptq", 4096)
    assert abs(done.val_loss_before - run.summary["val_loss"]) < 0.05 and done.val_loss < done.val_loss_before + 0.1
    shutil.rmtree(tmp_path / "model")
    assert load_run(tmp_path / "out").get_submodule("layers.0.mlp.up").text


def test_what_cannot_be_done_is_named_and_nothing_is_left(run: RunDirectory, gptq: Path, tmp_path: Path) -> None:
    out, source = tmp_path / "out", str(run.path)
    with pytest.raises(UserError, match=r"unknown method 'gtpq'; did you mean 'gptq'"):
        quantize(source, out, RECIPE, "gtpq")
    with pytest.raises(UserError, match=r"calibration on 9,999,999 tokens .* has [\d,]+; give more text"):
        quantize(source, out, RECIPE, "gptq", 9_999_999)
    with pytest.raises(UserError, match=r"own settings hold but for recipe, data, .* found 'model.seq_len=16'"):
        quantize(source, out, [*RECIPE, "model.seq_len=16"], "rtn", TOKENS)
    with pytest.raises(UserError, match="is quantised already"):
        quantize(str(gptq), tmp_path / "again", RECIPE)
    with pytest.raises(UserError, match=r"holds a finished model; give a new --out"):
        quantize(source, gptq, RECIPE)
    with pytest.raises(UserError, match=r"recipe mxfp4_backward cannot quantise layers\.0\.attention\.q for"):
        quantize(source, tmp_path / "other", ["recipe=mxfp4_backward"], "rtn", TOKENS)
    with pytest.raises(UserError, match=r"recipe lsq learns a scale of layers\.0\.attention\.q in training"):
        quantize(source, tmp_path / "learned", ["recipe=lsq"], "rtn", TOKENS)
    with pytest.raises(UserError, match=r"recipe bf16 quantises no layer of the model; name one that does"):
        quantize(source, tmp_path / "none", ["recipe=bf16"], "rtn", TOKENS)
    with pytest.raises(UserError, match=r"config\.json"):
        quantize(str(tmp_path / "nowhere"), tmp_path / "third", RECIPE)
    assert not any((tmp_path / name).exists() for name in ("out", "again", "other", "learned", "none", "third"))
    assert {"rtn", "gptq", "mr_gptq", "quarot", "smoothquant", "awq"} < {*METHODS}
    assert qtrain.post_training.SEQUENCES * 32 <= TOKENS


@pytest.mark.parametrize("recipe, first", [("w4a16", "recipe w4a16 does not rotate weights"), ("quartet", "layers.0.")])
def test_mr_gptq_says_where_the_recipe_does_not_rotate(
    run: RunDirectory, tmp_path: Path, recipe: str, first: str
) -> None:
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        quantize(str(run.path), tmp_path / "out", [f"recipe={recipe}"], "mr_gptq", TOKENS, stopping(said, 1))
    assert said[0].startswith(first)


def test_a_head_that_is_the_embedding_is_not_quantised_apart_from_it() -> None:
    """`load_run` could not read such a run: its head has the embedding's weight."""
    small = ("model.dim=32", "model.ffn_dim=64", "model.n_layers=1", "model.n_heads=2", "model.tie_embeddings=true")
    config = compose([*small, "recipe=w4a16", "recipe.skip=[]"])
    with pytest.raises(UserError, match=r"lm_head has the weight of the embedding.*recipe\.skip=\[lm_head\]"):
        qtrain.post_training._convert(Decoder(config.model, 61), config, METHODS["gptq"])


def test_conversations_and_documents_are_counted_as_the_run_counts_them(tmp_path: Path) -> None:
    """Prompts are read and not counted, documents seen apart: the loss before is the run's own, and `evaluate`'s."""
    lines = [json.dumps({"prompt": f"what is {n} and {n}?", "completion": f" it is {2 * n}."}) for n in range(400)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    settings = (
        "recipe=bf16 trainer.batch_tokens=512 trainer.micro_batch_size=16 trainer.precision=32-true trainer.device=cpu "
        "trainer.tokens=4096 optimizer.lr=0.01 data=chat data.val_tokens=1024 data.document_mask=true "
        f"callbacks.progress_bar=false data.files={tmp_path}/a.jsonl data.cache_dir={tmp_path}/cache "
        f"run_dir={tmp_path}/run model.dim=64 model.ffn_dim=64 model.n_layers=1 model.n_heads=2 model.seq_len=32"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *settings.split()])
        main()
    own = RunDirectory(tmp_path / "run").summary["val_loss"]
    done = quantize(str(tmp_path / "run"), tmp_path / "out", RECIPE, "gptq", 2048)
    assert done.val_loss_before == pytest.approx(own, rel=1e-6)
    for run, loss in (("run", own), ("out", done.val_loss)):
        found = losses(load(tmp_path / run))[""]
        assert found.loss == pytest.approx(loss, rel=1e-5) and found.tokens < found.sequences * 32
        assert 0 < found.standard_error < 1


def test_a_run_that_tuned_is_not_quantised_without_its_adapter(run: RunDirectory, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "\ntune: null\n" in config
    (tmp_path / "run" / "config.yaml").write_text(config.replace("\ntune: null\n", "\ntune: {adapter: {rank: 2}}\n"))
    with pytest.raises(UserError, match=r"export it by `qtrain export --to hf`, which merges both"):
        quantize(str(tmp_path / "run"), tmp_path / "out", RECIPE, "rtn", TOKENS)


def test_a_run_without_codes_is_no_export_of_codes(run: RunDirectory, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="the extra export is not installed")
    for module in (compressed_tensors, fp_quant):
        with pytest.raises(UserError, match="recipe bf16 quantises nothing; export it as a Hugging Face checkpoint"):
            module.export(run.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
