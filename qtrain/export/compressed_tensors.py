"""A run as a Hugging Face checkpoint of packed codes, in the formats of the compressed-tensors package.

| format | weights |
|---|---|
| nvfp4-pack-quantized | E2M1 in blocks of 16 under E4M3, one float32 scale a tensor |
| mxfp4-pack-quantized, mxfp6-pack-quantized, mxfp8-quantized | E2M1, E2M3, E4M3 in blocks of 32 under powers of two |
| float-quantized | E4M3 under float32 scales of tensors, rows, blocks or tiles |
| pack-quantized | whole numbers of up to 8 bits under float32 scales of rows or blocks, or 16-bit ones of blocks |

The last two fold what the others cannot hold: a scale of the row is multiplied into powers of two of its blocks, which
changes no bit, and a grid whose codes are multiples of one step becomes whole numbers. Scales in float16 and bfloat16
stay so in pack-quantized, where codes are whole numbers themselves; zero points go there too (symmetric: false). A
reader multiplies codes in the dtype in which it has the scales. config.json asks for float32, in which weights are
exact; in 16 bits they are rounded once. A rotation of the inputs is said in transform_config. Source:
compressed-tensors 0.20, its compressors and transforms.
"""

# N out features, K in features

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtrain.errors import need
from qtrain.export.packed import left_out, module_of, write_packed
from qtrain.export.trained import (
    Codes,
    Exported,
    Refused,
    e8m0_bits,
    has_line_scale,
    integer_grid,
    open_run,
)
from qtrain.quant import QuantLinear
from qtrain.quant.functional import Numerics
from qtrain.quant.packed import unsettled
from qtrain.quant.quantizer import Quantizer
from qtrain_kernels.formats import E4M3, ELEMENTS, Element, get_format
from qtrain_kernels.qtensor import Layout
from qtrain_kernels.reference import SCALE_DTYPES

MX_BLOCK, NV_BLOCK = 32, 16
E2M1, E2M3 = ELEMENTS["e2m1"], get_format("mxfp6_e2m3").element
MX = {E2M1.levels(): "mxfp4-pack-quantized", E2M3.levels(): "mxfp6-pack-quantized", E4M3.levels(): "mxfp8-quantized"}
TRANSFORM = (
    "the weights are rotated: a reader must rotate the inputs as transform_config says "
    "(compressed_tensors.transform.apply_transform_config; transformers alone does not)"
)

ZERO_POINTS = "transformers 5.23 with compressed-tensors 0.20 does not load zero points beside packed codes"


@dataclass(frozen=True)
class Scheme:
    """How the format holds the layers of one recipe. weights, inputs: settings of a QuantizationArgs; inputs None where
    the reader leaves them as they are. rotation: elements of a block of the inputs' Hadamard rotation, 0 for all of
    them, None without one. note: what of the recipe's inputs the format does not say."""

    format: str
    weights: dict[str, Any]
    inputs: dict[str, Any] | None
    rotation: int | None
    note: str | None


def export(run: Path, out: Path) -> Exported:
    """Write the newest good checkpoint of a run directory into the new folder `out`: the codes of the quantised layers,
    all else in bfloat16. One layer at a time is in memory. UserError when the format cannot hold what the recipe
    trains, with the reason; then nothing is written."""
    need("compressed_tensors", "an export to compressed-tensors")
    trained = open_run(run)
    schemes = trained.held_by("compressed-tensors", lambda layer: scheme_of(layer.numerics, layer.in_features))
    # In which the package's reader gives the values: without a float32 scale for each row or block, all are exact.
    dtype = (
        "float32" if all(s.format in ("float-quantized", "pack-quantized") for s in schemes.values()) else "bfloat16"
    )
    config = {"torch_dtype": dtype, "quantization_config": _config(trained.layers, schemes, trained.sizes)}
    notes = {scheme.note for scheme in schemes.values()} | {
        TRANSFORM for s in schemes.values() if s.rotation is not None
    }
    notes |= {ZERO_POINTS for scheme in schemes.values() if not scheme.weights["symmetric"]}
    return write_packed(
        trained,
        out,
        config,
        lambda layer: pack(trained.codes(layer), schemes[layer.name]),
        Counter(scheme.format for scheme in schemes.values()),
        tuple(sorted(note for note in notes if note)),
    )


# ---------------------------------------------------------------------------------------------- which format holds what


