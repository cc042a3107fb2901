"""The operations of reference.py on CPU, by C++ that is compiled for one plan at its first use (cpu.cpp).

The compiler is the system's (CXX, or g++), the result is kept in torch's own cache of compiled code. Equal to the
reference bit for bit, rotations included; a rotation whose order is no power of two is taken from the reference.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import platform
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import cache_dir

from qtrain_kernels import reference
from qtrain_kernels.formats import Element
from qtrain_kernels.reference import Plan, Rotation

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = (
    "-std=c++17", "-O2", "-fvect-cost-model=dynamic", "-march=native", "-ffp-contract=off", "-fno-math-errno",
    "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi",
)  # fmt: skip
CHUNK = 64  # elements of a line in a tile, where neither blocks nor a rotation say how many
GRAIN = 32768  # elements that are worth a thread of their own
TYPES = {torch.float32: "float", torch.bfloat16: "uint16_t"}
NO_ELEMENT = Element(1.0)


def rotate(x: Tensor, rotation: Rotation | None) -> Tensor:
    """Equals reference.rotate bit for bit."""
    if rotation is None or rotation.base is not None:
        return reference.rotate(x, rotation)
    return _turn(x, rotation, None, torch.float32, backward=False)


def unrotate(x: Tensor, rotation: Rotation | None, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Equals reference.unrotate bit for bit."""
    if rotation is None or rotation.base is not None or dtype not in TYPES:
        return reference.unrotate(x, rotation, mask, dtype)
    return _turn(x, rotation, mask, dtype, backward=True)


def _turn(x: Tensor, rotation: Rotation, mask: Tensor | None, dtype: torch.dtype, backward: bool) -> Tensor:
    x = _ready(x)
    out = torch.empty_like(x, dtype=dtype)
    function = _rotate(rotation.size, x.dtype, dtype)
    rows, inner = x.shape[0] * x.shape[1], x.shape[2]
    passes = None if mask is None else mask.contiguous()
    signs = _signs(rotation)
    function(_at(x), rows, inner, _at(passes), _at(signs), int(backward), _at(out), _threads(x))
    return out


def tensor_scale(x: Tensor, plan: Plan, rotation: Rotation | None = None) -> Tensor | float:
    """Equals reference.tensor_scale bit for bit."""
    constant = reference.constant_scale(plan)
    if constant is not None:
        return constant
    if plan.per_tensor or (rotation is not None and rotation.base is not None) or not x.numel():
        return reference.tensor_scale(rotate(x, rotation), plan)
    x, signs = _ready(x), _signs(rotation)
    outer, length, inner = x.shape
    library = _tensor_scale(replace(plan, mask=None, rounding="nearest"), x.dtype, rotation.size if rotation else 0)
    if plan.scale_kind == "minifloat":
        found = torch.empty((), dtype=torch.float32)
        height = rotation.size if rotation else math.gcd(outer * length, CHUNK)
        library.extent(_at(x), outer * length, inner, height, _at(signs), _at(found), _threads(x))
        limit, cap = reference.minifloat_range(plan)
        return reference.finite_or_nan(reference.divide(found, limit * cap))
    scales = torch.empty(outer, 1, inner)
    library.line_scales(_at(x), outer * length, inner, length, _at(signs), _at(scales), _threads(x))
    return scales


