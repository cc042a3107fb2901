"""Write a run for other programs.

qtrain export runs/quartet-1a2b3c4d --to hf --out quartet
qtrain export runs/quest-1a2b3c4d --to compressed-tensors --out quest-packed

hf: bfloat16 weights, for transformers and all that reads its checkpoints; `qtrain train model=hf:quartet` starts a run
from it. compressed-tensors: the codes that were trained, packed, for vLLM and transformers. gguf: the same in a
model.gguf, for llama.cpp. fp-quant: the same of MXFP4 with its rotation, for transformers on Blackwell. peft:
the adapter of a run with +tune=lora; hf then has the weights with the adapter merged. What a format
cannot hold is refused with the reason. Each folder gets the newest good checkpoint of the run, and its tokenizer.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from qtrain.cli import command_parser

FORMATS = {
    "hf": "huggingface",
    "compressed-tensors": "compressed_tensors",
    "gguf": "gguf",
    "fp-quant": "fp_quant",
    "peft": "peft",
}


def main() -> None:
    parser = command_parser("export", __doc__)
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("--to", choices=FORMATS, required=True, help="the format")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write, which must not exist")
    arguments = parser.parse_args()
    _give_back_at_once()
    done = import_module(f"qtrain.export.{FORMATS[arguments.to]}").export(arguments.run, arguments.out)
    print(
        f"{done.folder}: step {done.step}, {done.parameters:,} parameters in {done.weight_bytes:,} bytes, "
        f"{done.bits_per_weight:.4g} bits a weight"
    )
    for kind, layers in (done.kinds or {}).items():
        print(f"  {layers} layers as {kind}")
    for note in done.notes:
        print(f"note: {note}")


def _give_back_at_once() -> None:
    """Has glibc return the memory of a tensor when it is freed. It keeps what is below 32 MiB otherwise: of a model of
    168M parameters, 224 of the 649 MiB that an export to compressed-tensors takes beside the libraries."""
    threshold = -3  # M_MMAP_THRESHOLD
    with suppress(AttributeError, OSError, TypeError):  # of other C libraries
        ctypes.CDLL(None).mallopt(threshold, 1 << 20)
