"""Numbers as people read them."""

import pytest

from qtrain.units import describe_bytes, describe_time, readable


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (999.9, "1k"),
        (1500, "1.5k"),
        (999_936, "1M"),
        (2621440, "2.62M"),
        (3e9, "3B"),
        (1.5e12, "1.5T"),
    ],
)
def test_readable(count: float, text: str) -> None:
    assert readable(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.2196, "0.22 s"),
        (99, "99 s"),
        (150, "2.5 min"),
        (7200, "2 h"),
        (172_000, "47.8 h"),
        (216_000, "2.5 days"),
        (1.2e9, "13,889 days"),
    ],
)
def test_describe_time(seconds: float, text: str) -> None:
    assert describe_time(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(999, "999 B"), (1536, "1.5 KiB"), (3 * 2**40, "3,072.0 GiB")])
def test_describe_bytes(count: int, text: str) -> None:
    assert describe_bytes(count) == text
