"""Write a run for other programs: a Hugging Face checkpoint that transformers, vLLM and others read.

qtrain export runs/quartet-1a2b3c4d --out quartet

The folder gets config.json, the weights of the newest good checkpoint in bfloat16, and the tokenizer.
`qtrain train model=hf:quartet` starts a run from it.
"""

from __future__ import annotations

from pathlib import Path

from qtrain.cli import command_parser


def main() -> None:
    parser = command_parser("export", __doc__)
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write, which must not exist")
    arguments = parser.parse_args()
    from qtrain.export.huggingface import export

    done = export(arguments.run, arguments.out)
    bits = 8 * done.weight_bytes / done.parameters
    print(f"{done.folder}: step {done.step}, {done.parameters:,} parameters, {bits:g} bits each")
    if done.recipe:
        print(
            f"note: these are the weights before recipe {done.recipe} quantises them. A program that multiplies them "
            "in bfloat16 computes another model than the run did."
        )
