"""llama.cpp itself, as the package xllamacpp has it, reads what `qtrain export --to gguf` writes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("gguf", reason="the extra export is not installed")
llama_cpp = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")

from qtrain.evaluate.target import load  # noqa: E402
from qtrain.export import gguf  # noqa: E402
from qtrain.train import main  # noqa: E402

VOCABULARY, TOKENS = 269, 12
LLAMA_3 = "model.rope_scaling={factor:8,low_freq_factor:1,high_freq_factor:4,original_seq_len:64}"
# Recipe, settings and the type that its layers go out as.
CASES: dict[str, tuple[str, list[str], str]] = {
    "llama": ("bf16", ["model.n_kv_heads=2"], "BF16"),
    "llama 3": ("bf16", ["model.rope_theta=1000", LLAMA_3, "model.tie_embeddings=true"], "BF16"),
    "qwen 2": ("w4a16", ["model.qkv_bias=true"], "Q4_0"),
    "qwen 3": ("w4a16", ["recipe.format=int8_sym/32/float16", "model.qk_norm=true"], "Q8_0"),
    "trilm": ("trilm", [], "TQ2_0"),
    "mxfp4": ("w4a16", ["recipe.format=mxfp4", "recipe.fprop.w.scale=even", "model.n_kv_heads=2"], "MXFP4"),
    "nvfp4": ("quartet_ii", ["model.n_kv_heads=2"], "NVFP4"),
}


def exported(folder: Path, recipe: str, settings: list[str]) -> tuple[Path, Any]:
    (folder / "a.txt").write_text("the cat sat on the mat. " * 400)
    common = (
        f"recipe={recipe} trainer.batch_tokens=512 trainer.micro_batch_size=8 trainer.precision=32-true "
        "trainer.device=cpu trainer.tokens=8192 optimizer.lr=0.01 data=text data.val_tokens=256 "
        f"tokenizer=bpe tokenizer.vocab_size={VOCABULARY} data.files={folder}/a.txt data.cache_dir={folder}/cache "
        f"run_dir={folder}/run callbacks.progress_bar=false "
        "model.dim=256 model.ffn_dim=256 model.n_layers=2 model.n_heads=4 model.seq_len=64"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *common.split(), *settings])
        main()
    return folder / "out", gguf.export(folder / "run", folder / "out")


def continued(folder: Path, prompt: list[int] | str) -> tuple[list[int], Tensor]:
    """llama.cpp's greedy continuation, and the log-probabilities (TOKENS, VOCABULARY) by which it was chosen."""
    asked = llama_cpp.CommonParams()
    asked.model.path = str(folder / "model.gguf")
    asked.n_ctx, asked.n_parallel, asked.verbosity = 64, 1, -1
    asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = 1
    server = llama_cpp.Server(asked)
    told = server.handle_completions(
        {"prompt": prompt, "n_predict": TOKENS, "temperature": 0, "n_probs": VOCABULARY, "ignore_eos": False}
    )
    steps = told["choices"][0]["logprobs"]["content"]
    found = torch.full((len(steps), VOCABULARY), -torch.inf)
    for row, step in zip(found, steps, strict=True):
        for each in step["top_logprobs"]:
            row[each["id"]] = each["logprob"]
    return [step["id"] for step in steps], found


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_continues_as_qtrain_does(case: str, tmp_path: Path) -> None:
    recipe, settings, kind = CASES[case]
    out, said = exported(tmp_path, recipe, settings)
    assert said.kinds is None or [*said.kinds] == [kind]
    target = load(out)
    text = "the cat's mat. Grüße 12! \nthe cat sat on"
    prompt = target.tokenizer.encode(text).tolist()
    chosen, theirs = continued(out, prompt)
    assert continued(out, text)[0] == chosen, "its tokenizer splits the text otherwise"
    ids, ours = prompt, []
    for token in chosen:
        with torch.no_grad():
            ours.append(target.model(torch.tensor([ids])).log_softmax(-1)[0, -1])
        ids = [*ids, token]
    logits = torch.stack(ours)
    assert chosen == logits.argmax(-1).tolist()
    # llama.cpp rounds the inputs of products: to bfloat16, or in blocks to 8 bits.
    torch.testing.assert_close(theirs, logits, rtol=0.0, atol=0.05)
    assert (theirs - logits).std() < 0.012, "a scale that is 2% off has 0.015"
