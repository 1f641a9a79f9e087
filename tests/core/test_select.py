"""Error feedback and selection."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_dls.core.select import _BLOCK, accumulate_and_select, all_finite
from tests.core.strategies import KINDS, seeds

# (residual, gradient) types: what the layers' work dtype makes of float16 to float64 gradients.
DTYPES = [
    (np.float32, np.float16),
    (np.float32, np.float32),
    (np.float64, np.float32),
    (np.float64, np.float64),
]


def by_brute_force(values, k):
    """Indices of the k largest magnitudes, ties to the lower index, ascending."""
    return np.sort(np.argsort(-np.abs(values), kind="stable")[:k])


def check(residual, gradient, k, last_threshold):
    """All laws of selection on one case; returns what was selected."""
    total = residual + gradient
    assert total.dtype == residual.dtype
    before = gradient.copy()
    selection = accumulate_and_select(residual, gradient, k, last_threshold)
    assert np.array_equal(selection.indices, by_brute_force(total, k))
    assert selection.values.dtype == residual.dtype
    assert selection.threshold == np.abs(selection.values).min()
    assert not residual[selection.indices].any()
    # Conservation, to the bit.
    together = residual.copy()
    together[selection.indices] = selection.values
    assert together.tobytes() == total.tobytes()
    assert gradient.tobytes() == before.tobytes()
    return selection


@st.composite
def cases(draw):
    rng = np.random.default_rng(draw(seeds))
    kind, size = draw(st.sampled_from(list(KINDS))), draw(st.sampled_from([1, 2, 7, 100, 3000]))
    work, dtype = draw(st.sampled_from(DTYPES))
    residual = KINDS[kind](rng, size).astype(work)
    gradient = KINDS[kind](rng, size).astype(dtype)
    for values in (residual, gradient):
        values[rng.random(size) < draw(st.sampled_from([0, 0, 0.5, 1]))] = 0
    k = draw(st.sampled_from([1, size, (size + 1) // 2, 1 + int(rng.integers(size))]))
    return residual, gradient, k


@given(cases(), st.sampled_from([0.0, 1e-44, 0.01, 0.5, 1.0, 2.0, 100.0, 3e38, np.inf]))
def test_selection_is_the_exact_top_k_whatever_the_last_threshold(case, last_threshold):
    check(*case, last_threshold)


@pytest.mark.parametrize("size", [_BLOCK - 1, _BLOCK, _BLOCK + 1, 2 * _BLOCK + 1])
@pytest.mark.parametrize("share", [1e-4, 0.03, 1.0])
@pytest.mark.parametrize("last_threshold", [0.0, 2.0, 4.0])
def test_selection_is_exact_across_blocks(size, share, last_threshold):
    rng = np.random.default_rng(size)
    residual, gradient = rng.standard_normal((2, size)).astype(np.float32)
    check(residual, gradient, max(1, int(share * size)), last_threshold)


def test_ties_across_blocks_go_to_the_lowest_indices():
    residual = np.zeros(2 * _BLOCK, np.float32)
    selection = check(residual, np.ones(2 * _BLOCK, np.float32), _BLOCK + 5, 1.0)
    assert np.array_equal(selection.indices, np.arange(_BLOCK + 5))


@pytest.mark.parametrize(("work", "dtype"), DTYPES)
def test_gradients_may_jump_vanish_and_return(work, dtype):
    rng = np.random.default_rng(0)
    residual, threshold = np.zeros(500, work), 0.0
    for factor in (1, 1, 1000, 1000, 1, 0, 0, *[0] * 30, 1e-4, 1, 1000):
        gradient = (factor * rng.standard_normal(500)).astype(dtype)
        threshold = check(residual, gradient, 20, threshold).threshold


def test_subnormal_gradients_are_not_lost():
    tiny = np.finfo(np.float32).smallest_subnormal
    residual = np.zeros(5, np.float32)
    selection = check(residual, np.array([0, tiny, 0, 3 * tiny, 2 * tiny], np.float32), 2, tiny)
    assert selection.indices.tolist() == [3, 4]


# Finite or not ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(
    "bad", [[np.nan], [np.inf], [-np.inf], [np.inf, -np.inf], [np.nan, np.inf]], ids=str
)
def test_nan_and_inf_are_found_wherever_they_are(dtype, bad):
    for start in (0, 500, 1000 - len(bad)):
        gradient = np.ones(1000, dtype)
        gradient[start : start + len(bad)] = bad
        assert not all_finite(gradient)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_sum_that_overflows_is_no_reason_to_refuse(dtype):
    assert all_finite(np.full(1000, np.finfo(dtype).max))
    assert all_finite(np.array([np.finfo(dtype).max] * 5 + [np.finfo(dtype).min] * 9))


def test_nothing_is_finite():
    assert all_finite(np.zeros(0, np.float32))
