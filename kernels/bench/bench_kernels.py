"""Each operation of a backend alone: time, bytes moved, and its share of the bandwidth that a copy reaches.

    python kernels/bench/bench_kernels.py
    python kernels/bench/bench_kernels.py --rows 16384 --columns 4096 --out kernels/bench/results

On a matrix in bfloat16. Bytes: what the operation is given, read once, and what it gives, written once. A copy is
`x.clone()` of the matrix, in the same rounds. Equal: the share of all values that are the reference's, bit for bit;
where one is not, no time is shown. SQNR: of the matrix as quantised, dequantised and rotated back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from harness import arguments, checked, in_turns, ratio, report, share_equal, sqnr
from torch import Tensor

from qtrain_kernels import dispatch, quantize, reference
from qtrain_kernels.formats import get_format
from qtrain_kernels.quantize import Side, Spec
from qtrain_kernels.reference import Mask, Plan, Rotation

E2M1, INT4 = get_format("mxfp4").element, get_format("int4").element
NVFP4 = Plan(E2M1, "minifloat", 16, "absmax", scale_element=get_format("nvfp4").scale_element)
PLANS: dict[str, tuple[Plan, int, torch.dtype]] = {  # plan, rotation, dtype of the operand
    "MXFP4 std, clip": (Plan(E2M1, "e8m0", 32, "std", mask=Mask("inside", 6.0)), 32, torch.bfloat16),
    "MXFP4 stochastic": (Plan(E2M1, "e8m0", 32, "floor_three_quarters", "stochastic"), 32, torch.bfloat16),
    "NVFP4": (NVFP4, 16, torch.bfloat16),
    "NVFP4 four over six": (replace(NVFP4, rule="four_over_six"), 16, torch.bfloat16),
    "NVFP4 MS-EDEN": (
        replace(NVFP4, rule="absmax_fitted", rounding="eden", correction=16), 128, torch.bfloat16,
    ),
    "INT4 QuEST, trust": (Plan(INT4, "float32", None, "gaussian", mask=Mask("error", 0.5)), 128, torch.int8),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """An operation by the backend and by the reference, on the same tensors. restored: a result as the matrix again."""

    name: str
    ours: Callable[[], Any]
    wanted: Callable[[], Any]
    given: tuple[Tensor | None, ...]
    restored: Callable[[Any], Tensor] | None = None


def tensors(found: Any) -> list[Tensor]:
    """Those of a result."""
    if isinstance(found, Tensor):
        return [found]
    return [tensor for each in found if each is not None for tensor in tensors(each)]


def operand_cases(name: str, x: Tensor, backend: str, key: Tensor) -> Iterator[Case]:
    """tensor_scale and operand along both dims, and what waits for the backward."""
    plan, size, dtype = PLANS[name]
    rotation = Rotation(size, torch.randint(0, 2, (size,), device=x.device) * 2.0 - 1.0)
    get = partial(dispatch.get, backend=backend, device_type=x.device.type)
    for along, lines, span in (("rows", x[:, :, None], x.shape[1]), ("columns", x[None], x.shape[0])):
        scale = reference.tensor_scale(lines, plan, rotation)
        if isinstance(scale, Tensor):
            ours, wanted = (partial(f, lines, plan, rotation) for f in (get("tensor_scale"), reference.tensor_scale))
            yield Case(f"tensor_scale, {name}, {along}", ours, wanted, (x,))
        span = plan.span or span
        view = x.reshape(-1, span, 1 if along == "rows" else x.shape[1])
        arguments = view, scale, key, plan, dtype, rotation, along == "rows"
        given = x, scale if isinstance(scale, Tensor) else None, None if plan.rounding == "nearest" else key

        def restored(found: Any, scale: Tensor | float = scale, lines: Tensor = lines) -> Tensor:
            values, unit = found[0].float(), 1.0
            if dtype == torch.int8:
                unit, offset = reference.stored_integer(plan.element)
                values = values + offset
            return reference.unrotate(values.view(lines.shape) * unit * scale, rotation, None, torch.float32)

        run = partial(get("operand"), *arguments)
        yield Case(f"operand, {name}, {along}", run, partial(reference.operand, *arguments), given, restored)
    if reference.can_pack(plan) and plan.rounding != "eden":
        yield from packing_cases(name, x, get, plan, dtype, rotation, key)


def packing_cases(
    name: str, x: Tensor, get: Any, plan: Plan, dtype: torch.dtype, rotation: Rotation, key: Tensor
) -> Iterator[Case]:
    lines = x[:, :, None]
    scale = reference.tensor_scale(lines, plan, rotation)
    view = x.reshape(-1, plan.span or x.shape[1], 1)
    values, blocks, mask = reference.operand(view, scale, key, plan, dtype, rotation)
    packed = reference.pack(values, blocks, plan)
    given = values, blocks, plan
    yield Case(f"pack, {name}", partial(get("pack"), *given), partial(reference.pack, *given), (values, blocks))
    given = packed, values.shape, plan, dtype
    yield Case(f"unpack, {name}", partial(get("unpack"), *given), partial(reference.unpack, *given), tuple(packed))
    if mask is not None:
        arguments = lines, rotation, mask.view(lines.shape), torch.bfloat16
        ours, wanted = partial(get("unrotate"), *arguments), partial(reference.unrotate, *arguments)
        yield Case(f"unrotate with mask, {name}", ours, wanted, (x, mask))


def both_cases(x: Tensor, key: Tensor) -> Iterator[Case]:
    """One reading of a matrix for both of its dims, against two of the reference; Triton's alone."""
    plan, size, _ = PLANS["MXFP4 stochastic"]
    signs = torch.ones(size, device=x.device)
    sides = [Side(Spec(plan, dim, size, with_blocks=False), None, key, signs) for dim in (-1, -2)]
    views = x.reshape(-1, plan.span or 1, 1), x.reshape(-1, plan.span or 1, x.shape[1])

    def wanted() -> list[Tensor]:
        found = [
            reference.operand(view, 1.0, key, plan, torch.bfloat16, Rotation(size, signs), False)[0] for view in views
        ]
        return [each.reshape(x.shape) for each in found]

    yield Case("quantize_both, MXFP4 stochastic", lambda: quantize.quantize_both(x, *sides), wanted, (x,))