def scheme_of(numerics: Numerics, in_features: int | None = None) -> Scheme:
    """The format of the layers of a recipe; in_features: of one of them. Refused, with the reason, where none of them
    holds every code and scale."""
    reason = unsettled(numerics) or _unsayable_rotation(numerics.fprop.right, in_features)
    if reason is not None:
        raise Refused(reason)
    name, weights = _weights(numerics)
    inputs, note = _inputs(numerics.fprop.left)
    return Scheme(name, weights, inputs, numerics.fprop.right.rotation_block, note)


def _unsayable_rotation(quantizer: Quantizer, in_features: int | None) -> str | None:
    if quantizer.rotation_block is None:
        return None
    if quantizer.spec.signs != "none":
        return "its Hadamard rotation has random signs, and the format's has none"
    size = quantizer.rotation_block or in_features or 1
    return (
        f"its Hadamard matrix of order {size} is none of the format's, whose orders are powers of two"
        if size & (size - 1)
        else None
    )


def _weights(numerics: Numerics) -> tuple[str, dict[str, Any]]:
    """(format, QuantizationArgs) of the weights."""
    quantizer, plan = numerics.fprop.right, numerics.fprop.right.plan
    assert plan is not None
    if plan.element.table is not None:
        raise Refused(f"no format has the codes of {quantizer.spec.format}, which are those of a table")
    element, (rows, size), lined = plan.element.levels(), quantizer.tile, has_line_scale(numerics)
    if plan.scale_kind == "e8m0" and size == MX_BLOCK and element in MX and not lined:
        return MX[element], _float(plan.element, "group", group_size=size, scale_dtype="torch.uint8")
    if plan.scale_kind == "minifloat":
        if (element, plan.scale_element, size) == (E2M1.levels(), E4M3, NV_BLOCK):
            nv = _float(plan.element, "tensor_group", group_size=size, scale_dtype="torch.float8_e4m3fn")
            return "nvfp4-pack-quantized", nv
        raise Refused(f"no format has block scales as those of {quantizer.spec.format}, under a scale of the tensor")
    if element == E4M3.levels():
        if plan.block is None:
            return "float-quantized", _float(plan.element, "tensor" if plan.whole else "channel")
        if rows > 1 and not lined:
            return "float-quantized", _float(plan.element, "block", block_structure=[rows, size])
        return "float-quantized", _float(plan.element, "group", group_size=size)
    _, bits = integer_grid(plan.element)
    if bits > 8:
        codes = quantizer.spec.format
        raise Refused(f"no format has the codes of {codes}, and as whole numbers they take {bits} bits, more than 8")
    whole = {"num_bits": bits, "type": "int", "symmetric": not plan.element.zero_point}
    if plan.block is None:
        return "pack-quantized", whole | {"strategy": "channel"}
    return "pack-quantized", whole | {"strategy": "group", "group_size": size}


def _float(element: Element, strategy: str, **rest: Any) -> dict[str, Any]:
    return {"num_bits": element.bits, "type": "float", "symmetric": True, "strategy": strategy, **rest}


def _inputs(quantizer: Quantizer) -> tuple[dict[str, Any] | None, str | None]:
    """(QuantizationArgs, None) of inputs that the format's own rule, the largest magnitude as they come, quantises to
    the same bits; else (None, what is left out)."""
    spec, plan, rule = quantizer.spec, quantizer.plan, quantizer.plan and quantizer.plan.rule
    if plan is None:
        return None, None
    nearest, (rows, size) = plan.rounding == "nearest" and plan.sparsity is None, quantizer.tile
    if nearest and rows == 1 and plan.element == E4M3 and plan.scale_kind == "float32" and rule == "absmax":
        if plan.block is not None:
            return _float(plan.element, "group", group_size=size, dynamic=True), None
        return _float(plan.element, "tensor" if plan.whole else "token", dynamic=True), None
    if nearest and spec.format == "mxfp4" and rule == "even":
        return _float(plan.element, "group", group_size=size, scale_dtype="torch.uint8", dynamic=True), None
    return None, f"the format does not say how the inputs are quantised ({quantizer}): a reader leaves them as they are"


# -------------------------------------------------------------------------------------------------------------- tensors


