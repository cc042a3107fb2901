"""The operations of reference.py on CPU, by C++ that is compiled for one plan at its first use (cpu.cpp).

The compiler is the system's (CXX, or g++), the result is kept in `qtrain_kernels.kernel_cache`. Equal to the
reference bit for bit, rotations included; a rotation whose order is no power of two is taken from the reference, and so
are codes with a zero point, which are quantised once and unpacked often.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import platform
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from qtrain_kernels import kernel_cache, reference
from qtrain_kernels.checks import (
    check_fields,
    check_key,
    check_mask,
    check_matrix,
    check_packed,
    check_same_device,
    check_signs,
    check_spans,
    check_words,
)
from qtrain_kernels.formats import FLOAT_SCALES, Element
from qtrain_kernels.plans import Knows, Packed, Plan, Rotation, ScaleRule, field_width, grids, scale_nan, stored_integer

if TYPE_CHECKING:
    from qtrain_kernels.qtensor import Layout, Side

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = (
    "-std=c++17", "-O2", "-ftree-vectorize", "-march=native", "-ffp-contract=off", "-fno-math-errno",
    "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC",
)  # fmt: skip
GCC_FLAGS = ("-fvect-cost-model=dynamic", "-Wno-psabi")
WITHOUT = {"AVX2": "-mno-avx512f", "DEFAULT": "-mno-avx"}  # torch's capability of an x86 processor -> what is above it
LONGEST = 2**14  # elements of a line in a tile, of which a vector's lanes must stay in cache; beyond, the reference
CHUNK = 64  # elements of a line in a tile, where neither blocks nor a rotation say how many
GRAIN = 32768  # elements that are worth a thread of their own
TYPES = {torch.float32: "float", torch.bfloat16: "uint16_t"}
RESULTS = TYPES | {torch.int8: "int8_t"}
ARGUMENTS = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "w": ctypes.c_uint32, "i": ctypes.c_int, "f": ctypes.c_float}
NO_ELEMENT = Element(1.0)
FLOAT16 = Element(65504.0, mantissa_bits=10, min_exponent=-14)
KNOWS = Knows(
    "compiled",
    statistics=("amax", "rms", "std", "absmean", "rms_absmean", "range"),
    scales=("e8m0", "minifloat", *FLOAT_SCALES),
    roundings=("nearest", "stochastic"),
    masks=("inside", "within", "error"),
    sparsities=("2:4", "4:8"),
)


join, pack = reference.join, reference.pack
ALL = 0xFFFFFFFF  # of a word, unsigned


def rotate(x: Tensor, rotation: Rotation | None) -> Tensor:
    """Equals reference.rotate bit for bit. ValueError for a device, dtype or shape that it cannot work on, as in all
    that follows."""
    check_spans(x)
    if rotation is None or not _fits(rotation):
        return reference.rotate(x, rotation)
    _check_filled(x, rotation.size)
    return _turn(_ready(x), _signs(rotation), rotation.size)


def unrotate(
    x: Tensor,
    rotation: Rotation | None,
    mask: Tensor | None,
    dtype: torch.dtype,
    scales: Sequence[Tensor | float] = (),
) -> Tensor:
    """Equals reference.unrotate bit for bit."""
    check_spans(x)
    bits = mask is not None and mask.shape != x.shape and mask.numel() == -(-x.numel() // 8)
    turns = rotation is not None and _fits(rotation) and dtype in TYPES
    if mask is not None and bits and not (turns and (x.shape[2] == 1 or x.shape[2] % 8 == 0)):
        mask, bits = split(mask.view(-1), 1, x.numel()).view(x.shape), False
    if mask is not None and bits:
        check_fields(mask, 1, x.numel())
        check_same_device(x, mask=mask)
    else:
        check_mask(mask, x)
    gains = [float(scale) for scale in scales if not isinstance(scale, Tensor) or scale.numel() == 1]
    if len(gains) < len(scales) or len(gains) > 2 or not turns:
        for scale in scales:
            x = x.float() * scale
        gains = []
    if rotation is None or not turns:
        return reference.unrotate(x, rotation, mask, dtype)
    _check_filled(x, rotation.size)
    return _turn(_ready(x), _signs(rotation), rotation.size, dtype, back=True, gains=gains, mask=mask, bits=bits)


def random_signs(n: int, key: Tensor) -> Tensor:
    """Equals reference.random_signs bit for bit, in a tenth of the time of its eighteen small operations."""
    check_words(key)
    signs = _empty((n,), torch.float32)
    _random_signs_function()(n, *(word & ALL for word in key.tolist()), _at(signs))
    return signs


def tensor_scale(x: Tensor, plan: Plan, rotation: Rotation | None = None) -> Tensor | float:
    """Equals reference.tensor_scale bit for bit."""
    check_spans(x)
    KNOWS.check(plan)
    constant = reference.constant_scale(plan)
    if constant is not None:
        return constant
    if rotation is not None and not _fits(rotation):
        x, rotation = rotate(x, rotation), None
    if not x.numel():
        return reference.tensor_scale(x, plan)
    rule = plan.line_rule
    assert rule is not None
    if plan.whole and rule.statistic == "amax":
        return reference.scale_of_amax(_amax(x, rotation), rule)
    if plan.whole or x.shape[1] > LONGEST:
        return reference.tensor_scale(rotate(x, rotation), plan)
    size = 0 if rotation is None else rotation.size
    _check_filled(x, size or 1, x.shape[1])
    return _line_scales(_ready(x), _signs(rotation), size, _scales_alone(plan))


@cache
def _scales_alone(plan: Plan) -> Plan:
    """Without what plays no part in a line's scale, so that plans that differ in it share one library."""
    return replace(plan, mask=None, rounding="nearest")


