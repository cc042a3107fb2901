"""A run as a Hugging Face checkpoint for transformers' FPQuantConfig: MXFP4 for the units of Blackwell.

A layer there multiplies qweight, two E2M1 codes a byte, the first in the low bits, times powers of two in blocks of 32,
over weight_global_scale. It rotates its inputs by a Hadamard matrix of 32, 64 or 128, and quantises them to MXFP4 by
one of two rules: `quest` is our scale rule std, `abs_max` is floor_three_quarters. A recipe whose inputs go through
anything else would be another model there, so it is refused. Ties of their rounding go down, ours to even.

NVFP4 is refused: the format keeps the scale of a tensor in bfloat16, and a fixed one for the inputs.

Source: the package fp_quant 0.3.2, and the exporter in github.com/IST-DASLab/FP-Quant.
"""

# N out features, K in features

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qtrain.export.packed import left_out, write_packed
from qtrain.export.trained import Codes, Exported, Refused, e2m1_bits, e8m0_bits, open_run
from qtrain.quant.functional import Numerics
from qtrain.quant.packed import unsettled
from qtrain.quant.quantizer import Quantizer, rotate
from qtrain.quant.rotation import hadamard
from qtrain_kernels.formats import ELEMENTS

BLOCK = 32
ROTATIONS = (32, 64, 128)
METHODS = {"std": "quest", "floor_three_quarters": "abs_max"}
SCALES = {"quest": 1.0, "abs_max": 3.0}  # what a reader divides codes * block scale by, for each method
ONLY_THERE = "transformers reads it on Blackwell alone, with the packages fp_quant and qutlass"


@dataclass(frozen=True)
class Scheme:
    """What FPQuantConfig says of all layers. rotation: elements of a block; None without one."""

    method: str
    rotation: int | None


def export(run: Path, out: Path) -> Exported:
    """Write the newest good checkpoint of a run directory into the new folder `out`: the codes of the quantised layers,
    all else in bfloat16. UserError when the format cannot hold what the recipe trains, with the reason; then nothing is
    written."""
    trained = open_run(run)
    schemes = trained.held_by("FP-Quant", lambda layer: scheme_of(layer.numerics))
    trained.held_by("FP-Quant", lambda layer: _one_for_all(schemes[layer.name], {*schemes.values()}))
    scheme = next(iter(schemes.values()), Scheme("quest", None))
    config = {
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "fp_quant",
            "forward_dtype": "mxfp4",
            "forward_method": scheme.method,
            "backward_dtype": "bf16",
            "store_master_weights": False,
            "hadamard_group_size": scheme.rotation or BLOCK,
            "pseudoquantization": False,
            "transform_init": "hadamard" if scheme.rotation else "identity",
            "modules_to_not_convert": left_out(trained.layers, trained.sizes),
        },
    }
    return write_packed(
        trained,
        out,
        config,
        lambda layer: pack(trained.codes(layer), scheme),
        {f"MXFP4, {scheme.method}": len(schemes)},
        (ONLY_THERE,),
    )


def scheme_of(numerics: Numerics) -> Scheme:
    """Refused, with the reason, where the format does not hold the forward of a recipe."""
    reason = unsettled(numerics) or _other_weights(numerics.fprop.right) or _other_inputs(numerics.fprop.left)
    if reason is not None:
        raise Refused(reason)
    plan = numerics.fprop.left.plan
    assert plan is not None
    return Scheme(METHODS[plan.rule], numerics.fprop.right.rotation_block)


def _one_for_all(scheme: Scheme, all_schemes: set[Scheme]) -> None:
    if len(all_schemes) > 1:
        raise Refused(f"it is one of {len(all_schemes)} kinds of layers ({scheme}), and the format has one for all")


def _is_mxfp4(quantizer: Quantizer) -> bool:
    plan = quantizer.plan
    if plan is None or plan.scale_kind != "e8m0":
        return False
    return plan.element.levels() == ELEMENTS["e2m1"].levels() and quantizer.tile == (1, BLOCK)


def _other_weights(quantizer: Quantizer) -> str | None:
    """Why the format does not hold these weights; None if it does."""
    plan, spec = quantizer.plan, quantizer.spec
    assert plan is not None
    if not _is_mxfp4(quantizer):
        return f"its weights are {spec.format}, and the format holds mxfp4"
    if plan.line_rule is not None:
        return f"the scale rule {plan.rule} gives each row a scale of its own"
    if spec.rotation is not None and (spec.signs != "none" or quantizer.rotation_block not in ROTATIONS):
        signs = "" if spec.signs == "none" else " with random signs"
        return f"its rotation is {spec.rotation}{signs}, and the format has blocks of 32, 64 or 128 without signs"
    return None


def _other_inputs(quantizer: Quantizer) -> str | None:
    """Why a reader would not quantise the inputs as the recipe does; None if it would."""
    plan = quantizer.plan
    if plan is None:
        return "it leaves its inputs as they are, and a reader quantises them to mxfp4"
    if not _is_mxfp4(quantizer) or plan.rule not in METHODS or plan.rounding != "nearest" or plan.sparsity is not None:
        return f"its inputs are quantised otherwise ({quantizer}) than a reader does, by {' or '.join(METHODS)}"
    return None


def pack(weight: Codes, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors of a layer by the names of its class there."""
    blocks = weight.row_scales()
    assert blocks is not None
    if weight.line_scale is None:
        weight_scale = 1.0
    else:  # 4/3, of floor_three_quarters: 4 times the block's, over 3
        weight_scale, blocks = 3.0, blocks * 4
    first, second = e2m1_bits(weight.codes).view(weight.codes.shape[0], -1, 2).unbind(-1)
    size = scheme.rotation or BLOCK
    matrix = torch.eye(size)
    if scheme.rotation:
        matrix = rotate(matrix, hadamard(size, None, matrix.device), "reference")
    return {
        "qweight": first | second << 4,
        "scales": e8m0_bits(blocks),
        "weight_global_scale": torch.tensor([weight_scale], dtype=torch.bfloat16),
        "act_global_scale": torch.tensor([SCALES[scheme.method]], dtype=torch.bfloat16),
        "forward_hadamard_matrix": matrix.to(torch.bfloat16),
        "backward_hadamard_matrix": matrix.to(torch.bfloat16),
    }
