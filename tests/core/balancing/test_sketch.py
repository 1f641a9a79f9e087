"""Histograms of magnitudes around a threshold."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_dls.core.balancing.sketch import BELOW, BINS_PER_OCTAVE, SAMPLE, WINDOW, bin_of, edges
from tests.core.strategies import KINDS, models
from tests.core.taking import take

N_BINS = 255 * BINS_PER_OCTAVE
DTYPES = [np.float32, np.float64]
magnitudes = st.floats(0, float(np.finfo(np.float32).max), width=32)


@given(magnitudes, magnitudes)
def test_bins_rise_with_the_magnitude(a, b):
    a, b = sorted((a, b))
    assert bin_of(np.array([a])) <= bin_of(np.array([b]))


@given(magnitudes)
def test_every_magnitude_lies_between_the_edges_of_its_bin(a):
    number = int(bin_of(np.array([a]))[0])
    low, high = edges(number, number + 1)
    assert low <= a < high


@pytest.mark.parametrize("dtype", DTYPES)
def test_edges_are_exact_and_start_their_bins(dtype):
    exact = edges(0, N_BINS)[:-1]  # the upper edge of the last bin is 2**128
    assert np.array_equal(exact, exact.astype(np.float32))
    assert np.array_equal(bin_of(exact.astype(dtype)), np.arange(N_BINS))
    below = np.nextafter(exact[1:].astype(np.float32), np.float32(0)).astype(dtype)
    assert np.array_equal(bin_of(below), np.arange(N_BINS - 1))


def test_eight_bins_make_an_octave():
    assert edges(8 * 127, 8 * 128).tolist() == [1, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875, 2]
    normal = edges(BINS_PER_OCTAVE, N_BINS)
    assert np.all(normal[1:] <= 1.125 * normal[:-1])


def test_subnormal_numbers_have_bins_of_their_own():
    smallest = np.array([0, np.finfo(np.float32).smallest_subnormal, 2.0**-127, 2.0**-126])
    assert bin_of(smallest.astype(np.float32)).tolist() == [0, 0, 4, 8]
    assert edges(0, 8).tolist() == [n * 2.0**-129 for n in range(9)]


@pytest.mark.parametrize("beyond", [1e39, 1e300, np.inf])
def test_what_is_beyond_float32_counts_in_the_last_bin(beyond):
    assert bin_of(np.array([beyond])).tolist() == [N_BINS - 1]


def of(layer, k):
    """A layer's sketch when it sends k entries; its magnitudes as sorted into bins."""
    return take(layer, k)[0].sketch, bin_of(np.abs(layer))


@given(models())
def test_counts_are_exact_where_every_entry_is_looked_at(model):
    for layer, k in zip(model.layers, model.k, strict=True):
        (base, counts), bins = of(layer, k)
        within = bins[bins >= max(base, 1)] - base
        expected = np.bincount(np.minimum(within, WINDOW - 1), minlength=WINDOW)
        if base == 0:  # zeros count only if they were sent
            expected[0] = max(0, k - expected[1:].sum())
        assert counts.dtype == np.uint32
        assert np.array_equal(counts, expected)


@given(models())
def test_the_window_starts_two_octaves_below_the_threshold(model):
    for layer, k in zip(model.layers, model.k, strict=True):
        (base, counts), bins = of(layer, k)
        threshold_bin = np.sort(bins)[-k]
        assert base == max(0, min(threshold_bin - BELOW, N_BINS - WINDOW))
        assert counts[threshold_bin - base :].sum() >= k


def test_the_window_stays_within_the_bins_at_the_largest_magnitudes():
    layer = np.array([np.finfo(np.float32).max, 1.0], np.float32)
    (base, counts), _ = of(layer, 1)
    assert base == N_BINS - WINDOW
    assert counts.tolist() == [0] * (WINDOW - 1) + [1]


@pytest.mark.parametrize("size", [SAMPLE, SAMPLE + 1, 2 * SAMPLE - 1, 2 * SAMPLE, 5 * SAMPLE + 7])
@pytest.mark.parametrize("kind", ["gaussian", "pareto"])
def test_samples_of_large_layers_are_unbiased(kind, size):
    layer = KINDS[kind](np.random.default_rng(2), size).astype(np.float32)
    k = size // 100
    (base, counts), bins = of(layer, k)
    full = np.bincount(np.clip(bins - base, 0, WINDOW - 1)[bins >= base], minlength=WINDOW)
    above = BELOW + 1  # bins in which all entries were sent
    assert np.array_equal(counts[above:], full[above:])
    below, sampled = full[:above].astype(float), counts[:above].astype(float)
    # A sample of one in s entries, each counted s times: variance (s - 1) n.
    stride = size // SAMPLE + 3  # about
    assert np.all(np.abs(sampled - below) <= 4 * np.sqrt((stride - 1) * below) + stride)
    assert sampled.sum() == pytest.approx(below.sum(), rel=0.02)


@pytest.mark.parametrize(
    "shape",
    [(128, 128, 3, 3), (256, 256, 3, 3), (200, 200, 5, 5), (96, 96, 7, 7), (1000, 3, 11, 11)],
)
def test_samples_see_every_kernel_position_and_channel(shape):
    """Gradients of a kernel's rim are often smaller than those of its middle."""
    rng = np.random.default_rng(3)
    weights = rng.standard_normal(shape).astype(np.float32)
    weights *= rng.uniform(0.1, 1, shape[2:]) * rng.uniform(0.1, 1, (shape[1], 1, 1))
    (base, counts), bins = of(weights.ravel(), weights.size // 100)
    below = np.count_nonzero((base <= bins) & (bins < base + BELOW))
    assert counts[:BELOW].sum() == pytest.approx(below, rel=0.03)