def pack(weight: Codes, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors of a layer by the names that the format's compressor gives them."""
    if scheme.format == "nvfp4-pack-quantized":
        return _packed_fp4(weight) | {
            "weight_scale": _row_scales(weight).to(torch.float8_e4m3fn),
            "weight_global_scale": _reciprocal(weight.line_scale),
        }
    if scheme.format in MX.values():
        return _packed_mx(weight, scheme.format) | {"weight_scale": e8m0_bits(_row_scales(weight))}
    scale = _float32_scale(weight, scheme.weights["strategy"])
    if scheme.format == "float-quantized":
        return {"weight": weight.codes.to(torch.float8_e4m3fn), "weight_scale": scale}
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    unit, bits = integer_grid(_element(weight.layout))
    zeros = {}
    if weight.zero_point is not None:
        zeros = {"weight_zero_point": pack_to_int32(weight.signed_zero_points(), bits, packed_dim=0)}
    return zeros | {
        "weight_packed": pack_to_int32(weight.integers(), bits),
        "weight_scale": (scale * unit).to(_scale_dtype(weight.layout) if unit == 1.0 else torch.float32),
        "weight_shape": torch.tensor(weight.codes.shape),
    }


def _packed_mx(weight: Codes, format: str) -> dict[str, Tensor]:
    if format == "mxfp8-quantized":
        return {"weight": weight.codes.to(torch.float8_e4m3fn)}
    if format == "mxfp4-pack-quantized":
        return _packed_fp4(weight)
    from compressed_tensors.compressors.mxfp6.helpers import pack_fp6_to_uint8

    return {"weight_packed": pack_fp6_to_uint8(weight.codes)}


def _packed_fp4(weight: Codes) -> dict[str, Tensor]:
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8

    return {"weight_packed": pack_fp4_to_uint8(weight.codes)}


def _row_scales(weight: Codes) -> Tensor:
    scales = weight.row_scales()
    assert scales is not None
    return scales


def _reciprocal(scale: Tensor | None) -> Tensor:
    """(1,) float32: by what the format divides its block scales. A reciprocal is rounded; of the float32 beside it, the
    one whose own reciprocal is nearest to the scale. A zero matrix has any."""
    assert scale is not None
    if scale == 0:
        return torch.ones(1)
    first = (1.0 / scale.double()).float().view(())
    beside = [torch.nextafter(first, first * factor) for factor in (0.5, 1.0, 2.0)]
    return min(beside, key=lambda found: abs(1.0 / found - scale).item()).view(1)


def _float32_scale(weight: Codes, strategy: str) -> Tensor:
    """As the strategy lays it out, the row's scale multiplied in: exact, since the other is a power of two."""
    blocks = weight.block_scale if strategy == "block" else weight.row_scales()
    if blocks is None:
        assert weight.line_scale is not None
        scale = weight.line_scale.float().reshape(-1, 1)
        return scale.view(1) if strategy == "tensor" else scale.expand(weight.codes.shape[0], 1).contiguous()
    return blocks if weight.line_scale is None else blocks * weight.line_scale


def _scale_dtype(layout: Layout) -> torch.dtype:
    assert layout.plan is not None
    return SCALE_DTYPES.get(layout.plan.scale_kind, torch.float32)


def _element(layout: Layout) -> Element:
    assert layout.plan is not None
    return layout.plan.element


# ---------------------------------------------------------------------------------------------------------- config.json


def _config(layers: dict[str, QuantLinear], schemes: dict[str, Scheme], sizes: dict[str, torch.Size]) -> dict[str, Any]:
    """quantization_config, as compressed-tensors writes it."""
    from compressed_tensors import __version__
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.transform import TransformConfig

    kinds: list[Scheme] = [s for i, s in enumerate(schemes.values()) if s not in list(schemes.values())[:i]]
    targets = {i: [module_of(name) for name in layers if schemes[name] == kind] for i, kind in enumerate(kinds)}
    ignore = left_out(layers, sizes)
    if len(kinds) == 1:
        targets = {0: ["Linear"]}
    groups = {
        f"group_{i}": {
            "targets": targets[i],
            "weights": kind.weights,
            "input_activations": kind.inputs,
            "format": kind.format,
        }
        for i, kind in enumerate(kinds)
    }
    quantization = QuantizationConfig.model_validate(
        {
            "config_groups": groups,
            "format": kinds[0].format if len({kind.format for kind in kinds}) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "ignore": ignore,
        }
    )
    rotations = {
        f"rotation_{i}": {
            "type": "hadamard",
            "head_dim": kind.rotation or None,
            "apply": [{"targets": targets[i], "location": "input", "ignore": ignore}],
        }
        for i, kind in enumerate(kinds)
        if kind.rotation is not None
    }
    transform = (
        TransformConfig.model_validate({"config_groups": rotations}).model_dump(mode="json") if rotations else {}
    )
    return {
        **quantization.model_dump(mode="json"),
        "version": __version__,
        "sparsity_config": {},
        "transform_config": transform,
    }
