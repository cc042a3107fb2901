"""Quantise a trained model without training it: a run, or a Hugging Face checkpoint.

qtrain quantize runs/bf16-1a2b3c4d --out w4 recipe=w4a16
qtrain quantize runs/bf16-1a2b3c4d --out w4a4 --method mr_gptq recipe=quartet
qtrain quantize checkpoints/llama --out w4 recipe=quest_weight_only data=text data.files='notes/*.txt'

The recipe says formats, scales and rotations of weights and inputs, as in training; the method, which codes the weights
get: rtn (to nearest), rtn_mse (scales of least error), gptq (columns make up for errors before them), mr_gptq (both,
columns by falling activation; with a recipe that rotates), quarot (gptq and rtn_mse, the residual stream rotated),
smoothquant and awq (inputs after a norm are divided, by their largest values or by what serves the weights). Layers are
calibrated on the training text of the run, or on data=. The folder is a run: `qtrain generate`, `qtrain export` and
`qtrain.load_run` read it. Started again after a stop, the command goes on.
"""

from __future__ import annotations

from pathlib import Path

from qtrain.cli import command_parser


def main() -> None:
    parser = command_parser("quantize", __doc__)
    parser.add_argument("source", help="a run directory, or a Hugging Face checkpoint")
    parser.add_argument("settings", nargs="+", help="recipe=..., and perhaps data=..., as `qtrain train` takes them")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--method", default="gptq", help="one of those above (default: gptq)")
    parser.add_argument("--tokens", type=int, default=131_072, help="to calibrate on (default: 131072)")
    arguments = parser.parse_intermixed_args()
    from qtrain.post_training import quantize

    done = quantize(
        arguments.source, arguments.out, arguments.settings, arguments.method, arguments.tokens,
        lambda text: print(text, flush=True),
    )  # fmt: skip
    print(f"validation loss {done.val_loss:.4f} nats per token, {done.val_loss_before:.4f} before")
    print(f"{done.path}: {len(done.layers)} layers quantised; their errors are in quantization.json")
