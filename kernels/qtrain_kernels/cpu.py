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
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._subclasses.fake_tensor import FakeTensor

from qtrain_kernels import reference
from qtrain_kernels.formats import Element
from qtrain_kernels.reference import Packed, Plan, Rotation

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = (
    "-std=c++17", "-O2", "-ftree-vectorize", "-march=native", "-ffp-contract=off", "-fno-math-errno",
    "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC",
)  # fmt: skip
GCC_FLAGS = ("-fvect-cost-model=dynamic", "-Wno-psabi")
LONGEST = 2**14  # elements of a line in a tile, sixteen of which must stay in cache; beyond, the reference
CHUNK = 64  # elements of a line in a tile, where neither blocks nor a rotation say how many
GRAIN = 32768  # elements that are worth a thread of their own
TYPES = {torch.float32: "float", torch.bfloat16: "uint16_t"}
RESULTS = TYPES | {torch.int8: "int8_t"}
NO_ELEMENT = Element(1.0)


def rotate(x: Tensor, rotation: Rotation | None) -> Tensor:
    """Equals reference.rotate bit for bit."""
    if rotation is None or not _fits(rotation):
        return reference.rotate(x, rotation)
    return _turn(x, rotation, None, torch.float32, backward=False)


def unrotate(x: Tensor, rotation: Rotation | None, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Equals reference.unrotate bit for bit."""
    if rotation is None or not _fits(rotation) or dtype not in TYPES:
        return reference.unrotate(x, rotation, mask, dtype)
    return _turn(x, rotation, mask, dtype, backward=True)


def _turn(x: Tensor, rotation: Rotation, mask: Tensor | None, dtype: torch.dtype, backward: bool) -> Tensor:
    x = _ready(x)
    outer, span, inner = x.shape
    _check_filled(outer * span, rotation.size, x)
    out = _empty(x.shape, dtype)
    passes = None if mask is None else mask.expand(x.shape).contiguous()
    signs = _signs(rotation)
    _rotate(rotation.size, x.dtype, dtype)(
        _at(x), outer * span, inner, _at(passes), _at(signs), int(backward), _at(out), _threads(x)
    )
    return out


def tensor_scale(x: Tensor, plan: Plan, rotation: Rotation | None = None) -> Tensor | float:
    """Equals reference.tensor_scale bit for bit."""
    constant = reference.constant_scale(plan)
    if constant is not None:
        return constant
    if rotation is not None and not _fits(rotation):
        x, rotation = rotate(x, rotation), None
    if plan.scale_kind == "minifloat":
        limit, cap = reference.minifloat_range(plan)
        return reference.finite_or_nan(reference.divide(_amax(x, rotation), limit * cap))
    if plan.per_tensor or x.shape[1] > LONGEST or not x.numel():
        return reference.tensor_scale(rotate(x, rotation), plan)
    x, signs = _ready(x), _signs(rotation)
    outer, length, inner = x.shape
    _check_filled(length, rotation.size if rotation else 1, x)
    scales = _empty((outer, 1, inner), torch.float32)
    line_scales = _line_scales(replace(plan, mask=None, rounding="nearest"), x.dtype, rotation.size if rotation else 0)
    line_scales(_at(x), outer * length, inner, length, _at(signs), _at(scales), _threads(x))
    return scales


def _amax(x: Tensor, rotation: Rotation | None) -> Tensor:
    """() float32: the largest magnitude of x, rotated."""
    if rotation is None:
        low, high = torch.aminmax(x)
        return torch.maximum(low.abs(), high.abs()).float()
    x, signs = _ready(x), _signs(rotation)
    outer, span, inner = x.shape
    _check_filled(outer * span, rotation.size, x)
    found = _empty((), torch.float32)
    _extent(rotation.size, x.dtype)(_at(x), outer * span, inner, _at(signs), _at(found), _threads(x))
    return found


def encode(
    x: Tensor, scale: Tensor | float, key: Tensor | None, plan: Plan, rotation: Rotation | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Equals reference.encode bit for bit."""
    if (plan.span or 1) > LONGEST:
        return reference.encode(x, scale, key, plan, rotation)
    return _run(x, scale, key, plan, torch.float32, rotation, bare=True)


def operand(
    x: Tensor,
    scale: Tensor | float,
    key: Tensor | None,
    plan: Plan,
    dtype: torch.dtype,
    rotation: Rotation | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Equals reference.operand bit for bit."""
    if (plan.span or 1) > LONGEST:
        return reference.operand(x, scale, key, plan, dtype, rotation)
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
    if dtype not in TYPES or (rotation is not None and not _fits(rotation)) or (plan.span or 1) > LONGEST:
        return _composed(x, scale, key, plan, dtype, rotation)
    return _run(x, scale, key, replace(plan, mask=None), dtype, rotation, back=True)[0]


_composed = reference.fake_quantize_by(operand, unrotate)


def pack(values: Tensor, blocks: Tensor | None, plan: Plan) -> Packed:
    """Equals reference.pack bit for bit."""
    if not _packs(plan, values.dtype):
        return reference.pack(values, blocks, plan)
    values, blocks = values.contiguous(), None if blocks is None else blocks.contiguous()
    count, width = values.numel(), reference.field_width(plan.element)
    codes = _empty((-(-count * width // 8),), torch.uint8)
    scales = None if blocks is None else _empty((blocks.numel(),), torch.uint8)
    _pack(reference.grids(plan), values.dtype)(
        _at(values), _at(blocks), count, _at(codes), _at(scales), _threads(values)
    )
    return Packed(codes, scales)


def unpack(packed: Packed, shape: torch.Size, plan: Plan, dtype: torch.dtype) -> Tensor:
    """Equals reference.unpack bit for bit."""
    if not _packs(plan, dtype):
        return reference.unpack(packed, shape, plan, dtype)
    packed = Packed(packed.codes.contiguous(), None if packed.scales is None else packed.scales.contiguous())
    values = _empty(shape, dtype)
    _unpack(reference.grids(plan), dtype)(
        _at(packed.codes), _at(packed.scales), values.numel(), _at(values), _threads(values)
    )
    return values


def join(fields: Tensor, width: int) -> Tensor:
    """Equals reference.join bit for bit."""
    fields = fields.contiguous()
    joined = _empty((-(-fields.numel() * width // 8),), torch.uint8)
    _fields(width).join(_at(fields), fields.numel(), _at(joined), _threads(fields))
    return joined


def split(joined: Tensor, width: int, count: int) -> Tensor:
    """Equals reference.split bit for bit."""
    joined, fields = joined.contiguous(), _empty((count,), torch.uint8)
    _fields(width).split(_at(joined), count, _at(fields), _threads(fields))
    return fields


def _packs(plan: Plan, dtype: torch.dtype) -> bool:
    """Blocks that fill whole bytes, and a stack."""
    block = plan.block or 8
    return dtype in RESULTS and block * reference.field_width(plan.element) % 8 == 0 and block <= LONGEST


def _run(
    x: Tensor,
    scale: Tensor | float,
    key: Tensor | None,
    plan: Plan,
    dtype: torch.dtype,
    rotation: Rotation | None,
    bare: bool = False,
    back: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Values (codes alone if bare; rotated back), block scales and mask."""
    if rotation is not None and not _fits(rotation):
        x, rotation = rotate(x, rotation), None
    x, signs = _ready(x), _signs(rotation)
    outer, span, inner = x.shape
    size = rotation.size if rotation else 1
    height = math.lcm(size, plan.span or 1, {None: 1, "2:4": 4, "4:8": 8}[plan.sparsity])
    if height == 1:
        height = math.gcd(span, CHUNK)
    _check_filled(span if plan.block is None else outer * span, height, x)
    values = _empty(x.shape, dtype)
    blocks = None if plan.block is None else _empty((outer * span // plan.block, 1, inner), torch.float32)
    mask = None if plan.mask is None else _empty(x.shape, torch.uint8)
    scales = torch.as_tensor(scale, dtype=torch.float32, device="cpu").detach()
    if scales.ndim:
        scales = scales.expand(outer, 1, inner).contiguous()
    words = key.tolist() if key is not None and plan.rounding != "nearest" else (0, 0)
    _quantize(plan, x.dtype, dtype, rotation.size if rotation else 0)(
        _at(x), outer * span, span, inner, height, _at(signs), _at(scales), int(scales.ndim > 0),
        *(word & 0xFFFFFFFF for word in words), _at(values), _at(blocks), _at(mask), int(bare), int(back),
        _threads(x),
    )  # fmt: skip
    return values, blocks, mask


def _fits(rotation: Rotation) -> bool:
    return rotation.base is None and rotation.size <= LONGEST


def _check_filled(length: int, height: int, x: Tensor) -> None:
    if length % height:
        raise ValueError(f"x must fill blocks and rotations of {height}; got {tuple(x.shape)}; pad it with zeros")


def _ready(x: Tensor) -> Tensor:
    """Contiguous float32 or bfloat16, without a graph."""
    return (x if x.dtype in TYPES else x.float()).detach().resolve_neg().contiguous()


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")  # whatever the defaults are


def _signs(rotation: Rotation | None) -> Tensor | None:
    return None if rotation is None or rotation.signs is None else rotation.signs.float().contiguous()


def _at(tensor: Tensor | None) -> int | None:
    """The address for C++. ValueError for a tensor without memory."""
    if tensor is None:
        return None
    address = 0 if isinstance(tensor, FakeTensor) else tensor.data_ptr()
    if not address and tensor.numel():
        raise ValueError(f"{type(tensor).__name__} on {tensor.device} has no memory; ask for backend 'reference'")
    return address


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
        integer, integer,
    )  # fmt: skip
    return function


@cache
def _line_scales(plan: Plan, source: torch.dtype, rotation: int) -> Callable[..., None]:
    """Of a plan without mask or noise, which play no part in it."""
    constants = {"LINE_SCALES": 1, **_types(source, torch.float32), **_rotation(rotation), **_plan(plan)}
    function = _library(_defines(constants)).line_scales
    pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    function.argtypes = (pointer, long, long, long, pointer, pointer, integer)
    return function


@cache
def _pack(plan: Plan, source: torch.dtype) -> Callable[..., None]:
    function = _library(_defines(_packing(plan, source))).pack
    pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    function.argtypes = (pointer, pointer, long, pointer, pointer, integer)
    return function


@cache
def _unpack(plan: Plan, result: torch.dtype) -> Callable[..., None]:
    function = _library(_defines(_packing(plan, result))).unpack
    pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    function.argtypes = (pointer, pointer, long, pointer, integer)
    return function


def _packing(plan: Plan, dtype: torch.dtype) -> dict[str, object]:
    nan = len(plan.scale_element.magnitudes()) if plan.scale_element else 0xFF
    bits = {"BITS": plan.element.bits, "WIDTH": reference.field_width(plan.element), "SCALE_NAN": nan}
    types = {"Input": RESULTS[dtype], "Output": RESULTS[dtype]}
    return {"PACK": 1, **types, **_rotation(0), **_plan(plan), **bits}


@cache
def _fields(width: int) -> ctypes.CDLL:
    constants = {"FIELDS": 1, "WIDTH": width, **_types(torch.float32, torch.float32), **_rotation(0)}
    library = _library(_defines(constants))
    pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.join.argtypes = (pointer, long, pointer, integer)
    library.split.argtypes = (pointer, long, pointer, integer)
    return library


@cache
def _extent(size: int, source: torch.dtype) -> Callable[..., None]:
    function = _library(_defines({"EXTENT": 1, **_types(source, torch.float32), **_rotation(size)})).extent
    pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    function.argtypes = (pointer, long, long, pointer, pointer, integer)
    return function


def _types(source: torch.dtype, result: torch.dtype) -> dict[str, object]:
    return {"Input": TYPES[source], "Output": RESULTS[result]}


def _rotation(size: int) -> dict[str, object]:
    return {"ROTATION": size, "NORM": _float(size**-0.5 if size else 1.0)}


def _plan(plan: Plan) -> dict[str, object]:
    """A plan as the constants of cpu.cpp."""
    exponent = reference.exponent_rule(plan) if plan.scale_kind == "e8m0" else reference.Exponent("amax")
    limit = reference.minifloat_range(plan)[0] if plan.scale_kind == "minifloat" else 1.0
    unit, offset = reference.stored_integer(plan.element)
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
        "UNIT": _float(unit),
        "OFFSET": _float(offset),
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
        _float(element.max), int(minifloat), element.mantissa_bits or 0, element.min_exponent,
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
                lines = result.stderr.strip().splitlines() or ["it says nothing"]
                first = next((line for line in lines if "error" in line), lines[0])
                raise RuntimeError(f"{' '.join(command)} cannot build cpu.cpp ({first})")
            made.replace(path)  # another process may have made the same
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise RuntimeError(f"cannot load {path} ({error}); delete it, or set TORCHINDUCTOR_CACHE_DIR") from None


def compiler() -> str:
    """The system's C++ compiler. RuntimeError where there is none."""
    from torch._inductor import cpp_builder, exc

    try:
        return cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise RuntimeError("no C++ compiler was found; install g++ or set CXX") from None


def flags() -> tuple[str, ...]:
    """Of GCC, or of clang."""
    own = () if "clang" in _version(compiler()) else GCC_FLAGS
    wide = ("-mprefer-vector-width=512",) if platform.machine().lower() in ("x86_64", "amd64") else ()
    return FLAGS + own + wide


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
