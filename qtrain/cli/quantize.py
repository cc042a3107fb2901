"""Quantise a trained model without training it: a run, or a Hugging Face checkpoint.

qtrain quantize runs/bf16-1a2b3c4d --out w4 recipe=w4a16
qtrain quantize runs/bf16-1a2b3c4d --out w4a4 --method mr_gptq recipe=quartet
qtrain quantize runs/bf16-1a2b3c4d --out w4a8 --method llm_fp4 recipe=zeroquant_fp
qtrain quantize runs/bf16-1a2b3c4d --out w4 --outlier-weights 0.2 recipe=quest_weight_only
qtrain quantize runs/bf16-1a2b3c4d --out w3 --low-rank 8 recipe=quest_weight_only recipe.bits=3
qtrain quantize checkpoints/llama --out w4 recipe=quest_weight_only data=text data.files='notes/*.txt'

The recipe says formats, scales and rotations of weights and inputs, as in training; the method, which codes the weights
get: rtn (to nearest), rtn_mse (scales of least error), gptq (columns make up for errors before them), mr_gptq (both,
columns by falling activation; the command says where the recipe does not rotate, as MR-GPTQ does), quarot (gptq and
rtn_mse, the residual stream rotated), smoothquant and awq (inputs after a norm are divided, by their largest values or
by what serves the weights), llm_fp4 (each layer gets the minifloats of least output error, of as many bits as the
recipe's; inputs after a norm are divided by powers of two). Layers are calibrated on the training text of the run, or
on data=. Of a run, recipe, data, backend and gemm can be set; its other settings are its own.

With every method, outliers can stay in 16 bits beside the codes: whole input columns with their inputs (QUIK's are the
columns of the largest inputs, LLM.int8's those with an input above 6), or single weights (SpQR's, whose rounding, or
the scale that they force on their block, costs the most). Inputs are measured as the layer gets them: under smoothquant
and awq after the division, under quarot in the rotated stream. Under gptq and its like the columns make up for the
errors of all others.

With every method and with outliers, --low-rank keeps a low-rank part of each weight's error beside the codes, as two
factors in 16 bits (LoRC of ZeroQuant-FP has rank 8). They count in the bits per weight, as outliers do. A run with
outliers or a low-rank part is exported as a Hugging Face checkpoint alone.

The folder is a run: `qtrain generate`, `qtrain export` and `qtrain.load_run` read it. Started again after a stop, the
command goes on.
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
    parser.add_argument(
        "--outlier-columns", type=int, default=0, metavar="N", help="columns of the largest inputs to keep (default: 0)"
    )
    parser.add_argument(
        "--outlier-inputs", type=float, metavar="X", help="keep columns with an input above X, as 6 (default: none)"
    )
    parser.add_argument(
        "--outlier-weights", type=float, metavar="T",
        help="keep weights more sensitive than T times the mean, as 0.2; fewer for a larger T (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--low-rank", type=int, default=0, metavar="R", help="rank of the error that is kept, as 8 (default: 0)"
    )
    arguments = parser.parse_intermixed_args()
    from qtrain.post_training import Split, quantize

    split = Split(arguments.outlier_columns, arguments.outlier_inputs, arguments.outlier_weights)
    done = quantize(
        arguments.source, arguments.out, arguments.settings, arguments.method, arguments.tokens,
        lambda text: print(text, flush=True), split, arguments.low_rank,
    )  # fmt: skip
    print(f"validation loss {done.val_loss:.4f} nats per token, {done.val_loss_before:.4f} before")
    print(f"{done.path}: {len(done.layers)} layers quantised to {done.bits_per_weight:.4g} bits a weight")
    print("the errors of the layers are in its quantization.json")
