"""Exported codes are the trained codes: every shipped recipe through compressed-tensors and GGUF, read by their own
libraries, and through FP-Quant, whose reader needs a GPU, by what its format says."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import qtrain
from qtrain.config.recipe import read_recipe
from qtrain.errors import UserError
from qtrain.evaluate import target
from qtrain.models import hf
from qtrain.models.families.llama import Llama
from qtrain.quant import QuantLinear, recipes
from qtrain.quant.functional import Call, Numerics
from qtrain.quant.linear import quant_linears
from qtrain.quant.quantizer import rotate, unrotate
from qtrain.runs.directory import RunDirectory
from qtrain.train import main
from qtrain.training.build import load_run, load_tokenizer
from qtrain_kernels.qtensor import QTensor

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
compressed_tensors = pytest.importorskip("compressed_tensors", reason="the extra export is not installed")
gguf = pytest.importorskip("gguf", reason="the extra export is not installed")

from compressed_tensors.compressors import BaseCompressor  # noqa: E402
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32  # noqa: E402
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # noqa: E402
from compressed_tensors.quantization.lifecycle.forward import fake_quantize  # noqa: E402
from compressed_tensors.quantization.utils.helpers import compute_dynamic_scales_and_zp  # noqa: E402
from compressed_tensors.transform import TransformConfig, apply_transform_config  # noqa: E402
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor, load_gguf_checkpoint  # noqa: E402

from qtrain.export import compressed_tensors as packed  # noqa: E402
from qtrain.export import fp_quant, table  # noqa: E402
from qtrain.export import gguf as ggml  # noqa: E402
from qtrain.export.trained import codes_of  # noqa: E402

N, K = 48, 256


def layer_of(recipe: Any) -> QuantLinear:
    """A layer with outliers, zeros and a row of zeros. 48 rows fill no tile of 32 or 128."""
    model = nn.Sequential(nn.Linear(K, N, bias=False))
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[:, ::37] *= 20
    weight[3], weight[:, 5] = 0.0, 0.0
    model[0].weight.data = weight
    qtrain.convert(model, recipe)
    layer = model[0]
    assert isinstance(layer, QuantLinear)
    if layer.weight_scale is not None:
        layer.weight_scale.data.fill_(0.0123)
    return layer


def trained(layer: QuantLinear) -> QTensor:
    """The operand as the layer's product takes it, in rotated space."""
    call = Call(layer.numerics, layer.keys, torch.float32, None)
    scale = None if layer.weight_scale is None else layer.weight_scale.detach()
    return call.weight(layer.weight.detach(), scale, [])


def held(find: Callable[[Numerics, int], Any]) -> list[str]:
    """The shipped recipes that a format holds."""
    found = []
    for name in recipes():
        recipe = read_recipe(name)
        try:
            if recipe.fprop is not None:
                find(Numerics.build(recipe, "reference"), K)
                found.append(name)
        except ValueError:
            continue
    return found


MORE = [
    {"name": "mxfp6", "format": "mxfp6_e2m3"},
    {"name": "quest", "bits": 2},
    {"name": "halo_1", "format": "fp8_e4m3"},
    {"name": "w4a16", "format": "int4_sym/128/bfloat16"},
    {"name": "w4a16", "format": "int8_sym/32/float16"},
    {"name": "w4a16", "format": "int4/32/float16"},  # halves: its scales are float32 there
    {"name": "w4a16_asym", "format": "int3_asym/32/float16"},
    {"name": "w4a16_asym", "format": "int8_asym/64/bfloat16"},
]


