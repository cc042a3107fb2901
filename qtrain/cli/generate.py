"""Continue a prompt with the model of a run, as it was trained: quantised by the run's recipe.

qtrain generate runs/quartet-1a2b3c4d --prompt "def "
qtrain generate runs/quartet-1a2b3c4d --prompt "Once upon" --tokens 400 --temperature 0

qtrain generate runs/quartet-1a2b3c4d --prompt "def " --prompt "class " --cache int8

The newest good checkpoint is used, also while the run trains. The same seed gives the same text. Several prompts go on
beside each other. Weights are held as codes, in the bits of the recipe's format, wherever its forward has such.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtrain.cli import command_parser
from qtrain.errors import visible

if TYPE_CHECKING:
    from qtrain.data.tokenizer import Tokenizer

INCOMPLETE = "\ufffd"  # what decoding gives for the first bytes of a character


def main() -> None:
    parser = command_parser("generate", __doc__)
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument(
        "--prompt", type=_text, action="append", help="text to continue (default: a new line); may be repeated"
    )
    parser.add_argument("--tokens", type=int, default=200, help="how many to add (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    parser.add_argument("--top-k", type=int, help="choose among so many tokens (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument("--cache", metavar="FORMAT", help="of keys and values: bf16, int8, int4 (default: as computed)")
    arguments = parser.parse_args()
    arguments.prompt = arguments.prompt or ["\n"]
    for text in continued(arguments):
        print(text, end="", flush=True)
    print()


def _text(argument: str) -> str:
    """Bytes that are no UTF-8 come as halves of surrogate pairs, which no tokenizer takes."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{argument!r} has bytes that are no UTF-8; give text in UTF-8") from None
    return argument


def continued(arguments: argparse.Namespace) -> Iterator[str]:
    """The prompt and what comes after it, as it comes, without escape sequences; of several prompts one text after the
    other."""
    import torch

    from qtrain.models.generate import generate_batch, round_weights
    from qtrain.quant import keep_weights, pack, sees_tokens_apart, set_step
    from qtrain.quant.kv_cache import kv_codec
    from qtrain.quant.packed import obstacle
    from qtrain.runs.directory import RunDirectory
    from qtrain.training.build import load_run, load_tokenizer

    config = RunDirectory(arguments.run).read_config()
    tokenizer = load_tokenizer(arguments.run)
    on_gpu = torch.cuda.is_available() and config.trainer.device != "cpu"
    device = torch.device("cuda" if on_gpu else "cpu")
    model: Any = load_run(arguments.run).to(device)
    if obstacle(model) is None:
        pack(model)
    if config.trainer.precision == "bf16-mixed":
        round_weights(model)
    prompts = [[int(token) for token in tokenizer.encode(prompt)] for prompt in arguments.prompt]
    tokens = generate_batch(
        model,
        prompts,
        arguments.tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        seed=arguments.seed,
        cached=sees_tokens_apart(model),
        codec=None if arguments.cache is None else kv_codec(arguments.cache),
    )
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=config.trainer.precision == "bf16-mixed")
    with mixed, torch.no_grad(), keep_weights(model):
        set_step(model, 0)  # quantises weights that are not packed, once for all tokens
        if len(prompts) == 1:
            yield from shown(tokenizer, prompts[0], (token for (token,) in tokens))
            return
        for ids, more in zip(prompts, zip(*tokens, strict=True), strict=True):
            yield from shown(tokenizer, ids, more)
            yield "\n\n"


def shown(tokenizer: Tokenizer, ids: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """The text of ids and of the tokens that follow, in pieces: a character that is not whole waits for its rest."""
    ids, text = [*ids], ""
    for new in chain(([],), ([token] for token in tokens)):
        ids += new
        whole = tokenizer.decode(ids).rstrip(INCOMPLETE)
        if whole.startswith(text):
            yield visible(whole[len(text) :])
            text = whole
    yield visible(tokenizer.decode(ids)[len(text) :])
