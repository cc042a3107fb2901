"""Hugging Face checkpoints, held against transformers: one small model of each family."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qtrain.config.settings import parse
from qtrain.errors import UserError
from qtrain.models import hf
from qtrain.models.decoder import Decoder
from qtrain.models.families.llama import Llama
from qtrain.models.hf_config import settings_of
from qtrain.train import compose

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

VOCABULARY = 96
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES = {
    "Llama 2": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "Llama 3": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "Llama with biases": ("Llama", {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
    "SmolLM": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "Mistral": ("Mistral", {"num_key_value_heads": 2, "head_dim": 24, "sliding_window": None}),
    "Qwen2": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "Qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": False}),
}


def build(family: str) -> nn.Module:
    """A model of transformers, in bfloat16, whose weights are large enough that each part shows in the logits."""
    kind, changes = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SIZES, **changes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.2)
    return model.bfloat16().eval()


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    build(request.param).save_pretrained(folder)
    return folder


def imported(folder: Path, **changes: Any) -> Decoder:
    model = Decoder(parse(Llama, {"init_from": str(folder), **changes}), VOCABULARY)
    hf.load(model, str(folder))
    return model.eval()


def exported(model: Decoder, folder: Path) -> Path:
    folder.mkdir()
    state = dict(model.named_parameters())
    config = hf.config_of(model.config, VOCABULARY, eos_id=0)
    hf.save(folder, config, {name: value.shape for name, value in state.items()}, lambda name: state[name].detach())
    return folder


def logits(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.no_grad():
        found = model(batch)
    return found if isinstance(found, Tensor) else found.logits


def test_logits_equal_those_of_transformers_and_the_weights_come_back(saved: Path, tmp_path: Path) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32, attn_implementation="eager")
    ours = imported(saved)
    batch = torch.randint(VOCABULARY, (2, 64), generator=torch.Generator().manual_seed(1))
    expected = logits(theirs, batch)
    assert expected.std() > 1
    torch.testing.assert_close(logits(ours, batch), expected, rtol=1e-4, atol=1e-4)

    out = exported(ours, tmp_path / "out")
    before, after = load_file(saved / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype == torch.bfloat16
        assert torch.equal(value, after[name]), name
    again = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager")
    assert torch.equal(logits(again, batch), expected)


def test_the_settings_of_transformers_4_and_5_read_alike(saved: Path, tmp_path: Path) -> None:
    """4 has rope_theta and rope_scaling beside each other, 5 has both in rope_parameters."""
    config = json.loads((saved / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    shutil.copytree(saved, tmp_path / "old")
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    now, then = (settings_of(str(folder)) for folder in (saved, tmp_path / "old"))
    assert now | {"name": "", "init_from": "", "init_hash": ""} == then | {"name": "", "init_from": "", "init_hash": ""}
    assert now["init_hash"] != then["init_hash"]


def test_shards_are_read_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("Qwen3").save_pretrained(tmp_path / "in", max_shard_size=20_000)
    assert len([*(tmp_path / "in").glob("*.safetensors")]) > 3
    model = imported(tmp_path / "in")
    monkeypatch.setattr(hf, "SHARD_BYTES", 20_000)
    out = exported(model, tmp_path / "out")
    assert len([*out.glob("*.safetensors")]) > 3
    again = imported(out)
    for (name, before), after in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(before, after), name


def test_tensors_of_any_dtype_are_written_one_by_one_and_lie_at_multiples_of_their_size(tmp_path: Path) -> None:
    tensors = {
        "bytes": torch.arange(3, dtype=torch.uint8),
        "floats": torch.randn(2, 3),
        "shape": torch.tensor([2, 3]),
        "scale": torch.tensor(2.5, dtype=torch.bfloat16),
        "codes": torch.ones(5).to(torch.float8_e4m3fn),
    }
    size = hf.write(tmp_path, {}, iter(tensors.items()))
    assert size == 3 + 24 + 16 + 2 + 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name].float(), value.float()), name
    content = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    for name, tensor in json.loads(content[8 : 8 + length]).items():
        if name in tensors:
            assert (8 + length + tensor["data_offsets"][0]) % tensors[name].element_size() == 0


def test_a_shorter_context_can_be_asked_for_and_other_sizes_not(saved: Path) -> None:
    assert imported(saved, seq_len=16).config.seq_len == 16
    with pytest.raises(UserError, match=r"lacks model.layers.2.* leave the sizes of model= to the checkpoint"):
        imported(saved, n_layers=3)
    with pytest.raises(
        UserError, match=r"holds model.layers.1.*tensors for which a model with its settings has no use"
    ):
        imported(saved, n_layers=1)
    with pytest.raises(UserError, match=r"mlp.*proj.weight is \(.*\), and the settings ask for \(.*\)"):
        imported(saved, ffn_dim=32)


def test_a_sliding_window_bounds_the_context_that_can_be_asked_for(tmp_path: Path) -> None:
    """Attention here is of all tokens, which is another model beyond the window."""
    build("Mistral").save_pretrained(tmp_path)
    edited(sliding_window=4096, max_position_embeddings=32768)(tmp_path)
    assert imported(tmp_path).config.seq_len == 2048 and imported(tmp_path, seq_len=4096).config.seq_len == 4096
    with pytest.raises(UserError, match=r"window of 4096 tokens .* model.seq_len is 4097; set it to at most 4096"):
        imported(tmp_path, seq_len=4097)


def edited(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return edit


def without_a_shard(folder: Path) -> None:
    next(folder.glob("model-00002-*")).unlink()


def cut(folder: Path) -> None:
    path = next(folder.glob("model-00001-*"))
    path.write_bytes(path.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").touch()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (edited(model_type="gpt2"), "model_type 'gpt2' is not of the Llama family; model=hf: reads llama, mistral"),
        (edited(hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
        (edited(rope_parameters={"rope_type": "yarn", "factor": 2.0}), "rope_type 'yarn' is not supported"),
        (edited(model_type="mistral", sliding_window=16), "sliding window of 16 tokens is not supported"),
        (edited(quantization_config={"quant_method": "gptq"}), r"the weights are quantised \(gptq\)"),
        (edited(partial_rotary_factor=0.5), "partial_rotary_factor 0.5 is not supported"),
        (edited(hidden_size="64"), r"is damaged \(hidden_size: Input should be a valid integer"),
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json: it is no Hugging Face checkpoint"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot read .*config.json .*download it again"),
        (without_a_shard, "lacks model-00002-of-.*, which model.safetensors.index.json names; download it again"),
        (cut, "cannot read the weights in .*; download them again"),
        (pickled, "holds no safetensors files and no model.safetensors.index.json; save the model again"),
    ],
)
def test_what_cannot_be_read_is_named(damage: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    build("Llama 2").save_pretrained(tmp_path, max_shard_size=40_000)
    damage(tmp_path)
    with pytest.raises(UserError, match=said):
        imported(tmp_path)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none: it is no folder; give the one that holds config.json"):
        settings_of(str(tmp_path / "none"))
    for nameless in ("model=hf", "model=hf:"):
        with pytest.raises(UserError, match="model=hf:FOLDER needs the folder or name of a checkpoint"):
            compose([nameless])