@pytest.mark.parametrize("recipe", [*held(packed.scheme_of), *MORE], ids=str)
def test_compressed_tensors_gives_the_trained_values(recipe: Any) -> None:
    layer = layer_of(recipe)
    scheme = packed.scheme_of(layer.numerics, K)
    state = packed.pack(codes_of(layer, layer.weight.detach(), layer.weight_scale), scheme)
    about = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**scheme.weights))
    read = BaseCompressor.get_value_from_registry(scheme.format).decompress(dict(state), about)["weight"]
    operand = trained(layer)
    wanted = operand.dequantize()
    assert len(wanted.unique()) > 2
    if scheme.format != "nvfp4-pack-quantized":
        # The package multiplies in the dtype of the scales, and rounds the product to theirs.
        assert torch.equal(read, wanted.to(read.dtype))
        if read.dtype != torch.float32 and scheme.format == "pack-quantized":
            exactly = {**state, "weight_scale": state["weight_scale"].float()}
            values = BaseCompressor.get_value_from_registry(scheme.format).decompress(exactly, about)["weight"]
            assert torch.equal(values, wanted)
        return
    # The package divides by a reciprocal of the tensor's scale and rounds to bfloat16; codes and block scales are ours.
    scale, reciprocal = operand.tensor_scale, state["weight_global_scale"]
    assert scale is not None
    no_tensor_scale = {**state, "weight_global_scale": torch.ones(1)}
    values = BaseCompressor.get_value_from_registry(scheme.format).decompress(no_tensor_scale, about)["weight"]
    assert torch.equal(values.float(), operand.codes.float())
    assert abs(1.0 / reciprocal.item() / scale.item() - 1.0) <= 2.0**-23
    torch.testing.assert_close(read.float(), wanted, rtol=2.0**-8, atol=0.0)


@pytest.mark.parametrize(("format", "dtype"), [
    ("int4_sym/32/float16", torch.float16), ("int8_sym/128/bfloat16", torch.bfloat16),
    ("int4_sym/32/float32", torch.float32), ("int4/32/float16", torch.float32),  # in halves of a code
])  # fmt: skip
def test_scales_of_groups_keep_their_dtype(format: str, dtype: torch.dtype) -> None:
    """Codes and scales by numpy, of the master weight."""
    layer = layer_of({"name": "w4a16", "format": format})
    state = packed.pack(codes_of(layer, layer.weight.detach()), packed.scheme_of(layer.numerics, K))
    assert state["weight_scale"].dtype == dtype
    if dtype == torch.float32:
        return
    size, largest = (32, 7) if "int4" in format else (128, 127)
    blocks = layer.weight.detach().view(N, -1, size).double().numpy()
    scale = torch.from_numpy(np.abs(blocks).max(2) / largest).float().to(dtype)
    codes = np.rint(blocks / np.where(scale == 0, 1.0, scale.double())[:, :, None])
    assert torch.equal(state["weight_scale"], scale)
    unpacked = unpack_from_int32(state["weight_packed"], 4 if largest == 7 else 8, torch.Size((N, K)))
    assert np.array_equal(unpacked.numpy(), np.clip(codes, -largest, largest).reshape(N, K))


@pytest.mark.parametrize("format", ["int4_asym/128/bfloat16", "int2_asym/32/float16"])
def test_zero_points_go_out_as_the_library_has_them(format: str) -> None:
    """Levels, scales and zero points by numpy, of the master weight; the library's levels are 2^(bits - 1) lower."""
    layer = layer_of({"name": "w4a16_asym", "format": format})
    layer.weight.data += 0.01
    scheme = packed.scheme_of(layer.numerics, K)
    state = packed.pack(codes_of(layer, layer.weight.detach()), scheme)
    bits, size, kind = (4, 128, torch.bfloat16) if "int4" in format else (2, 32, torch.float16)
    wanted = {"num_bits": bits, "symmetric": False, "strategy": "group", "group_size": size, "type": "int"}
    assert scheme.weights == wanted
    blocks = layer.weight.detach().view(N, -1, size).double().numpy()
    low, high = np.minimum(blocks.min(2), 0), np.maximum(blocks.max(2), 0)
    scale = torch.from_numpy((high - low) / (2**bits - 1)).float().to(kind)
    step = np.where(scale == 0, 1.0, scale.double())
    zero = np.clip(np.rint(-low / step), 0, 2**bits - 1)
    levels = np.clip(np.rint(blocks / step[:, :, None] + zero[:, :, None]), 0, 2**bits - 1)
    assert torch.equal(state["weight_scale"], scale)
    read = unpack_from_int32(state["weight_zero_point"], bits, torch.Size(scale.shape), packed_dim=0)
    assert np.array_equal(read.numpy() + 2 ** (bits - 1), zero) and len(np.unique(zero)) > 2
    read = unpack_from_int32(state["weight_packed"], bits, torch.Size((N, K)))
    assert np.array_equal(read.numpy() + 2 ** (bits - 1), levels.reshape(N, K))


