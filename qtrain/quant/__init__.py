"""Quantised linear layers: recipes in, swapped layers out."""

from qtrain.quant.convert import Report, check_backend, convert, recipes, set_high_precision
from qtrain.quant.functional import Observed, Observer
from qtrain.quant.gather import check_quantized_gather, gathered_bytes, quantize_gathers
from qtrain.quant.health import operand_health
from qtrain.quant.linear import QuantLinear, keep_weights, quant_linears, sees_tokens_apart, set_seed, set_step
from qtrain.quant.lsq import calibrate
from qtrain.quant.packed import PackedLinear, pack
from qtrain.quant.quantizer import QuantizedTensor, Quantizer, fake_quantize

__all__ = [
    "Observed",
    "Observer",
    "PackedLinear",
    "QuantLinear",
    "QuantizedTensor",
    "Quantizer",
    "Report",
    "calibrate",
    "check_backend",
    "check_quantized_gather",
    "convert",
    "fake_quantize",
    "gathered_bytes",
    "keep_weights",
    "operand_health",
    "pack",
    "quant_linears",
    "quantize_gathers",
    "recipes",
    "sees_tokens_apart",
    "set_high_precision",
    "set_seed",
    "set_step",
]
