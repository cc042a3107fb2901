"""Peaks of matrix products per device and precision, and how much of them a step uses.

Dense TFLOP/s (INT8: TOP/s), from NVIDIA's data sheets for A100, H100, H200 and HGX B200; those state Hopper's and
Blackwell's with sparsity, which doubles them.
"""

from __future__ import annotations

from collections.abc import Mapping

PEAKS: dict[str, dict[str, float]] = {
    "A100": {"bfloat16": 312.0, "int8": 624.0},
    "H100 PCIe": {"bfloat16": 756.5, "int8": 1513.0, "fp8": 1513.0},
    "H100 NVL": {"bfloat16": 835.5, "int8": 1671.0, "fp8": 1671.0},
    "H100": {"bfloat16": 989.5, "int8": 1979.0, "fp8": 1979.0},  # SXM
    "H200": {"bfloat16": 989.5, "int8": 1979.0, "fp8": 1979.0},  # SXM
    "B200": {"bfloat16": 2250.0, "int8": 4500.0, "fp8": 4500.0},  # HGX, 1000 W
}
UNLISTED = ("MIG", "GB200", "GH200", "H200 NVL")  # parts of a device, and other ones, whose names hold a listed one


def peaks_of(device_name: str) -> dict[str, float] | None:
    """Of a device by torch.cuda's name; None where no data sheet is here."""
    if any(other in device_name for other in UNLISTED):
        return None
    return next((peaks for name, peaks in PEAKS.items() if name in device_name), None)


def shares(flops: Mapping[str, float]) -> dict[str, float]:
    """How much of a step's FLOPs is multiplied in each precision."""
    total = sum(flops.values())
    return {f"FLOPs in {precision}": count / total for precision, count in flops.items()}


def utilisation(flops: Mapping[str, float], seconds: float, device_name: str) -> dict[str, float | None]:
    """of bfloat16 peak: as if all FLOPs were bfloat16's, over 1 if 8-bit products make up for it. of peak in use: the
    time that these FLOPs would take, each at the peak of the precision that it has, over the time that they took."""
    peaks = peaks_of(device_name)
    if peaks is None or any(precision not in peaks for precision in flops):
        return {"of bfloat16 peak": None, "of peak in use": None}
    at_peak = sum(count / peaks[precision] for precision, count in flops.items()) / 1e12
    in_bfloat16 = sum(flops.values()) / peaks["bfloat16"] / 1e12
    return {"of bfloat16 peak": in_bfloat16 / seconds, "of peak in use": at_peak / seconds}