@pytest.mark.parametrize("recipe", ["quartet_ii", "quartet", "mxfp8"])
def test_the_bits_are_those_of_the_packed_operand(recipe: str) -> None:
    layer = layer_of(recipe)
    state = packed.pack(codes_of(layer, layer.weight.detach()), packed.scheme_of(layer.numerics, K))
    operand = trained(layer).layout
    bits = layer.numerics.fprop.right.operand(
        layer.weight.detach(), operand.unmasked.stored("packed"),
        Call(layer.numerics, layer.keys, torch.float32, None).rotation("fprop", K),
    )  # fmt: skip
    codes = state.get("weight_packed", state.get("weight"))
    assert codes is not None and bits.block_scale is not None
    assert torch.equal(codes.view(torch.uint8).view(-1), bits.codes.view(-1))
    assert torch.equal(state["weight_scale"].view(torch.uint8).view(-1), bits.block_scale.view(-1))


def reads_inputs(recipe: str) -> bool:
    return packed.scheme_of(Numerics.build(read_recipe(recipe), "reference")).inputs is not None


@pytest.mark.parametrize("recipe", [name for name in held(packed.scheme_of) if reads_inputs(name)])
def test_inputs_that_the_format_says_are_quantised_to_the_same_bits(recipe: str) -> None:
    layer = layer_of(recipe)
    x = torch.randn(40, K, generator=torch.Generator().manual_seed(1)) * 3
    x[7] = 0.0
    call = Call(layer.numerics, layer.keys, torch.float32, None)
    rotation = call.rotation("fprop", K)
    ours = call.operand("fprop.x", x, rotation)[0].dequantize()
    if rotation is not None:
        x = rotate(x, rotation, "reference")
    theirs = of_the_package(x, packed.scheme_of(layer.numerics, K).inputs)
    assert torch.equal(theirs, ours)


def of_the_package(x: Tensor, settings: Any) -> Tensor:
    """x (T, K), as one sequence."""
    args = QuantizationArgs(**settings)
    scale, zero = compute_dynamic_scales_and_zp(x[None], args, nn.Module())
    return fake_quantize(x[None], scale, zero, args)[0]


def test_inputs_of_another_rule_are_not_said() -> None:
    """MXFP8's scale, rounded up in the recipe, is another in the package where the largest magnitude is the largest
    code times a power of two."""
    layer, x = layer_of("mxfp8"), torch.zeros(1, K)
    x[0, 0], x[0, 1] = 1.75, 2.0**-17
    assert packed.scheme_of(layer.numerics, K).inputs is None
    ours = Call(layer.numerics, layer.keys, torch.float32, None).operand("fprop.x", x, None)[0].dequantize()
    said = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    assert torch.equal(ours, x)
    assert not torch.equal(of_the_package(x, said | {"dynamic": True}), ours)


# ------------------------------------------------------------------------------------------------------------- GGUF


MORE_IN_GGUF: dict[str, list[Any]] = {
    "Q4_0": [{"name": "w4a16", "format": "int4_sym/128/float16"}, {"name": "w4a16", "format": "int3/64/float16"}],
    "Q8_0": [{"name": "w4a16", "format": f"{codes}/32/float16"} for codes in ("int8_sym", "int4", "e2m1")],
}


@pytest.mark.parametrize("kind", ggml.KINDS)
def test_gguf_gives_the_trained_values(kind: ggml.Kind) -> None:
    found = held(lambda numerics, features: ggml.kind_of(numerics, features, kind))
    assert found
    for recipe in [*found, *MORE_IN_GGUF.get(kind, [])]:
        layer = layer_of(recipe)
        rows, scale = ggml.blocks_of(codes_of(layer, layer.weight.detach(), layer.weight_scale), kind)
        number = gguf.GGMLQuantizationType[kind]
        if kind in ("BF16", "F16"):
            rows = gguf.quantize(rows, number)
        values = gguf.dequantize(rows, number) * np.float32(scale)
        wanted = trained(layer).dequantize().numpy()
        assert len(np.unique(wanted)) > 2, recipe
        assert np.array_equal(values, wanted), recipe
    block, size = gguf.GGML_QUANT_SIZES[number]
    assert rows.nbytes == N * K * size // block


