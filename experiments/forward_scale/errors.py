"""Error, misalignment and masked share of the study's forward scale rules on N(0, 1), averaged over an octave of sigma;
and the error's parts: of what lies beyond the largest code (clipping), and of the rest (resolution).

python experiments/forward_scale/errors.py
"""

from __future__ import annotations

import torch

from qtrain.config.recipe import QuantSpec
from qtrain.quant.quantizer import QuantizedTensor, Quantizer

RULES = ("std", "std_round", "even", "mse", "mse_phase")
MASKS = (("clip", 1.0), ("clip", 0.77), ("clip", 0.75), ("trust", 1.0))


def row(rule: str, estimator: str, clip_scale: float, x: torch.Tensor) -> str:
    spec = QuantSpec.model_validate(
        {"format": "mxfp4", "scale": rule, "estimator": estimator, "clip_scale": clip_scale}
    )
    quantized = Quantizer.build(spec).quantize(x)
    values, exact = quantized.dequantize().double(), x.double()
    energy = exact.square().sum(1)
    squares = (values - exact).square()
    largest = (
        6.0 * QuantizedTensor(torch.ones_like(x), quantized.block_scale, quantized.tensor_scale, None).dequantize()
    )
    beyond = x.abs() > largest
    error, clipping, resolution = (
        (part.sum(1) / energy).mean() for part in (squares, squares * beyond, squares * ~beyond)
    )
    misalignment = 1 - ((values * exact).sum(1) / energy).mean()
    assert quantized.mask is not None
    masked = 1 - quantized.mask.double().mean()
    share = f"{misalignment:.2e} | {masked:.2%}"
    return f"| {rule} | {estimator} {clip_scale:g} | {error:.3e} | {clipping:.2e} | {resolution:.2e} | {share} |"


def main() -> None:
    rows = 4096
    x = torch.randn(rows, 4096, generator=torch.Generator().manual_seed(0))
    x = x * torch.exp2(torch.arange(rows) / rows)[:, None]
    print(
        "| rule | mask | squared error | clipping | resolution | misalignment | masked |\n|---|---|---|---|---|---|---|"
    )
    for rule in RULES:
        for estimator, clip_scale in MASKS:
            print(row(rule, estimator, clip_scale, x))


if __name__ == "__main__":
    main()
