"""What the shipped recipes' Triton kernels are made of, compiled for an H100 (sm_90) without one.

    python kernels/bench/code_size.py
    python kernels/bench/code_size.py --only quartet --out kernels/bench/results/code/layers-triton-3.7.1.json

A linear layer of each recipe runs forward and backward in bfloat16, on sizes whose tiles and alignment are those of
large matrices. Each kernel that it launches is compiled. So are the kernels of Quartet's layer in FP8 (`FLOAT8`), and
those that multiply one row and 64 by a packed weight of each format of bench_few_rows.py (`FEW_ROWS`).
Registers and the bytes that a thread spills are the cubin's own. Shared: bytes of a block.

Instructions: the SASS instructions that a thread executes from its entry to its exit, without NOP, over the elements
that it works on. What only rare operands need is not counted: the slow paths of division and root, which are blocks of
code that are jumped over and contain a call, and what lies behind the exit. Of a kernel with a loop it is those of one
turn, over the elements of a turn. It is a count, no time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import bench_few_rows
import fake_driver
import torch
import triton
from torch import Tensor, nn

import qtrain
from qtrain.config.settings import GemmKind
from qtrain_kernels import gemm as products
from qtrain_kernels import gpu, gpu_few_rows
from qtrain_kernels.formats import Element
from qtrain_kernels.qtensor import QTensor

TOKENS, SIZE = 256, 256  # no tile is larger
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
FLOAT8, FEW_ROWS = "quartet's layer in FP8", "few rows, "
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")

Row = dict[str, Any]
Launch = tuple[Any, tuple[Any, ...], Any]  # kernel, arguments, tile


# ------------------------------------------------------------------------------------------------------------ launches


def noted(run: Callable[[], object]) -> list[Launch]:
    """What this launches; nothing is compiled."""
    found: list[Launch] = []

    def noting(kernel: Any, x: Tensor, tile: Any, *arguments: object, **size: Any) -> None:
        found.append((kernel, (x, *arguments), tile))

    original = gpu.launch
    gpu.launch = noting
    try:
        run()
    finally:
        gpu.launch = original
    return found


def launches(recipe: str, gemm: GemmKind = "auto", sizes: tuple[int, int, int] = (TOKENS, SIZE, SIZE)) -> list[Launch]:
    """What a layer (T tokens, K to N features) of the recipe launches forward and backward."""
    tokens, features, out_features = sizes

    def run() -> None:
        model = nn.Sequential(nn.Linear(features, out_features, bias=False))
        qtrain.convert(model, recipe, backend="triton", gemm=gemm)
        qtrain.set_step(model, 0)
        x = torch.randn(tokens, features, dtype=torch.bfloat16).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            qtrain.calibrate(model, x)
            y = model(x)
        y.backward(torch.ones_like(y))

    return noted(run)


def few_rows_launches(name: str) -> list[Launch]:
    """What one row, and 64, launch that multiply a packed weight of a format."""
    layout = bench_few_rows.layout_of(name, SIZE, SIZE)
    weight = QTensor.of(layout, [torch.zeros(shape, dtype=dtype) for shape, dtype in layout.shapes()])

    def run() -> None:
        for rows in (1, gpu_few_rows.FEW):
            gpu_few_rows.FewRows(weight)(torch.zeros(rows, SIZE, dtype=torch.bfloat16))

    return noted(run)


def launches_of(name: str) -> list[Launch]:
    """Of a recipe, or of one of the other names that `main` lists."""
    if name == FLOAT8:
        return launches("quartet", "fp8")
    if name.startswith(FEW_ROWS):
        return few_rows_launches(name.removeprefix(FEW_ROWS))
    return launches(name)


def description(kernel: Any, x: Tensor, *arguments: object) -> str:
    """A kernel and all that it was made for, as a reader tells them apart."""
    made_for = [text(each) for each in arguments if is_dataclass(each)]
    rest = [each for each in arguments if isinstance(each, Tensor) or each is None]
    present = "".join("-" if each is None else str(each.dtype)[6] for each in rest)
    return " ".join([kernel.fn.__name__.removesuffix("_kernel"), *made_for, f"of {str(x.dtype)[6:]} {present}"])


def text(made_for: Any) -> str:
    """What sets one job apart from another: its plan, and its fields that are no constants of the plan."""
    parts = []
    for field in fields(made_for):
        value = getattr(made_for, field.name)
        if field.name == "plan":
            parts.append(plan_text(value))
        elif field.name == "dim":
            parts.append("rows" if value == -1 else "columns")
        elif field.name == "few":
            parts.append(f"{value} rows")
        elif field.name == "rotation" and value:
            parts.append(f"hadamard{value}")
        elif field.name == "scales" and value != "none":
            parts.append(str(value))
        elif value is True and field.name not in ("aligned", "inexact", "mask_bits", "clips"):
            parts.append(field.name)
    return " ".join(parts)


def plan_text(plan: Any) -> str:
    scale = {"minifloat": plan.scale_element and element_text(plan.scale_element)}.get(plan.scale_kind, plan.scale_kind)
    block = plan.block or ("tensor" if plan.per_tensor else "row")
    names = [f"{element_text(plan.element)}/{block}/{scale}", str(plan.rule), plan.rounding]
    names += [str(plan.correction)] if plan.correction else []
    names += [plan.mask.kind] if plan.mask else []
    return "-".join([*names, *([plan.sparsity] if plan.sparsity else [])])


def element_text(element: Element) -> str:
    if element.mantissa_bits is None:
        return f"int{element.bits}"
    return f"e{element.bits - 1 - element.mantissa_bits}m{element.mantissa_bits}"


def traffic(sizes: tuple[int, int, int]) -> list[Row]:
    """Bytes that each launch of Quartet's layer in FP8 reads and writes: every tensor once. Its products are left
    out."""
    product = products.TABLE["fp8_block"]

    def empty(left: QTensor, right: QTensor) -> tuple[Tensor, list[Any]]:
        made = torch.empty((left.shape[0], right.shape[1]), dtype=torch.bfloat16)
        return made, products._constants(left, right)

    products.TABLE["fp8_block"] = replace(product, run=empty)
    try:
        found = launches("quartet", "fp8", sizes)
    finally:
        products.TABLE["fp8_block"] = product
    return [
        {
            "launch": description(kernel, *given),
            "MB": round(sum(each.nbytes for each in given if isinstance(each, Tensor)) / 1e6, 1),
        }
        for kernel, given, _ in found
    ]


# ---------------------------------------------------------------------------------------------------------------- code


def measure(launch: Launch) -> Row:
    """Compiles one kernel. Registers, spilled and shared bytes, instructions an element."""
    kernel, arguments, tile = launch
    compiled = kernel[(1,)](*arguments, num_warps=tile.warps, **gpu.UNFUSED)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, code = (_dumped(flag, cubin.name) for flag in ("-res-usage", "-sass"))
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    threads = 32 * tile.warps
    return {
        "tile": f"{tile.rows}x{tile.columns}, {tile.warps}",
        "registers": found["REG"],
        "spilled": found["STACK"] + found["LOCAL"],
        "shared": compiled.metadata.shared,
        "instructions": round(main_path(code) * threads / (tile.rows * tile.columns), 1),
    }


def _dumped(flag: str, path: str) -> str:
    return subprocess.run([TOOLS / "cuobjdump", flag, path], capture_output=True, text=True, check=True).stdout


def main_path(code: str) -> int:
    """Instructions from the entry to the exit of a kernel's SASS, or of one turn of its loop, without the blocks that a
    rare operand needs. Those are jumped over by a branch forward, and contain a call."""
    lines = list(instructions(code))
    calls = {at for at, _, name, _ in lines if name.startswith("CALL")}
    counted: list[int] = []
    beyond = 0
    for at, predicate, name, operands in lines:
        if at < beyond:
            continue
        counted += [at] if name != "NOP" else []
        if name == "EXIT" and not predicate:
            break
        target = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
        if target and any(at < call < int(target[1], 16) for call in calls):
            beyond = int(target[1], 16)
        elif target and int(target[1], 16) <= at:
            return sum(place >= int(target[1], 16) for place in counted)
    return len(counted)


def instructions(code: str) -> Iterator[tuple[int, str | None, str, str]]:
    """(address, predicate, name, operands) of each."""
    for line in code.splitlines():
        match = INSTRUCTION.match(line)
        if match:
            yield int(match[1], 16), match[2], match[3], match[4]


# --------------------------------------------------------------------------------------------------------------- table


def rows(names: list[str]) -> list[Row]:
    """One for each kernel, with the recipes that launch it, or the other names of `launches_of`."""
    users: dict[str, dict[str, None]] = {}  # in the place of ordered sets
    found: dict[str, Launch] = {}
    for user in names:
        try:
            launched = launches_of(user)
        except ValueError as error:
            if not str(error).startswith("backend 'triton'"):  # whose layers it does not compute
                raise
            print(f"{user}: {error}", file=sys.stderr)
            continue
        for kernel, given, tile in launched:
            name = description(kernel, *given)
            users.setdefault(name, {})[user] = None
            found[name] = kernel, given, tile
    table = []
    for name in sorted(found):
        table.append({"kernel": name, **measure(found[name]), "recipes": " ".join(users[name])})
        print(" | ".join(str(each) for each in table[-1].values()), flush=True)
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression: recipes, and others, whose names it finds")
    parser.add_argument("--out", type=Path, help="writes the rows as JSON")
    parser.add_argument(
        "--bytes", metavar="T,K,N", help="of Quartet's layer in FP8 beside its products; compiles nothing"
    )
    options = parser.parse_args()
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path(tempfile.gettempdir()) / "code-size"))
    fake_driver.install()
    if options.bytes:
        tokens, features, out_features = map(int, options.bytes.split(","))
        launched = traffic((tokens, features, out_features))
        print(*(f"{row['MB']:8.1f} MB  {row['launch']}" for row in launched), sep="\n")
        print(f"{sum(row['MB'] for row in launched):8.1f} MB in {len(launched)} launches")
        return 0
    recipes = [name for name in qtrain.recipes() if name != "bf16"]
    names = [FLOAT8, *recipes, *(f"{FEW_ROWS}{name}" for name in bench_few_rows.FORMATS)]
    names = [name for name in names if re.search(options.only, name)]
    found = {"name": "code for sm_90", "triton": triton.__version__, "rows": rows(names)}
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(row["spilled"] for row in found["rows"]))


if __name__ == "__main__":
    sys.exit(main())
