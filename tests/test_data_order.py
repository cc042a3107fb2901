"""The order of samples: every window once per epoch, another order for another seed or epoch, the same for ever."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtrain.data.order import WindowOrder, describe_epochs, epochs, repetition_warning


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 1000))
def test_every_epoch_visits_every_window_once(n: int, seed: int, epoch: int) -> None:
    windows = WindowOrder(seed, n)(np.arange(epoch * n, (epoch + 1) * n))
    assert np.array_equal(np.sort(windows), np.arange(n))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 255, 256, 257, 65536, 65537])
def test_bijection_at_powers_of_two(n: int) -> None:
    assert np.array_equal(np.sort(WindowOrder(0, n)(np.arange(n))), np.arange(n))


def test_order_is_pinned() -> None:
    """A change here would change every run that was ever resumed: it must be on purpose."""
    assert WindowOrder(7, 1000)(np.arange(998, 1004)).tolist() == PINNED
    assert WindowOrder(7, 10**12)(np.array([0, 10**12 - 1, 10**12])).tolist() == PINNED_LARGE


PINNED = [441, 955, 348, 6, 22, 285]
PINNED_LARGE = [856164689446, 987350714179, 770464165045]


def test_sample_does_not_depend_on_its_company() -> None:
    order, samples = WindowOrder(3, 101), np.arange(500)
    alone = [int(order(np.array([sample]))[0]) for sample in samples]
    assert order(samples).tolist() == alone


def test_seeds_and_epochs_share_no_order() -> None:
    """Two random permutations of n agree in one place on average, and the count is close to Poisson."""
    n = 5000
    orders = [WindowOrder(seed, n)(np.arange(e * n, (e + 1) * n)) for seed in range(6) for e in range(6)]
    agreements = [np.count_nonzero(a == b) for i, a in enumerate(orders) for b in orders[:i]]
    assert max(agreements) < 10
    assert 0.8 < np.mean(agreements) < 1.2  # 630 pairs: standard error 0.04


@pytest.mark.parametrize("n", [1000, 4096, 50_000])
def test_order_looks_random(n: int) -> None:
    """Position against window, neighbour against neighbour, and the mean step: correlations of about n**-0.5."""
    for seed in range(4):
        windows = WindowOrder(seed, n)(np.arange(n)).astype(float)
        assert abs(np.corrcoef(np.arange(n), windows)[0, 1]) < 5 / n**0.5
        for lag in (1, 2, 16):
            assert abs(np.corrcoef(windows[:-lag], windows[lag:])[0, 1]) < 5 / n**0.5
        # the window halves of a batch of 32: chi-square over 16 bins of the first tenth of the epoch
        counts = np.histogram(windows[: n // 10], bins=16, range=(0, n))[0]
        assert ((counts - n / 160) ** 2 / (n / 160)).sum() < 45  # p about 1e-4 for 15 degrees of freedom


def test_a_run_says_how_often_it_reads_its_text() -> None:
    """Independently: count in how many epochs the order's samples lie."""
    n_tokens, seq_len = 1001, 10  # 100 windows
    for samples in (30, 100, 101, 250):
        read = epochs(samples * seq_len, n_tokens, seq_len)
        assert read == samples / 100
        seen = np.bincount(WindowOrder(3, 100)(np.arange(samples)), minlength=100)
        assert (seen.max() > 1) == (repetition_warning({"": read}) is not None)
    assert describe_epochs({"": 0.3}) == "30.0% of it, each part once" and describe_epochs({"": 2.5}) == "2.5 times"
    assert "the training text is read 2.5 times: " in str(repetition_warning({"": 2.5}))
    mixed = {"code": 2.5, "web": 0.5, "wiki": 4.0}
    assert describe_epochs(mixed) == "code: 2.5 times; web: 50.0% of it, each part once; wiki: 4 times"
    told = "the training text of code is read 2.5 times, and that of wiki is read 4 times: "
    assert told in str(repetition_warning(mixed))