def _amax(x: Tensor, rotation: Rotation | None) -> Tensor:
    """() float32: the largest magnitude of x, rotated."""
    if rotation is None:
        low, high = torch.aminmax(x)
        return torch.maximum(low.abs(), high.abs()).float()
    _check_filled(x, rotation.size)
    return _extent(_ready(x), _signs(rotation), rotation.size)


FUSED = False


def quantize(x: Tensor, side: Side, back: torch.dtype | None = None) -> list[Tensor | None]:
    """Equals reference.quantize bit for bit. back: the dtype in which values are dequantised and rotated back, which is
    then all that is returned."""
    layout, rotation = side.layout, side.rotation
    plan = layout.plan
    check_matrix(x, layout)
    assert plan is not None
    if plan.element.zero_point:
        return reference.quantize(x, side)
    if rotation is not None and (layout.rows > 1 or rotation.base is not None or rotation.size > LONGEST):
        x, rotation = rotate(layout.whole_lines(x), rotation).view(x.shape), None
    job = _job(layout, x.dtype, 0 if rotation is None else rotation.size, side.packed, back)
    if job is None:
        return reference.quantize(x, replace(side, rotation=rotation))
    if job.draws:
        check_key(side.key, plan, x)
    scale = job.constant if side.learned is None else side.learned
    if scale is None:
        scale = tensor_scale(layout.whole_lines(x), plan, rotation)
    assert isinstance(scale, Tensor)
    ready, scales = _ready(layout.spans(x) if layout.rows > 1 else x), scale.detach().contiguous()
    signs = None if rotation is None or rotation.signs is None else _signs(rotation)
    words = side.key.tolist() if job.draws and side.key is not None else (0, 0)
    made = [torch.empty(part[0], dtype=part[1], device="cpu") if part else None for part in job.parts]
    job.run(
        _at(ready), *job.sizes, _at(signs), _at(scales), int(scales.ndim > 0), words[0] & ALL, words[1] & ALL,
        *map(_at, made), int(job.bare), int(back is not None),
        _threads(ready),
    )  # fmt: skip
    values, blocks, mask, bits, packed, packed_scales = made
    if back is not None:
        return [values.view(x.shape)]  # pyright: ignore[reportOptionalMemberAccess]
    if mask is not None:
        bits = join(layout.unspan(mask), 1)
    found = reference.parts_of(layout, values, blocks, None if scale is job.constant else scale, bits)
    if layout.packed:
        return [packed, packed_scales, *found[2:]]
    return [*found, packed, packed_scales] if side.packed else found


