"""Continue a prompt with the model of a run, as it was trained: quantised by the run's recipe.

python scripts/generate.py runs/quartet-1a2b3c4d --prompt "def "
python scripts/generate.py runs/quartet-1a2b3c4d --prompt "Once upon" --tokens 400 --temperature 0

The newest good checkpoint is used, also while the run trains. The same seed gives the same text.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import qtrain  # noqa: F401  before torch: it sets how long torch's threads spin

# isort: split

import torch

from qtrain.errors import UserError, visible
from qtrain.models.generate import generate
from qtrain.runs.directory import RunDirectory
from qtrain.training.build import load_run, load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("--prompt", default="\n", help="text to continue (default: a new line)")
    parser.add_argument("--tokens", type=int, default=200, help="how many to add (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    parser.add_argument("--top-k", type=int, help="choose among so many tokens (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    arguments = parser.parse_args()
    try:
        print(continued(arguments))
    except UserError as error:
        sys.exit(f"error: {error}")


def continued(arguments: argparse.Namespace) -> str:
    """The prompt and what comes after it, without escape sequences."""
    config = RunDirectory(arguments.run).read_config()
    tokenizer = load_tokenizer(arguments.run)
    on_gpu = torch.cuda.is_available() and config.trainer.device != "cpu"
    device = torch.device("cuda" if on_gpu else "cpu")
    model = load_run(arguments.run).to(device)
    prompt = [int(token) for token in tokenizer.encode(arguments.prompt)]
    with torch.autocast(device.type, torch.bfloat16, enabled=config.trainer.precision == "bf16-mixed"):
        ids = prompt + list(
            generate(
                model,  # pyright: ignore[reportArgumentType]
                prompt,
                arguments.tokens,
                temperature=arguments.temperature,
                top_k=arguments.top_k,
                seed=arguments.seed,
            )
        )
    return visible(tokenizer.decode(ids))


if __name__ == "__main__":
    main()
