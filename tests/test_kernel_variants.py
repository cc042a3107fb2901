"""Triton's kernels compile for compute capability 9.0 without a GPU: the main ones in the default suite, every variant
that tests/test_triton.py launches in the slow one."""

import ast
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from qtrain_kernels import triton_few_rows, triton_quantize
from qtrain_kernels.formats import Element
from qtrain_kernels.gpu import Form, Job, Turn
from qtrain_kernels.gpu_few_rows import FewJob, SumJob
from qtrain_kernels.plans import ScaleRule

ROOT = Path(__file__).parents[1]

# One matrix along each dim by each kind of scale, rounding and mask, and every other kernel; nothing is launched.
MAIN = """
import fake_driver
fake_driver.install()
import torch
from test_triton import KEY, MATRIX_PLANS, NVFP4, MXFP4, layout, rotation_of, weight_of
from qtrain_kernels import gpu, gpu_few_rows, reference
from qtrain_kernels.qtensor import Side

x, rotation = torch.zeros(256, 256, dtype=torch.bfloat16), rotation_of(32, True)
for number, (name, plan) in enumerate(MATRIX_PLANS.items()):
    storage = "packed" if name == "mxfp4" else "bfloat16"
    gpu.quantize(x, Side(layout(plan, x, (-1, -2)[number % 2], storage), rotation, KEY, packed=name != "mxfp4"))
gpu.quantize_both(x, Side(layout(MXFP4, x, -1, "float8_128"), rotation), Side(layout(NVFP4, x, -2, "bfloat16")))
spans = x.view(-1, 32, 1)
mask = torch.ones(spans.shape, dtype=torch.uint8)
gpu.unrotate(spans, rotation, mask, torch.bfloat16)
packed = reference.pack(spans, torch.ones(spans.shape[0], 1, 1), MXFP4)
gpu.unpack(packed, spans.shape, MXFP4, torch.bfloat16)
for rows, name in ((1, "int4_sym/32/float16"), (64, "nvfp4"), (3, "int2_sym/16/float16")):
    gpu_few_rows.FewRows(weight_of(torch.ones(64, 1024), name, "cpu"))(x[0].repeat(rows, 4))
print(*sorted(fake_driver.launches.items()), sum(fake_driver.launches.values()))
"""


# What the names of constants stand for in compiled functions.
CONSTANTS = {
    "JOB": (Job, Turn, FewJob, SumJob), "FORM": (Form, FewJob), "RULE": (ScaleRule,), "ELEMENT": (Element,),
    "GRID": (Element,),
}  # fmt: skip


def types_of(kind: type) -> dict[str, object]:
    """The types of its fields and properties."""
    getters = {name: each.fget for name, each in vars(kind).items() if isinstance(each, property)}
    return get_type_hints(kind) | {name: get_type_hints(getter)["return"] for name, getter in getters.items()}


def fields_handed_on(source: str) -> Iterator[tuple[str, list[Any]]]:
    """Each field of a constant that is an argument of a call to another compiled function; the types that it may be."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    for argument in (each for call in calls if isinstance(call.func, ast.Name) for each in call.args):
        root, *names = ast.unparse(argument).split(".")
        if isinstance(argument, ast.Attribute) and root in CONSTANTS:
            types: list[Any] = list(CONSTANTS[root])
            for name in names:
                types = [found[name] for found in map(types_of, types) if name in found]
            yield ast.unparse(argument), types


def test_compiled_functions_hand_on_numbers_alone() -> None:
    """Triton 3.6 takes a string or an object as an argument only by a name that is declared tl.constexpr; later ones
    take it in any way."""
    handed = [
        found for module in (triton_quantize, triton_few_rows) for found in fields_handed_on(inspect.getsource(module))
    ]
    assert len(handed) > 5 and all(types for _, types in handed)
    assert [text for text, types in handed if not set(types) <= {int, float, bool}] == []


def environment() -> dict[str, str]:
    """Without the interpreter, and with all of our folders."""
    folders = (ROOT, ROOT / "kernels", ROOT / "kernels" / "bench", ROOT / "tests")
    paths = {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | paths


def test_the_main_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MAIN],
        env=environment() | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = {path.stem for path in tmp_path.rglob("*.cubin")}
    kernels = {"quantize", "quantize_both", "rotate", "amax", "unpack", "few_rows", "sum"}
    assert compiled == {f"{name}_kernel" for name in kernels}
    assert len(list(tmp_path.rglob("*.cubin"))) == 18, done.stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_variant_of_the_tests_compiles_for_a_gpu() -> None:
    command = [sys.executable, str(ROOT / "tests" / "kernel_variants.py")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " 0 failed" in done.stdout