def fake_quantize(x: Tensor, side: Side, dtype: torch.dtype) -> Tensor:
    """Equals reference.fake_quantize bit for bit; without a mask, at once."""
    plan = side.layout.plan
    assert plan is not None
    at_once = side.layout.rows == 1 and (plan.span or 1) <= LONGEST and dtype in TYPES and _fits(side.rotation)
    if plan.mask or plan.element.zero_point or not at_once:
        return reference.fake_quantize_by(quantize, unrotate, x, side, dtype)
    return quantize(x, side, dtype)[0]  # pyright: ignore[reportReturnType]


class Job(NamedTuple):
    """What `quantize` runs for one layout, dtype of x and order of the rotation. sizes: rows, span, inner and height of
    cpu.cpp's quantize; parts: (shape, dtype) of values, block scales, a byte of mask for each element, its bits, packed
    codes and their scales. constant: the tensor scale where x does not decide it. bare: values are codes without their
    block scale."""

    run: Callable[..., None]
    sizes: tuple[int, int, int, int]
    parts: tuple[tuple[tuple[int, ...], torch.dtype] | None, ...]
    constant: Tensor | None
    draws: bool
    bare: bool


@lru_cache(4096)
def _job(layout: Layout, source: torch.dtype, size: int, packed: bool, back: torch.dtype | None) -> Job | None:
    """None for what the reference does: spans of many elements, packed columns. ValueError for a plan that there is no
    code for, and for lines that do not fill their blocks and rotations."""
    plan = layout.plan
    assert plan is not None
    KNOWS.check(plan)
    of_bits = layout.dim == -1 and layout.rows == 1 and layout.shape[1] % 8 == 0  # eight of them in one byte
    if (plan.span or 1) > LONGEST or ((packed or layout.packed) and not of_bits):
        return None
    (lines, length), height, bare = layout.lines, _multiple(plan, size), layout.storage == "float8_128"
    if layout.rows > 1:
        lines, length = math.prod(layout.scale_grid), plan.block or 1
    if length % height:
        raise ValueError(f"x must fill blocks and rotations of {height}; got {layout.shape}; pad it with zeros")
    elements = lines * length
    in_rows = layout.dim == -1 or layout.rows > 1
    rows, inner = (elements, 1) if in_rows else (length, lines)
    height = math.gcd(length, CHUNK) if height == 1 else height
    dtype = back or reference.DTYPES.get(layout.storage, torch.float32)
    constant = None if plan.scale_rule.given else reference.constant_scale(plan)
    codes, scales, *_ = layout.unmasked.stored("packed").parts if packed or layout.packed else (None, None)
    parts = (
        None if layout.packed else ((elements,), dtype),
        ((elements // plan.block,), torch.float32) if plan.block and (layout.blocks or bare) and not back else None,
        ((elements,), torch.uint8) if plan.mask and not back and not of_bits else None,
        ((elements // 8,), torch.uint8) if plan.mask and not back and of_bits else None,
        codes,
        scales,
    )
    return Job(
        _quantize_function(plan, source if source in TYPES else torch.float32, dtype, size),
        (rows, length, inner, height),
        parts,
        None if constant is None else torch.tensor(constant, dtype=torch.float32, device="cpu"),
        plan.rounding_mode.draws,
        bare,
    )


def _multiple(plan: Plan, rotation: int) -> int:
    """What a line's length must be a multiple of."""
    return math.lcm(rotation or 1, plan.span or 1, {None: 1, "2:4": 4, "4:8": 8}[plan.sparsity])


def unpack(packed: Packed, shape: torch.Size, plan: Plan, dtype: torch.dtype) -> Tensor:
    """Equals reference.unpack bit for bit."""
    check_packed(packed, shape, plan)
    if not _packs(plan, dtype):
        return reference.unpack(packed, shape, plan, dtype)
    codes, scales = packed.codes.contiguous(), None if packed.scales is None else packed.scales.contiguous()
    zeros = None if packed.zero_points is None else packed.zero_points.contiguous()
    values = _empty(shape, dtype)
    unpack_ = _unpack_function(grids(plan), dtype)
    unpack_(_at(codes), _at(scales), _at(zeros), values.numel(), _at(values), _threads(values))
    return values


def split(joined: Tensor, width: int, count: int) -> Tensor:
    """Equals reference.split bit for bit."""
    check_fields(joined, width, count)
    joined, fields = joined.contiguous(), _empty((count,), torch.uint8)
    _split_function(width)(_at(joined), count, _at(fields), _threads(fields))
    return fields


def _packs(plan: Plan, dtype: torch.dtype) -> bool:
    """Blocks that fill whole bytes, and a stack."""
    block = plan.block or 8
    return dtype in RESULTS and block * field_width(plan.element) % 8 == 0 and block <= LONGEST


def _fits(rotation: Rotation | None) -> bool:
    return rotation is None or (rotation.base is None and rotation.size <= LONGEST)


def _check_filled(x: Tensor, height: int, length: int | None = None) -> None:
    """length: of a line, or else all of the spans one after the other."""
    if (x.shape[0] * x.shape[1] if length is None else length) % height:
        raise ValueError(f"x must fill blocks and rotations of {height}; got {tuple(x.shape)}; pad it with zeros")


def _ready(x: Tensor) -> Tensor:
    """float32 or bfloat16, contiguous, without a graph, with the memory that its values say."""
    return (x if x.dtype in TYPES else x.float()).detach().resolve_neg().contiguous()


def _signs(rotation: Rotation | None) -> Tensor | None:
    if rotation is None:
        return None
    check_signs(rotation.signs, rotation.size)
    signs = rotation.signs
    if signs is not None and signs.dtype == torch.int32:
        return random_signs(rotation.size, signs)
    return None if signs is None else signs.float()


# ----------------------------------------------------------------------------------------------------------- calls


def _turn(
    x: Tensor, signs: Tensor | None, size: int, dtype: torch.dtype = torch.float32, *, back: bool = False,
    gains: Sequence[float] = (), mask: Tensor | None = None, bits: bool = False,
) -> Tensor:  # fmt: skip
    """x (outer, span, inner) rotated in blocks of size, or times up to two gains, masked and turned back. bits: whether
    the mask has a bit for each element of x, and not a byte."""
    x, out = x.contiguous(), _empty(x.shape, dtype)
    passes = None if mask is None else mask.contiguous()
    rows, inner = x.shape[0] * x.shape[1], x.shape[2]
    signs = None if signs is None else signs.contiguous()
    gain, second = (*gains, 1.0, 1.0)[:2]
    function = _rotate_function(size, x.dtype, dtype)
    function(_at(x), rows, inner, gain, second, _at(passes), int(bits), _at(signs), int(back), _at(out), _threads(x))
    return out


def _line_scales(x: Tensor, signs: Tensor | None, size: int, plan: Plan) -> Tensor:
    """(outer, 1, inner) float32 scales of the lines of x (outer, length, inner), rotated in blocks of size (0: not)."""
    x, signs = x.contiguous(), None if signs is None else signs.contiguous()
    outer, length, inner = x.shape
    scales = _empty((outer, 1, inner), torch.float32)
    function = _line_scales_function(plan, x.dtype, size)
    function(_at(x), outer * length, inner, length, _at(signs), _at(scales), _threads(x))
    return scales


def _extent(x: Tensor, signs: Tensor | None, size: int) -> Tensor:
    """() float32: the largest magnitude of x rotated."""
    x, signs = x.contiguous(), None if signs is None else signs.contiguous()
    found = _empty((), torch.float32)
    function = _extent_function(size, x.dtype)
    function(_at(x), x.shape[0] * x.shape[1], x.shape[2], _at(signs), _at(found), _threads(x))
    return found


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")  # whatever the defaults are


def _at(tensor: Tensor | None) -> int | None:
    """The address for C++. ValueError for a tensor whose memory was given back, as FSDP does."""
    if tensor is None:
        return None
    if not tensor.data_ptr() and tensor.numel():
        raise ValueError(f"a tensor of {tuple(tensor.shape)} has no memory: its storage was freed; give it back first")
    return tensor.data_ptr()


def _threads(x: Tensor) -> int:
    return max(1, min(torch.get_num_threads(), x.numel() // GRAIN))


# ----------------------------------------------------------------------------------------------------------- compiling


def _function(
    part: str, name: str, arguments: str, constants: Mapping[str, object], rotation: int = 0
) -> Callable[..., None]:
    """A function of one part of cpu.cpp, compiled for its constants. arguments: the kind of each, as in ARGUMENTS."""
    always = {
        part: 1,
        "Input": "float",
        "Output": "float",
        "ROTATION": rotation,
        "NORM": _float((rotation or 1) ** -0.5),
    }
    return bound(_library(_defines({**always, **constants})), name, arguments)


def bound(library: ctypes.CDLL, name: str, arguments: str) -> Callable[..., None]:
    """A function of a library, of such arguments."""
    function = getattr(library, name)
    function.argtypes = [ARGUMENTS[kind] for kind in arguments]
    return function


@cache
def _rotate_function(size: int, source: torch.dtype, result: torch.dtype) -> Callable[..., None]:
    return _function("ROTATE", "rotate", "pllffpipipi", _types(source, result), size)


@cache
def _quantize_function(plan: Plan, source: torch.dtype, result: torch.dtype, rotation: int) -> Callable[..., None]:
    return _function("QUANTIZE", "quantize", "pllllppiwwppppppiii", _types(source, result) | _plan(plan), rotation)


@cache
def _line_scales_function(plan: Plan, source: torch.dtype, rotation: int) -> Callable[..., None]:
    """Of a plan without mask or noise, which play no part in it."""
    constants = _types(source, torch.float32) | _plan(plan, plan.line_rule)
    return _function("LINE_SCALES", "line_scales", "plllppi", constants, rotation)


@cache
def _unpack_function(plan: Plan, result: torch.dtype) -> Callable[..., None]:
    return _function("PACK", "unpack", "ppplpi", _types(result, result) | _plan(plan))


@cache
def _split_function(width: int) -> Callable[..., None]:
    return _function("FIELDS", "split", "plpi", {"WIDTH": width})


@cache
def _random_signs_function() -> Callable[..., None]:
    return _function("RANDOM_SIGNS", "random_signs", "lwwp", {})


@cache
def _extent_function(size: int, source: torch.dtype) -> Callable[..., None]:
    return _function("EXTENT", "extent", "pllppi", _types(source, torch.float32), size)


def _types(source: torch.dtype, result: torch.dtype) -> dict[str, object]:
    return {"Input": RESULTS[source], "Output": RESULTS[result]}


def _plan(plan: Plan, rule: ScaleRule | None = None) -> dict[str, object]:
    """A plan as the constants of cpu.cpp. rule: of the scale that is computed, if it is not the blocks'."""
    rule = rule or plan.scale_rule
    unit, offset = stored_integer(plan.element)
    return {
        "PLAN_ELEMENT": _grid(plan.element),
        "BITS": plan.element.bits,
        "ZERO_POINT": int(plan.element.zero_point),
        "WIDTH": field_width(plan.element),
        "SCALE_NAN": scale_nan(plan),
        "PLAN_SCALE": _grid(FLOAT16 if plan.scale_kind == "float16" else plan.scale_element or NO_ELEMENT),
        "PLAN_KIND": plan.scale_kind.upper(),
        "PLAN_STATISTIC": rule.statistic.upper(),
        "PLAN_ROUNDING": plan.rounding_mode.codes.upper(),
        "PLAN_MASK": plan.mask.kind.upper() if plan.mask else "NONE",
        "MASK_LIMIT": _float(plan.mask.limit if plan.mask else 0.0),
        "GAIN": _float(rule.gain),
        "BIAS": _float(rule.bias),
        "LESS": _float(rule.less),
        "INCREMENT": rule.increment,
        "SHIFT": rule.shift,
        "PLAN_DIVISORS": _list(map(_float, rule.divisors)),
        "PLAN_STEPS": _list(rule.steps if plan.scale_kind == "e8m0" else [0]),
        "HEADROOM": _float(rule.headroom),
        "DIVIDES_FIRST": int(plan.divides_first),
        "BLOCK": plan.block or 0,
        "CORRECTION": plan.correction // plan.block if plan.correction and plan.block else 0,
        "UNIT": _float(unit),
        "OFFSET": _float(offset),
        "SPARSE": int(plan.sparsity is not None),
        "PAIR": 2 if plan.sparsity == "4:8" else 1,
    }


def _grid(element: Element) -> str:
    minifloat = element.mantissa_bits is not None
    fields = (
        _float(element.max), _float(element.min), int(minifloat), element.mantissa_bits or 0, element.min_exponent,
        _float(element.step), _float(element.offset),
    )  # fmt: skip
    return _list(fields)


def _list(values: Iterable[object]) -> str:
    return f"{{{', '.join(map(str, values))}}}"


def _float(value: float) -> str:
    """The float32 nearest to value, as C++ reads it exactly."""
    return f"{ctypes.c_float(value).value.hex()}f"


def _defines(constants: dict[str, object]) -> str:
    return "".join(f"#define {name} {value}\n" for name, value in constants.items())


@cache
def _library(defines: str) -> ctypes.CDLL:
    """cpu.cpp of these constants."""
    return library(defines + SOURCE.read_text())


def library(source: str, *more: str) -> ctypes.CDLL:
    """The compiled code of a source; made, or found in the cache. more: flags of the compiler."""
    command = [compiler(), *flags(), *more]
    key = hashlib.sha256(
        "\0".join((source, *command, compiler_version(command[0]), _processor())).encode()
    ).hexdigest()[:32]
    path = kernel_cache.find_or_make(key, lambda: _compiled(source, command))
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise RuntimeError(
            f"cannot load {path} ({error}); its folder may be mounted noexec: set XDG_CACHE_HOME"
        ) from None


def _compiled(source: str, command: list[str]) -> bytes:
    """The library of a source. RuntimeError where the compiler fails, or has nowhere to write."""
    try:
        with tempfile.TemporaryDirectory() as work:
            text, made = Path(work) / "code.cpp", Path(work) / "code.so"
            text.write_text(source)
            result = subprocess.run([*command, str(text), "-o", str(made)], capture_output=True, text=True, check=False)
            if result.returncode == 0:
                return made.read_bytes()
    except OSError as error:
        raise RuntimeError(f"cannot build cpu.cpp ({error})") from None
    lines = result.stderr.strip().splitlines() or ["it says nothing"]
    first = next((line for line in lines if "error" in line), lines[0])
    raise RuntimeError(f"{' '.join(command)} cannot build cpu.cpp ({first})")


def compiler() -> str:
    """The system's C++ compiler. RuntimeError where there is none."""
    from torch._inductor import cpp_builder, exc

    try:
        return cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, OSError):  # OSError: CXX names what cannot be run
        raise RuntimeError("no C++ compiler was found; install g++ or set CXX") from None


def flags() -> tuple[str, ...]:
    """Of GCC, or of clang. No vector instructions that torch may not use either, so that ATEN_CPU_CAPABILITY=avx2
    shows on any x86 processor what one with AVX2 alone does."""
    own = () if "clang" in compiler_version(compiler()) else GCC_FLAGS
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return FLAGS + own
    without = WITHOUT.get(torch.backends.cpu.get_cpu_capability())
    return (*FLAGS, *own, "-mprefer-vector-width=512", *([without] if without else []))


@cache
def compiler_version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


@cache
def _processor() -> str:
    """What -march=native depends on: a home folder may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
