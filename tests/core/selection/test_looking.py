"""Passes that only look: whether all is finite, and where magnitudes reach a limit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_dls.core.selection import passes
from tests.core.selection.test_passes import backend, load, store  # noqa: F401 (backend: for all)
from tests.core.strategies import KINDS, seeds


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.uint16])
@pytest.mark.parametrize("n", [1, 7, 70_000])
def test_whether_all_is_finite(dtype, n):
    largest = np.finfo(np.float32 if dtype == np.uint16 else dtype).max
    values = np.full(n, 0x7F7F, dtype) if dtype == np.uint16 else np.full(n, largest, dtype)
    assert passes.finite(values)
    assert passes.finite(values[:0])
    for at in {0, n // 2, n - 1}:
        for bad in (np.nan, np.inf, -np.inf):
            spoiled = values.copy()
            spoiled[at] = 0x7FC0 if np.isnan(bad) and dtype == np.uint16 else store([bad], dtype)[0]
            assert not passes.finite(spoiled)


@pytest.mark.parametrize("dtype", [np.float16, np.uint16])
def test_every_float16_and_bfloat16_is_finite_or_not(dtype):
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    finite = np.isfinite(load(every))
    assert passes.finite(every[finite])
    assert not any(passes.finite(every[i : i + 1]) for i in np.flatnonzero(~finite).tolist())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(st.sampled_from(sorted(KINDS)), seeds, st.integers(1, 300), st.floats(0, 2))
def test_places_of_large_magnitudes(dtype, kind, seed, n, factor):
    rng = np.random.default_rng(seed)
    values = KINDS[kind](rng, n).astype(dtype)
    values[rng.random(n) < 0.3] = 0
    values[rng.random(n) < 0.05] = rng.choice([np.nan, np.inf, -np.inf, 1e-45, -1e-45])
    least = max(factor, np.finfo(dtype).smallest_subnormal)
    expected = [i for i, x in enumerate(values) if abs(x) >= dtype(least) or np.isnan(x)]
    assert passes.reaching(values, least).tolist() == expected
