"""All ranks' entries of a bucket, added up: against one addition after the other, to the bit."""

import importlib.util

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_dls.core import adding
from tests.core.strategies import seeds


@pytest.fixture(autouse=True, params=["numpy", "numba"])
def backend(request, monkeypatch):
    if request.param == "numba" and not importlib.util.find_spec("numba"):
        pytest.skip("numba is not installed")
    monkeypatch.setattr(adding, "HAVE_NUMBA", request.param == "numba")


def one_by_one(entries, starts, offsets, sums):
    for (indices, values), own in zip(entries, starts.tolist(), strict=True):
        for layer, first in enumerate(offsets[:-1].tolist()):
            for i in range(own[layer], own[layer + 1]):
                sums[first + int(indices[i])] += values[i]


@given(
    seeds,
    st.lists(st.integers(1, 30), min_size=1, max_size=5),
    st.integers(1, 4),
    st.sampled_from([np.float32, np.float64]),
)
def test_entries_are_added_rank_by_rank(seed, sizes, ranks, dtype):
    rng = np.random.default_rng(seed)
    offsets = np.cumsum([0, *sizes])
    counts = np.array([[rng.integers(n + 1) for n in sizes] for _ in range(ranks)])
    starts = np.zeros((ranks, len(sizes) + 1), np.int64)
    np.cumsum(counts, axis=1, out=starts[:, 1:])
    entries = []
    for own in counts.tolist():
        chosen = [np.sort(rng.permutation(n)[:k]) for n, k in zip(sizes, own, strict=True)]
        indices = np.concatenate([*chosen, [99, 99]]).astype(np.uint32)  # and room behind
        values = (rng.standard_normal(len(indices)) * 10.0 ** rng.integers(-9, 9)).astype(dtype)
        entries.append((indices, values))
    sums = rng.standard_normal(offsets[-1]).astype(dtype)
    expected = sums.copy()
    one_by_one(entries, starts, offsets, expected)
    adding.add_up(entries, starts, offsets, sums)
    assert sums.tobytes() == expected.tobytes()


def test_what_goes_beyond_the_type_is_infinite():
    largest = np.finfo(np.float32).max
    sums = np.full(2, largest, np.float32)
    entries = [(np.array([1], np.uint32), np.array([largest], np.float32))]
    adding.add_up(entries, np.array([[0, 1]]), np.array([0, 2]), sums)
    assert sums.tolist() == [largest, np.inf]
