"""List the recipes: the number formats of the forward and the backward, and the source of each.

qtrain recipes             all of them
qtrain recipes quartet     what each operand of one goes through, and where it differs from its source

A recipe of your own is a YAML file like these: qtrain recipes my.yaml. Formats have names (mxfp4, nvfp4, mxfp6_e3m2,
mxfp8_e4m3, fp8_e4m3, fp8_e5m2, int1.585, int1 to int8), or are written as element/block/scale: e2m1/32/e8m0 is mxfp4,
and int4_sym/32/float16 has whole numbers under a float16 scale for each 32.
"""

from __future__ import annotations

from qtrain.cli import command_parser


def main() -> None:
    parser = command_parser("recipes", __doc__)
    parser.add_argument("recipe", nargs="?", help="a name, or a YAML file")
    name = parser.parse_args().recipe
    print(described(name) if name else listed())


def listed() -> str:
    """A line each: its number formats and its source."""
    from qtrain.config.recipe import read_recipe
    from qtrain.config.settings import group_names

    names = group_names("recipe")
    width = max(map(len, names))
    return "\n".join(f"{name:<{width}}  {read_recipe(name).summary}" for name in names)


def described(name: str) -> str:
    """Of one recipe, operand by operand, what is not left at its default."""
    from qtrain.config.recipe import read_recipe

    recipe = read_recipe(name)
    lines = [f"{recipe.name}: {recipe.summary}"]
    for gemm, operands in recipe.operands().items():
        for operand, spec in operands.items():
            said = ", ".join(f"{key} {value}" for key, value in spec.model_dump(exclude_defaults=True).items())
            lines.append(f"  {gemm}.{operand:<3} {said}")
    return "\n".join([*lines, *(f"  {line}" for line in recipe.provenance)])
