"""Streaming statistics: exact extremes, a uniform bounded sample, refusal of NaN and of nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikeplug import ActivationStats
from spikeplug.coding.statistics import Observer, channel_shape
from spikeplug.errors import CalibrationError, NonFiniteError, OptionError


@pytest.mark.parametrize(
    ("shape", "channels", "expected"),
    [
        ((4, 7, 6), (-1,), [6]),
        ((4, 3, 5, 5), (-3,), [3, 1, 1]),
        ((3, 5, 5), (-3,), [3, 1, 1]),
        ((2, 9, 8, 64), (1, 3), [9, 1, 64]),
        ((2, 9, 8, 8), (1,), [9, 1, 1]),
        ((), (-1,), []),
    ],
)
def test_channel_shape_broadcasts_against_the_activation(shape, channels, expected):
    assert channel_shape(torch.Size(shape), channels) == expected
    torch.broadcast_shapes(shape, expected)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 10**6))
def test_batches_give_the_extremes_of_their_union(sizes, seed):
    x = torch.randn(sum(sizes), 5, generator=torch.Generator().manual_seed(seed))
    observer = Observer()
    for batch in x.split(sizes):
        observer.update(batch)
    stats = observer.stats()
    assert torch.equal(stats.low, x.double().min(0).values)
    assert torch.equal(stats.high, x.double().max(0).values)
    assert stats.count == x.numel()


def test_memory_is_bounded_and_the_sample_uniform():
    observer = Observer(samples=4000)
    for start in range(100):
        observer.update(torch.full((1000, 4), float(start)))
    rows = observer.stats().rows
    assert rows.shape == (1000, 4)
    # 1,000 of 100,000 rows whose values are 0..99 evenly: the mean is 49.5 +- 0.91 (one standard deviation).
    assert abs(rows.mean().item() - 49.5) < 4


def test_percentiles_by_tensor_and_by_channel():
    x = torch.stack([torch.linspace(0, 1, 1001), torch.linspace(-10, 10, 1001)], dim=1)
    stats = ActivationStats.of(x)
    low, high = stats.limits(90.0, by_channel=True)
    torch.testing.assert_close(low, torch.tensor([0.05, -9.0], dtype=torch.float64))
    torch.testing.assert_close(high, torch.tensor([0.95, 9.0], dtype=torch.float64))
    low, high = stats.limits()
    assert (low.item(), high.item()) == (-10, 10)


def test_rare_values_of_wide_activations_are_sampled():
    # One token in 512 with values of 30: the 99.9th percentile of all values lies above the others' 3.
    x = torch.randn(4096, 1536, generator=torch.Generator().manual_seed(0)).clamp_(-3, 3)
    x[::512] = 30
    low, high = ActivationStats.of(x).limits(99.8)
    assert high.item() == 30
    assert -3 <= low.item() < -2.5
    with pytest.raises(CalibrationError, match=r"needs more than the 42 rows .* samples="):
        ActivationStats.of(x).limits(99.8, by_channel=True)


def test_same_batches_give_the_same_sample():
    first, second = (ActivationStats.of(torch.arange(300_000.0).reshape(-1, 3)) for _ in range(2))
    assert torch.equal(first.rows, second.rows)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(value):
    with pytest.raises(NonFiniteError, match="1 values"):
        Observer().update(torch.tensor([1.0, value]))


def test_largest_finite_numbers_are_accepted():
    for x in (torch.tensor([-3e38, 3e38]), torch.tensor([-6e4, 6e4], dtype=torch.float16)):
        stats = ActivationStats.of(x, ())
        assert (stats.low.item(), stats.high.item()) == (x.min().item(), x.max().item())


def test_nothing_seen_is_an_error():
    observer = Observer()
    observer.update(torch.empty(0, 3))
    with pytest.raises(CalibrationError, match="no activation was seen"):
        observer.stats()


def test_changed_channels_and_no_samples_are_errors():
    observer = Observer()
    observer.update(torch.zeros(2, 3))
    with pytest.raises(CalibrationError, match=r"channels of shape \[4\] after channels of shape \[3\]"):
        observer.update(torch.zeros(2, 4))
    with pytest.raises(OptionError, match="samples=0"):
        Observer(samples=0)
