"""Ratios: one threshold for all layers, and whole numbers of entries that add up exactly."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_dls.core.balancing.ratios import apportion, common_threshold_ratios
from hvd_dls.core.balancing.tails import TAILS
from hvd_dls.errors import DLSError
from tests.core.strategies import densities, seeds


@st.composite
def shares(draw):
    """(wanted, total, least, most) that can be met: zeros, limits that bind, huge layers."""
    rng = np.random.default_rng(draw(seeds))
    n = draw(st.sampled_from([1, 2, 3, 5, 20, 200]))
    most = np.exp(rng.uniform(0, draw(st.sampled_from([0, 3, 10, 21])), n)).astype(np.int64)
    least = np.minimum(draw(st.sampled_from([0, 1, 5])), most)
    wanted = most * np.exp(rng.normal(0, draw(st.sampled_from([0, 1, 8])), n))
    wanted[rng.random(n) < draw(st.sampled_from([0, 0.3, 1]))] = 0
    low, high = int(least.sum()), int(most.sum())
    share = draw(st.sampled_from([0, 1e-3, 0.01, 0.1, 0.5, 0.99, 1]))
    total = low + round(share * (high - low))
    return wanted, total, least, most


@given(shares())
def test_apportioned_numbers_add_up_exactly_and_keep_their_limits(case):
    wanted, total, least, most = case
    k = apportion(wanted, total, least, most)
    assert k.dtype == np.int64
    assert k.sum() == total
    assert np.all((least <= k) & (k <= most))


@given(shares())
def test_apportioned_numbers_are_proportional_where_no_limit_binds(case):
    wanted, total, least, most = case
    k = apportion(wanted, total, least, most)
    free = (least + 2 < k) & (k < most - 2) & (wanted > 1e-9 * most)
    if free.any():
        rate = k[free].sum() / wanted[free].sum()
        assert np.all(np.abs(k[free] - rate * wanted[free]) < 2)


@given(shares())
def test_a_layer_that_wants_more_gets_no_less(case):
    wanted, total, least, most = case
    k = apportion(wanted, total, np.zeros_like(least), np.full_like(most, most.sum()))
    order = np.lexsort((-np.arange(len(k)), wanted))  # of equals, the first layer last
    assert np.all(np.diff(k[order]) >= 0)


@pytest.mark.parametrize(
    ("wanted", "total", "k"),
    [
        ([1, 1, 1], 4, [2, 1, 1]),
        ([1, 1, 1], 5, [2, 2, 1]),
        ([1.5, 1.25, 1.25], 4, [2, 1, 1]),
        ([2, 1, 1], 4, [2, 1, 1]),
        ([0, 0, 0], 4, [2, 1, 1]),
        ([0, 10, 0], 12, [1, 10, 1]),
    ],
)
def test_largest_remainders_are_rounded_up_ties_by_index(wanted, total, k):
    least, most = np.zeros(3, int), np.full(3, 10)
    assert apportion(np.array(wanted), total, least, most).tolist() == k


@pytest.mark.parametrize("total", [5, 13])
def test_an_impossible_total_is_refused_with_its_numbers(total):
    with pytest.raises(DLSError, match=rf"{total} entries .* 3 layers .* least 6 .* most 12"):
        apportion(np.ones(3), total, np.full(3, 2), np.full(3, 4))


def test_no_layers_share_nothing():
    none = np.zeros(0, np.int64)
    assert apportion(none, 0, none, none).tolist() == []
    with pytest.raises(DLSError, match="1 entries cannot be shared among 0 layers"):
        apportion(none, 1, none, none)


@st.composite
def variances(draw):
    """(sizes, sigmas, octaves) of 1 to 200 layers; sigmas within +- so many octaves, and zeros."""
    rng = np.random.default_rng(draw(seeds))
    n = draw(st.sampled_from([1, 2, 3, 5, 20, 200]))
    sizes = np.exp(rng.uniform(0, 16, n)).astype(np.int64)
    octaves = draw(st.sampled_from([0, 1, 10, 400]))
    sigmas = np.exp2(rng.uniform(-1, 1, n) * octaves)
    sigmas[rng.random(n) < draw(st.sampled_from([0, 0.3, 1]))] = 0
    return sizes, sigmas, octaves


@pytest.mark.parametrize("tail", TAILS)
@given(variances(), densities)
def test_ratios_meet_the_density_with_one_threshold_for_all_layers(tail, layers, density):
    sizes, sigmas, octaves = layers
    ratios = common_threshold_ratios(sizes, sigmas, density, TAILS[tail])
    assert np.all((ratios >= 0) & (ratios <= 1))
    tolerance = 4e-14 if octaves <= 10 else 1e-12
    assert sizes @ ratios == pytest.approx(density * sizes.sum(), rel=tolerance)
    inner = (sigmas > 0) & (ratios > 1e-12) & (ratios < 0.999)
    if inner.any():
        inverse = TAILS[tail].inverse
        thresholds = [s * inverse(a) for s, a in zip(sigmas[inner], ratios[inner], strict=True)]
        assert max(thresholds) == pytest.approx(min(thresholds), rel=1e-9)
        assert np.all(np.diff(ratios[np.argsort(sigmas)]) >= -1e-12)


def test_layers_without_variance_get_only_what_the_others_cannot_hold():
    sizes, sigmas = np.array([100, 100, 200]), np.array([1.0, 0.0, 0.0])
    assert common_threshold_ratios(sizes, sigmas, 0.1, TAILS["gaussian"]).tolist() == [0.4, 0, 0]
    left = common_threshold_ratios(sizes, sigmas, 0.5, TAILS["gaussian"])
    assert left == pytest.approx([1, 1 / 3, 1 / 3])


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_impossible_standard_deviations_are_refused(bad):
    with pytest.raises(DLSError, match="finite and >= 0"):
        common_threshold_ratios(np.ones(2), np.array([1.0, bad]), 0.1, TAILS["gaussian"])
