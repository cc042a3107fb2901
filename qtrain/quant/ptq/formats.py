"""Which minifloats a layer multiplies: of its bits, how many are exponent. Source: LLM-FP4, arXiv 2310.16836."""

from __future__ import annotations

from typing import Any

from qtrain.config.recipe import LinearRecipe, QuantSpec
from qtrain.config.settings import parse
from qtrain.quant.functional import Numerics
from qtrain_kernels.formats import Element

MOST_EXPONENT_BITS = 5  # that an element has


def exponent_bits(element: Element) -> int:
    """ValueError for codes that are no minifloats."""
    if element.mantissa_bits is None:
        raise ValueError("its codes are no minifloats")
    return element.bits - 1 - element.mantissa_bits


def minifloats(spec: QuantSpec) -> list[str]:
    """The formats of as many bits as that of an operand, in the same blocks and under scales of the same format: of
    every split of the bits into exponent and mantissa, the operand's own first. That alone where the operand is not
    quantised. ValueError for a format whose codes are no minifloats."""
    fmt = spec.number_format
    if fmt is None:
        return ["none"]
    try:
        own, bits = exponent_bits(fmt.element), fmt.element.bits
    except ValueError as error:
        raise ValueError(
            f"exponent bits are chosen of minifloats, and of {fmt.name} {error}; take a format in FP4, FP6 or FP8, as "
            "recipe=zeroquant_fp has them, or another method"
        ) from None
    block = fmt.block if fmt.rows == 1 else f"{fmt.rows}x{fmt.block}"
    others = [n for n in range(1, min(MOST_EXPONENT_BITS, bits - 1) + 1) if n != own]
    return [str(spec.format), *(f"e{n}m{bits - 1 - n}/{block}/{fmt.scale}" for n in others)]


def in_all_minifloats(numerics: Numerics) -> dict[str, list[Numerics]]:
    """By each format that the weights of fprop could have, the numerics with each that its inputs could have: see
    `minifloats`. ValueError where there is no choice; UserError for a scale rule that another format does not have."""
    x, w = (minifloats(side.spec) for side in (numerics.fprop.left, numerics.fprop.right))
    return {weights: [with_formats(numerics, inputs, weights) for inputs in x] for weights in w}


def with_formats(numerics: Numerics, x: str, w: str) -> Numerics:
    """Those of a recipe whose forward has these formats of inputs and weights, and each operand names its own."""
    if (x, w) == (numerics.fprop.left.spec.format, numerics.fprop.right.spec.format):
        return numerics
    gemms: dict[str, Any] = {
        gemm: {name: spec.model_dump() for name, spec in specs.items()}
        for gemm, specs in numerics.recipe.operands().items()
    }
    gemms["fprop"]["x"]["format"], gemms["fprop"]["w"]["format"] = x, w
    recipe = parse(LinearRecipe, {"name": numerics.recipe.name, **gemms})
    return Numerics.build(recipe, numerics.backend, numerics.gemm)
