"""Post-training quantisation of one weight. `qtrain.post_training` takes a model through it."""

from qtrain.quant.ptq.codes import Method, compensated, quantize_weight, relative_error
from qtrain.quant.ptq.formats import in_all_minifloats, with_formats
from qtrain.quant.ptq.hessian import Hessian
from qtrain.quant.ptq.outliers import Split, eliminated, make_up, sensitive
from qtrain.quant.ptq.scales import Scales, scales_of

__all__ = [
    "Hessian",
    "Method",
    "Scales",
    "Split",
    "compensated",
    "eliminated",
    "in_all_minifloats",
    "make_up",
    "quantize_weight",
    "relative_error",
    "scales_of",
    "sensitive",
    "with_formats",
]