# ------------------------------------------------------------------------------------------------------------- runs


def train(folder: Path, recipe: str, setting: str | None) -> Path:
    settings = (
        f"recipe={recipe} trainer.batch_tokens=256 trainer.micro_batch_size=8 trainer.precision=32-true "
        "trainer.device=cpu trainer.tokens=1024 optimizer.lr=0.01 data=text data.val_tokens=256 "
        f"tokenizer=bpe tokenizer.vocab_size=300 data.files={folder}/a.txt data.cache_dir={folder}/cache "
        f"run_dir={folder}/{recipe} callbacks.progress_bar=false "
        "model.dim=256 model.ffn_dim=256 model.n_layers=1 model.n_heads=4 model.n_kv_heads=2 model.seq_len=32"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *settings.split(), *([setting] if setting else [])])
        main()
    return folder / recipe


RUNS = ("quest", "quartet_ii", "mxfp8", "w4a16", "w4a16_asym")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "a.txt").write_text("the cat sat on the mat. " * 400)
    of_qwen2 = {"mxfp8": "model.qkv_bias=true"}
    return {recipe: train(folder, recipe, of_qwen2.get(recipe)) for recipe in RUNS}


def reference(run: Path) -> nn.Module:
    """The trained layers' weights in float32, their inputs as they come, all else in bfloat16."""
    model = load_run(run)
    for layer in quant_linears(model):
        rotation = Call(layer.numerics, layer.keys, torch.float32, None).rotation("fprop", layer.in_features)
        values = trained(layer).dequantize()
        layer.weight.data = values if rotation is None else unrotate(values, rotation, "reference")
        layer.high_precision = True
    quantised = {f"{layer.name}.weight" for layer in quant_linears(model)}
    for name, parameter in model.named_parameters():
        if name not in quantised:
            parameter.data = parameter.data.bfloat16().float()
    return model


def prompt(run: Path) -> Tensor:
    return torch.from_numpy(load_tokenizer(run).encode("the cat sat on the mat").astype(np.int64))[None]


def continued(logits: Callable[[Tensor], Tensor], ids: Tensor, tokens: int = 16) -> list[int]:
    for _ in range(tokens):
        ids = torch.cat([ids, logits(ids)[:, -1:].argmax(-1)], 1)
    return ids[0].tolist()


@pytest.mark.parametrize(
    ("recipe", "bits", "bound"),
    [
        ("quest", 5 + 32 / 256 + 8 * 16 * 7 / (6 * 256 * 256), 1e-4),  # weight_shape is two int64
        ("quartet_ii", 4 + 8 / 16 + 8 * 4 * 7 / (6 * 256 * 256), 0.05),  # its reader computes in bfloat16
        ("mxfp8", 8 + 8 / 32, 0.05),
        ("w4a16", 4 + 16 / 32 + 8 * 16 * 7 / (6 * 256 * 256), 1e-4),
    ],
)
@torch.no_grad()
def test_transformers_continues_a_packed_checkpoint_as_trained(
    runs: dict[str, Path], tmp_path: Path, recipe: str, bits: float, bound: float
) -> None:
    exported = packed.export(runs[recipe], tmp_path / "out")
    assert exported.bits_per_weight == pytest.approx(bits, rel=1e-9)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = prompt(runs[recipe])
    theirs(ids)  # on the first forward the package unpacks
    transform = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["transform_config"]
    assert bool(transform) == (recipe == "quest") == any("rotated" in note for note in exported.notes)
    if transform:
        apply_transform_config(theirs, TransformConfig.model_validate(transform))
    ours = reference(runs[recipe])
    torch.testing.assert_close(theirs(ids).logits.float(), ours(ids), rtol=bound, atol=bound)
    assert continued(lambda tokens: theirs(tokens).logits, ids) == continued(ours, ids)


