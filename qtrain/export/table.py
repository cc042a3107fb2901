"""Which recipe goes out in which format, and why the others are refused: asked of the exports themselves."""

from __future__ import annotations

from collections.abc import Callable

from qtrain.config.recipe import read_recipe
from qtrain.export import compressed_tensors, gguf
from qtrain.export.trained import Refused
from qtrain.quant import recipes
from qtrain.quant.functional import Numerics

HEAD = ("recipe", "compressed-tensors", "GGUF")


def places(recipe: str) -> tuple[str, str]:
    """What compressed-tensors and GGUF make of the quantised layers of a shipped recipe."""
    settings = read_recipe(recipe)
    if settings.fprop is None:
        return "it quantises nothing", "`BF16`"
    numerics = Numerics.build(settings, "reference")
    return _or_reason(_compressed, numerics), _or_reason(lambda found: f"`{gguf.kind_of(found)}`", numerics)


def _or_reason(say: Callable[[Numerics], str], numerics: Numerics) -> str:
    try:
        return say(numerics)
    except Refused as reason:
        return str(reason)


def _compressed(numerics: Numerics) -> str:
    scheme = compressed_tensors.scheme_of(numerics)
    bits = f", {scheme.weights['num_bits']} bits" if scheme.format == "pack-quantized" else ""
    zeros = "" if scheme.weights["symmetric"] else ", zero points"
    rotation = ", inputs rotated" if scheme.rotation is not None else ""
    inputs = ", inputs quantised" if scheme.inputs is not None else ""
    return f"`{scheme.format}`{bits}{zeros}{rotation}{inputs}"


def markdown() -> str:
    """The table of all shipped recipes, one row for those that go to the same places."""
    rows: dict[tuple[str, str], list[str]] = {}
    for recipe in recipes():
        rows.setdefault(places(recipe), []).append(f"`{recipe}`")
    lines = [HEAD, ("---",) * 3, *((", ".join(names), *found) for found, names in sorted(rows.items()))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