def measure(case: Case, x: Tensor, rounds: int) -> dict[str, Any]:
    found, wanted = case.ours(), case.wanted()
    pairs = list(zip(tensors(found), tensors(wanted), strict=True))
    moved = sum(tensor.nbytes for tensor in tensors((*case.given, *tensors(found))))
    row: dict[str, Any] = {"operation": case.name, "bytes an element": moved / x.numel()}
    quality = {
        "SQNR dB": None if case.restored is None else sqnr(case.restored(found).view(x.shape), x),
        "equal": min(share_equal(a, b) for a, b in pairs),
    }
    if quality["equal"] < 1:
        return checked(row | quality, "operation", "SQNR dB")
    times = in_turns({"ours": case.ours, "copy": x.clone}, rounds, x.device.type)
    seconds = median(times["ours"])
    return row | {
        "ms": seconds * 1e3,
        "GB/s": moved / seconds / 1e9,
        "of copy bandwidth": ratio(times, "copy", "ours") * moved / (2 * x.nbytes),
        **quality,
    }


def main() -> None:
    options = arguments(__doc__, rows=2048, columns=4096, rounds=10)
    torch.manual_seed(0)
    x = torch.randn(options.rows, options.columns).to(options.device, torch.bfloat16)
    key = torch.tensor([5, -6], dtype=torch.int32, device=options.device)
    rows = [measure(case, x, options.rounds) for name in PLANS for case in operand_cases(name, x, options.backend, key)]
    if options.backend == "triton":
        rows += [measure(case, x, options.rounds) for case in both_cases(x, key)]
    title = f"operations on {options.rows} x {options.columns} bfloat16"
    report(f"kernels-{options.rows}x{options.columns}", title, rows, options)


if __name__ == "__main__":
    main()