@torch.no_grad()
def test_a_checkpoint_with_zero_points_holds_the_trained_model(runs: dict[str, Path], tmp_path: Path) -> None:
    """Read by the package's own decompressor, layer by layer, into transformers' model, whose logits are ours.
    transformers 5.23 with compressed-tensors 0.20 expects unpacked zero points in the file, and does not load it."""
    exported = packed.export(runs["w4a16_asym"], tmp_path / "out")
    assert exported.bits_per_weight == pytest.approx(4 + (16 + 4) / 128 + 8 * 16 * 7 / (6 * 256 * 256), rel=1e-9)
    assert any("does not load zero points" in note for note in exported.notes)
    with pytest.raises(UserError, match="holds zero points, which transformers does not load"):
        target.load(str(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (group,) = config.pop("quantization_config")["config_groups"].values()
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**group["weights"]))
    state, layers = load_file(tmp_path / "out" / "model.safetensors"), {}
    for name in [name for name in state if name.endswith("weight_packed")]:
        module = name.removesuffix("weight_packed")
        layers[module] = {part.removeprefix(module): state.pop(part) for part in [*state] if part.startswith(module)}
    reader = BaseCompressor.get_value_from_registry(group["format"])
    for module, parts in layers.items():
        parts["weight_scale"] = parts["weight_scale"].float()  # in whose dtype it multiplies
        state[f"{module}weight"] = reader.decompress(parts, scheme)["weight"]
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(config)).float().eval()
    theirs.load_state_dict(state, strict=False)
    ids, ours = prompt(runs["w4a16_asym"]), reference(runs["w4a16_asym"])
    assert len(layers) == 7
    torch.testing.assert_close(theirs(ids).logits, ours(ids), rtol=1e-4, atol=1e-4)
    assert continued(lambda tokens: theirs(tokens).logits, ids) == continued(ours, ids)


def fp_quant_values(state: dict[str, Tensor]) -> Tensor:
    """What a reader multiplies, in rotated space: E2M1 by the table of OCP MX v1.0, the first code in the low bits."""
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    nibbles = torch.stack([state["qweight"] & 15, state["qweight"] >> 4], -1).flatten(1).int()
    codes = grid[nibbles & 7] * (1 - 2 * (nibbles >> 3))
    scales = torch.exp2(state["scales"].float() - 127).repeat_interleave(32, 1)
    return codes.double() * scales / state["weight_global_scale"].double()


def of_three_quarters(rotation: str | None) -> dict[str, Any]:
    side: dict[str, Any] = {"format": "mxfp4", "scale": "floor_three_quarters", "rotation": rotation}
    none = {"format": "none"}
    backward = {"dgrad": {"dy": none, "w": none}, "wgrad": {"dy": none, "x": none}}
    return {"name": "abs_max", "fprop": {"x": side, "w": side}, **backward}


