"""Numbers as people read them, in three significant digits."""

from __future__ import annotations


def readable(count: float) -> str:
    """1500 -> 1.5k, 999_936 -> 1M, 2621440 -> 2.62M, 3e9 -> 3B."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= 0.9995 * size:  # what three digits would round up to it
            return f"{count / size:.3g}{suffix}"
    return f"{count:.3g}"


def describe_bytes(count: int) -> str:
    """1536 -> 1.5 KiB, 3 * 2**40 -> 3,072.0 GiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:,.1f} GiB"


def describe_time(seconds: float) -> str:
    """0.22 -> 0.22 s, 150 -> 2.5 min, 9000 -> 2.5 h, 216_000 -> 2.5 days."""
    for unit, size, until in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 48)):
        if seconds / size < until:
            return f"{seconds / size:.3g} {unit}"
    days = seconds / 86400
    return f"{days:.3g} days" if days < 999.5 else f"{days:,.0f} days"