def encode(
    x: Tensor, scale: Tensor | float, key: Tensor | None, plan: Plan, rotation: Rotation | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Equals reference.encode bit for bit."""
    blocks = None
    if plan.block is not None:
        blocks = torch.empty(x.shape[0] * x.shape[1] // plan.block, 1, x.shape[2])
    codes, mask = _run(x, scale, key, plan, torch.float32, rotation, blocks=blocks)
    return codes, blocks, mask


def operand(
    x: Tensor,
    scale: Tensor | float,
    key: Tensor | None,
    plan: Plan,
    dtype: torch.dtype,
    rotation: Rotation | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Equals reference.operand bit for bit."""
    return _run(x, scale, key, plan, dtype, rotation)


def fake_quantize(
    x: Tensor,
    scale: Tensor | float,
    key: Tensor | None,
    plan: Plan,
    dtype: torch.dtype,
    rotation: Rotation | None = None,
) -> Tensor:
    """Equals reference.fake_quantize bit for bit."""
    if dtype not in TYPES or (rotation is not None and rotation.base is not None):
        values, _ = operand(x, scale, key, plan, torch.float32, rotation)
        return unrotate(values * scale, rotation, None, dtype)
    return _run(x, scale, key, replace(plan, mask=None), dtype, rotation, back=True)[0]


def _run(
    x: Tensor,
    scale: Tensor | float,
    key: Tensor | None,
    plan: Plan,
    dtype: torch.dtype,
    rotation: Rotation | None,
    blocks: Tensor | None = None,
    back: bool = False,
) -> tuple[Tensor, Tensor | None]:
    if rotation is not None and rotation.base is not None:
        x, rotation = rotate(x, rotation), None
    x, signs = _ready(x), _signs(rotation)
    outer, span, inner = x.shape
    size = rotation.size if rotation else 1
    height = math.lcm(size, plan.span or 1, 8 if plan.sparsity else 1)
    if height == 1:
        height = math.gcd(span, CHUNK)
    values = torch.empty(x.shape, dtype=dtype)
    mask = None if plan.mask is None else torch.empty(x.shape, dtype=torch.uint8)
    scales = scale.detach().contiguous() if isinstance(scale, Tensor) else torch.full((), scale)
    words = (0, 0) if key is None else key.tolist()
    _quantize(plan, x.dtype, dtype, rotation.size if rotation else 0)(

        _at(x), outer * span, span, inner, height, _at(signs), _at(scales), int(scales.ndim > 0),
        *(word & 0xFFFFFFFF for word in words), _at(values), _at(blocks), _at(mask), int(back), _threads(x),
    )  # fmt: skip
    return values, mask


def _ready(x: Tensor) -> Tensor:
    """Contiguous float32 or bfloat16, without a graph."""
    return (x if x.dtype in TYPES else x.float()).detach().contiguous()


def _signs(rotation: Rotation | None) -> Tensor | None:
    return None if rotation is None or rotation.signs is None else rotation.signs.contiguous()


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _threads(x: Tensor) -> int:
    return max(1, min(torch.get_num_threads(), x.numel() // GRAIN))


# ----------------------------------------------------------------------------------------------------------- compiling


@cache
def _rotate(size: int, source: torch.dtype, result: torch.dtype) -> Callable[..., None]:
    constants = {"ROTATE": 1, **_types(source, result), **_rotation(size)}
    function = _library(_defines(constants)).rotate
    pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    function.argtypes = (pointer, long, long, pointer, pointer, integer, pointer, integer)
    return function


@cache
def _quantize(plan: Plan, source: torch.dtype, result: torch.dtype, rotation: int) -> Callable[..., None]:
    constants = {"QUANTIZE": 1, **_types(source, result), **_rotation(rotation), **_plan(plan)}
    function = _library(_defines(constants)).quantize
    pointer, long, word, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint32, ctypes.c_int
    function.argtypes = (
        pointer, long, long, long, long, pointer, pointer, integer, word, word, pointer, pointer, pointer, integer,
        integer,
    )  # fmt: skip
    return function


@cache
def _tensor_scale(plan: Plan, source: torch.dtype, rotation: int) -> ctypes.CDLL:
    """Of a plan without mask or noise, which play no part in it."""
    constants = {"TENSOR_SCALE": 1, **_types(source, torch.float32), **_rotation(rotation), **_plan(plan)}
    library = _library(_defines(constants))
    pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.line_scales.argtypes = library.extent.argtypes = (pointer, long, long, long, pointer, pointer, integer)
    return library


def _types(source: torch.dtype, result: torch.dtype) -> dict[str, object]:
    return {"Input": TYPES[source], "Output": TYPES[result]}


def _rotation(size: int) -> dict[str, object]:
    return {"ROTATION": size, "NORM": _float(size**-0.5 if size else 1.0)}


def _plan(plan: Plan) -> dict[str, object]:
    """A plan as the constants of cpu.cpp."""
    exponent = reference.exponent_rule(plan) if plan.scale_kind == "e8m0" else reference.Exponent("amax")
    limit = reference.minifloat_range(plan)[0] if plan.scale_kind == "minifloat" else 1.0
    special = {"gaussian", "mse_phase", "absmean", "sawb", "four_over_six"}
    return {
        "PLAN_ELEMENT": _grid(plan.element),
        "PLAN_SCALE": _grid(plan.scale_element or NO_ELEMENT),
        "PLAN_KIND": plan.scale_kind.upper(),
        "PLAN_RULE": plan.rule.upper() if plan.rule in special else "OTHER",
        "PLAN_MAGNITUDE": exponent.magnitude.upper(),
        "PLAN_MASK": plan.mask.kind.upper() if plan.mask else "NONE",
        "MASK_LIMIT": _float(plan.mask.limit if plan.mask else 0.0),
        "INCREMENT": exponent.increment,
        "SHIFT": exponent.shift,
        "DIVISOR": _float(exponent.divisor),
        "SEARCH": int(exponent.search),
        "BLOCK": plan.block or 0,
        "LIMIT": _float(limit),
        "HEADROOM": _float(reference.HEADROOM if plan.rule == "floor_three_quarters" else 1.0),
        "STOCHASTIC": int(plan.rounding == "stochastic"),
        "CORRECTION": plan.correction // plan.block if plan.correction and plan.block else 0,
        "SPARSE": int(plan.sparsity is not None),
        "PAIR": 2 if plan.sparsity == "4:8" else 1,
        "STD_EPS": _float(reference.STD_EPS),
        "ABSMEAN_EPS": _float(reference.ABSMEAN_EPS),
        "PHASE": _float(1.0 / reference.BEST_PHASE),
        "SAWB_RMS": _float(reference.SAWB[0]),
        "SAWB_MEAN": _float(reference.SAWB[1]),
    }


def _grid(element: Element) -> str:
    minifloat = element.mantissa_bits is not None
    fields = (
        _float(element.max), int(minifloat), element.mantissa_bits or 0, element.min_exponent, element.max_exponent,
        _float(element.step), _float(element.offset), _float(element.gaussian or 0.0),
    )  # fmt: skip
    return f"{{{', '.join(map(str, fields))}}}"


def _float(value: float) -> str:
    """The float32 nearest to value, as C++ reads it exactly."""
    return f"{ctypes.c_float(value).value.hex()}f"


def _defines(constants: dict[str, object]) -> str:
    return "".join(f"#define {name} {value}\n" for name, value in constants.items())


@cache
def _library(defines: str) -> ctypes.CDLL:
    """The compiled code of these constants; made, or found in the cache."""
    source = defines + SOURCE.read_text()
    command = [compiler(), *flags()]
    key = hashlib.sha256("\0".join((source, *command, _version(command[0]), _processor())).encode()).hexdigest()[:32]
    folder = Path(cache_dir()) / "qtrain"
    path = folder / f"{key}.so"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            text, made = Path(work) / "code.cpp", Path(work) / "code.so"
            text.write_text(source)
            result = subprocess.run([*command, str(text), "-o", str(made)], capture_output=True, text=True, check=False)
            if result.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}\nask for backend 'reference'")
            made.replace(path)  # another process may have made the same
    return ctypes.CDLL(str(path))


def compiler() -> str:
    """The system's C++ compiler. RuntimeError where there is none."""
    from torch._inductor import cpp_builder, exc

    try:
        return cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise RuntimeError("no C++ compiler was found; install g++ or set CXX") from None


def flags() -> tuple[str, ...]:
    wide = ("-mprefer-vector-width=512",) if platform.machine().lower() in ("x86_64", "amd64") else ()
    return FLAGS + wide


@cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


@cache
def _processor() -> str:
    """What -march=native depends on: a home folder may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