@pytest.mark.parametrize(
    ("recipe", "scheme"),
    [
        ("quartet", fp_quant.Scheme("quest", 32)),
        ("quartet_v1", fp_quant.Scheme("quest", 32)),
        (of_three_quarters("hadamard128"), fp_quant.Scheme("abs_max", 128)),
        (of_three_quarters(None), fp_quant.Scheme("abs_max", None)),
    ],
    ids=["quartet", "quartet_v1", "abs_max", "identity"],
)
def test_fp_quant_gives_the_trained_values(recipe: Any, scheme: fp_quant.Scheme) -> None:
    layer = layer_of(recipe)
    assert fp_quant.scheme_of(layer.numerics) == scheme
    state = fp_quant.pack(codes_of(layer, layer.weight.detach()), scheme)
    assert (state["qweight"].shape, state["scales"].shape) == ((N, K // 2), (N, K // 32))
    values, wanted = fp_quant_values(state), trained(layer).dequantize()
    assert torch.equal((values * 3).float(), wanted * 3) and len(wanted.unique()) > 2
    size = scheme.rotation or 32
    turned = layer.weight.detach().view(N, -1, size) @ state["forward_hadamard_matrix"].float()
    nearest = (turned.flatten(1) - wanted).norm() / turned.norm()
    assert nearest < 0.4, "of the weight in another rotation it is above 1"


@pytest.mark.parametrize(("recipe", "method"), [("quartet", "quest"), (of_three_quarters("hadamard128"), "abs_max")])
def test_fp_quant_would_have_given_the_same_values(recipe: Any, method: str) -> None:
    """What the package's own quantiser (fp_quant 0.3.2, its Triton kernel in Triton's interpreter, float32) made of
    this weight: tests/oracles/fp_quant_values.npz. A sum in another order may move a value across a tie."""
    weight = np.random.default_rng(0).standard_normal((N, K)) * 0.02
    layer = layer_of(recipe)
    layer.weight.data = torch.from_numpy(weight).float()
    layer.weight.data[:, ::37] *= 20
    state = fp_quant.pack(codes_of(layer, layer.weight.detach()), fp_quant.scheme_of(layer.numerics))
    with np.load(Path(__file__).parent / "oracles" / "fp_quant_values.npz") as file:
        theirs = torch.from_numpy(file[method]).double()
    assert ((fp_quant_values(state) - theirs).abs() > 1e-6 * theirs.abs().max()).sum() <= 3


def test_fp_quant_holds_what_its_units_compute_alone() -> None:
    assert held(lambda numerics, _: fp_quant.scheme_of(numerics)) == ["quartet", "quartet_v1"]


def test_transformers_takes_the_config_of_fp_quant(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on the mat. " * 400)
    run = train(tmp_path, "quartet", None)
    exported = fp_quant.export(run, tmp_path / "out")
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    config = transformers.FPQuantConfig.from_dict(said)
    assert (config.forward_method, config.hadamard_group_size) == ("quest", 32)
    assert config.modules_to_not_convert == ["lm_head"]
    of_rotations = 2 * 16 * 32 * 32 * 7 / (6 * 256 * 256)
    assert exported.bits_per_weight == pytest.approx(4.25 + of_rotations + 2 * 16 * 7 / (6 * 256 * 256), rel=1e-9)


@torch.no_grad()
def test_transformers_reads_a_gguf_file(runs: dict[str, Path], tmp_path: Path) -> None:
    """Names, sizes, biases and the tokenizer, of Qwen2, whose queries and keys lie as in a checkpoint."""
    exported = ggml.export(runs["mxfp8"], tmp_path / "out")
    assert (exported.bits_per_weight, exported.kinds) == (16.0, {"BF16": 7})
    (tmp_path / "alone").mkdir()  # the file says all, without the tokenizer.json beside it
    (tmp_path / "out" / "model.gguf").rename(tmp_path / "alone" / "model.gguf")
    file = str(tmp_path / "alone" / "model.gguf")
    config = transformers.AutoConfig.for_model(**load_gguf_checkpoint(file)["config"])
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    theirs.load_state_dict(load_gguf_checkpoint(file, return_tensors=True, model_to_load=theirs)["tensors"])
    ours = reference(runs["mxfp8"])
    for name, value in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[hf.their_name(name)], value), name
    ids = prompt(runs["mxfp8"])
    torch.testing.assert_close(theirs(ids).logits, ours(ids), rtol=1e-4, atol=1e-4)
    tokenizer, own = (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "alone", gguf_file="model.gguf"),
        load_tokenizer(runs["mxfp8"]),
    )
    text = "the cat's mat. Grüße 12! \n"
    assert tokenizer(text)["input_ids"] == own.encode(text).tolist()
    assert tokenizer.eos_token_id == own.eos_id


def test_a_quantised_run_goes_out_as_q4_0(runs: dict[str, Path], tmp_path: Path) -> None:
    exported = ggml.export(runs["w4a16"], tmp_path / "out")
    assert (exported.bits_per_weight, exported.kinds, exported.notes) == (4.5, {"Q4_0": 7}, ())
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    stored = tensors["blk.0.ffn_down.weight"]
    layer = next(layer for layer in quant_linears(load_run(runs["w4a16"])) if layer.name == "layers.0.mlp.down")
    assert np.array_equal(gguf.dequantize(stored.data, stored.tensor_type), trained(layer).dequantize().numpy())


def test_a_scale_of_the_matrix_lies_beside_its_codes(runs: dict[str, Path], tmp_path: Path) -> None:
    exported = ggml.export(runs["quartet_ii"], tmp_path / "out")
    assert exported.kinds == {"NVFP4": 7}
    assert exported.bits_per_weight == pytest.approx(4 + 8 / 16 + 8 * 4 * 7 / (6 * 256 * 256), rel=1e-9)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    order = LlamaTensorProcessor({"num_attention_heads": 4, "num_key_value_heads": 2})
    layers = {layer.name: layer for layer in quant_linears(load_run(runs["quartet_ii"]))}
    for name, there in {"attention.q": "attn_q", "attention.k": "attn_k", "mlp.down": "ffn_down"}.items():
        stored = tensors[f"blk.0.{there}.weight"]
        values = gguf.dequantize(stored.data, stored.tensor_type) * tensors[f"blk.0.{there}.scale"].data
        read = order.process(values, f"blk.0.{there}.weight").weights
        assert np.array_equal(read, trained(layers[f"layers.0.{name}"]).dequantize().numpy()), name


def test_rotary_factors_of_llama_3_are_those_of_the_model() -> None:
    scaling = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_seq_len": 256}
    sizes = {"name": "m", "dim": 64, "n_heads": 1, "n_layers": 1, "ffn_dim": 8, "seq_len": 64, "rope_theta": 500000.0}
    plain, scaled = Llama(**sizes), Llama(**sizes, rope_scaling=scaling)
    factors = torch.from_numpy(ggml.rope_factors(scaled))
    angles = [torch.atan2(model.tables()["sin"][1], model.tables()["cos"][1])[:32] for model in (plain, scaled)]
    assert len(factors.unique()) > 3 and factors.max() == 8
    torch.testing.assert_close(angles[0] / factors, angles[1], rtol=1e-5, atol=0.0)


def test_what_a_format_cannot_hold_is_named_and_nothing_is_written(runs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"GGUF cannot hold layers\.0\..* its weights are rotated \(hadamard128\)"):
        ggml.export(runs["quest"], out)
    with pytest.raises(UserError, match=r"Q8_0 holds whole numbers of 8 bits under one scale, or float16"):
        ggml.export(runs["mxfp8"], out, "Q8_0")
    run = tmp_path / "run"
    shutil.copytree(runs["mxfp8"], run)
    config = (run / "config.yaml").read_text()
    assert "mxfp8_e4m3" in config
    (run / "config.yaml").write_text(config.replace("mxfp8_e4m3", "mxfp8_e5m2"))
    with pytest.raises(UserError, match=r"compressed-tensors cannot hold .* no format has the codes of mxfp8_e5m2"):
        packed.export(run, out)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert RunDirectory(run).read_config().recipe.name == "mxfp8"


def test_bfloat16_scales_and_zero_points_have_no_place_in_gguf() -> None:
    numerics = layer_of({"name": "w4a16", "format": "int4_sym/32/bfloat16"}).numerics
    with pytest.raises(ValueError, match="it has bfloat16 scales of blocks, and those of the format are float16"):
        ggml.kind_of(numerics, K)
    with pytest.raises(ValueError, match="it has zero points, and Q4_1 has a block's smallest value in float16"):
        ggml.kind_of(layer_of({"name": "w4a16_asym", "format": "int4_asym/32/float16"}).numerics, K)
    small = layer_of({"name": "w4a16", "format": "int4_sym/16/float16"}).numerics
    with pytest.raises(ValueError, match=r"Q4_0 holds whole numbers of 4 bits .* float16 scales of multiples of 32"):
        ggml.kind_of(small, K)


def test_codes_of_a_table_go_into_no_format() -> None:
    for name in ("nf4", "nf4/tensor/float32"):
        spec = {"format": name, "scale": "absmax"}
        none: dict[str, Any] = {"format": "none"}
        backward = {"dgrad": {"dy": none, "w": none}, "wgrad": {"dy": none, "x": none}}
        numerics = layer_of({"name": "own", "fprop": {"x": none, "w": spec}, **backward}).numerics
        for say in (packed.scheme_of, ggml.kind_of):
            with pytest.raises(ValueError, match="which are those of a table"):
                say(numerics)
        with pytest.raises(ValueError, match="the format holds mxfp4"):
            fp_quant.scheme_of(numerics)


def test_the_readme_says_what_goes_where() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert table.markdown() in readme
