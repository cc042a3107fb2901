"""Tokens a second of generation on CPU, against transformers with the same weights, in one process and alternately.

python scripts/bench_generation.py --model 1.1b --tokens 32 --rounds 3

A Llama of random parameters, 134 million or 1.1 billion (TinyLlama's shape), continues a prompt of 16 tokens greedily,
with keys and values kept: in bfloat16; with 4-bit weights in all blocks (recipe quest_weight_only) and a bfloat16 head;
the small one in float32 too. Where xllamacpp is installed, llama.cpp then continues the same codes as qtrain, those of
recipe w4a16 exported as GGUF's Q4_0. Ratios are of one round each; the median and the range over the rounds are
printed.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml

import qtrain
from qtrain.config.settings import parse
from qtrain.data.tokenizer import ByteTokenizer, tokenizer_files
from qtrain.export import gguf
from qtrain.models import hf
from qtrain.models.decoder import Decoder
from qtrain.models.families.llama import Llama
from qtrain.models.generate import generate, round_weights
from qtrain.runs.directory import RunDirectory
from qtrain.train import compose
from qtrain.training import checkpoint
from qtrain.training.build import load_run

MODELS = {
    "134m": {"dim": 768, "n_layers": 12, "n_heads": 12, "ffn_dim": 2048, "seq_len": 256},
    "1.1b": {"dim": 2048, "n_layers": 22, "n_heads": 32, "n_kv_heads": 4, "ffn_dim": 5632, "seq_len": 256},
}
VOCABULARY = 32000
PROMPT = [*range(16)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="134m")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    seconds = timed(build(arguments.model), arguments.tokens, arguments.rounds)
    if find_spec("xllamacpp"):  # by itself: its server has threads of its own
        seconds |= timed(_beside_llama_cpp(arguments.model), arguments.tokens, arguments.rounds)
    print(f"{arguments.model}, torch {torch.__version__}, {arguments.threads} threads, {arguments.tokens} tokens")
    for name, each in seconds.items():
        print(f"{name:<32} {arguments.tokens / statistics.median(each):7.2f} tokens/s")
    for ours, theirs in (
        ("qtrain float32", "transformers float32"),
        ("qtrain bfloat16", "transformers bfloat16"),
        ("qtrain bfloat16", "transformers float32"),
        ("qtrain 4-bit weights", "transformers bfloat16"),
        ("qtrain 4-bit weights", "transformers float32"),
        ("qtrain Q4_0", "llama.cpp Q4_0"),
    ):
        if not {ours, theirs} <= seconds.keys():
            continue
        ratios = [b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True)]
        print(f"{ours} / {theirs}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def timed(ways: dict[str, Callable[[int], Any]], n_tokens: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, the ways by turns."""
    for way in ways.values():
        way(4)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way(n_tokens)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def build(name: str) -> dict[str, Callable[[int], Any]]:
    """name -> what generates so many tokens."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    settings = parse(Llama, {"family": "llama", "name": "bench", **MODELS[name]})
    model = Decoder(settings, VOCABULARY).eval()
    config: dict[str, Any] = hf.config_of(settings, VOCABULARY, eos_id=0) | {"eos_token_id": None}
    theirs: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(config)).float().eval()
    named = {hf.their_name(name): value for name, value in model.state_dict().items()}
    theirs.load_state_dict({name: named[name] for name in theirs.state_dict()})
    ways = {}
    if name == "134m":  # the large one fits into memory a few times only
        ways = {
            "transformers float32": _theirs(copy.deepcopy(theirs)),
            "qtrain float32": _ours(copy.deepcopy(model), False),
        }
    ways["transformers bfloat16"] = _theirs(theirs.bfloat16())
    half = copy.deepcopy(model)
    round_weights(half)
    ways["qtrain bfloat16"] = _ours(half, True)
    qtrain.convert(model, "quest_weight_only")
    qtrain.pack(model)
    round_weights(model)
    ways["qtrain 4-bit weights"] = _ours(model, True)
    return ways


def write_run(path: Path, sizes: dict[str, int], recipe: str) -> None:
    """A run directory with a checkpoint of random parameters, after no step."""
    config = compose(
        [f"recipe={recipe}", "model=llama_100m", *(f"model.{name}={value}" for name, value in sizes.items())]
    )
    torch.manual_seed(0)
    model = Decoder(config.model, VOCABULARY)
    directory = RunDirectory(path)
    checkpoint.save(directory.checkpoints, 0, checkpoint.tensors_of(model), {"vocab_size": VOCABULARY})
    directory.tokenizer.mkdir()
    for name, text in tokenizer_files(ByteTokenizer()).items():
        (directory.tokenizer / name).write_text(text)
    (path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def _beside_llama_cpp(name: str) -> dict[str, Callable[[int], Any]]:
    xllamacpp: Any = import_module("xllamacpp")

    with tempfile.TemporaryDirectory() as folder:
        run, out = Path(folder) / "run", Path(folder) / "out"
        write_run(run, MODELS[name], "w4a16")
        gguf.export(run, out)
        model: Any = load_run(run).eval()
        qtrain.pack(model)
        round_weights(model)
        asked = xllamacpp.CommonParams()
        asked.model.path, asked.n_ctx, asked.n_parallel = str(out / "model.gguf"), 256, 1
        asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = torch.get_num_threads()
        server = xllamacpp.Server(asked)

    def theirs(n_tokens: int) -> None:
        wanted = {"prompt": PROMPT, "n_predict": n_tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        assert server.handle_completions(wanted)["usage"]["completion_tokens"] == n_tokens

    return {"qtrain Q4_0": _ours(model, True), "llama.cpp Q4_0": theirs}


def _theirs(model: Any) -> Callable[[int], Any]:
    ids = torch.tensor([PROMPT])

    @torch.no_grad()
    def way(n_tokens: int) -> None:
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_tokens, do_sample=False, pad_token_id=0
        )
        assert found.shape[1] == len(PROMPT) + n_tokens

    return way


def _ours(model: Decoder, mixed: bool) -> Callable[[int], Any]:
    @torch.no_grad()
    def way(n_tokens: int) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            assert len([*generate(model, PROMPT, n_tokens, temperature=0)]) == n_tokens

    return way


if __name__ == "__main__":
    main()
