"""Quantised linear layers: recipes in, swapped layers out."""

from qtrain.quant.convert import Report, check_backend, convert, fp8_rounded, recipes, set_high_precision, set_step
from qtrain.quant.health import operand_health
from qtrain.quant.linear import Observed, Observer, QuantLinear
from qtrain.quant.quantizer import QuantizedTensor, Quantizer, fake_quantize

__all__ = [
    "Observed",
    "Observer",
    "QuantLinear",
    "QuantizedTensor",
    "Quantizer",
    "Report",
    "check_backend",
    "convert",
    "fake_quantize",
    "fp8_rounded",
    "operand_health",
    "recipes",
    "set_high_precision",
    "set_step",
]
