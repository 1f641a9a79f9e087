"""What an owner hands out: the largest sums and exact sketches, wherever it looks first."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hvd_dls.core.balancing.sketch import BELOW, LAST_BASE, WINDOW, bin_of
from hvd_dls.core.session.owners import _hand_out
from hvd_dls.core.wire.layout import ABSENT, NOT_FINITE, SENT
from tests.core.strategies import KINDS, seeds


@given(
    kind=st.sampled_from(sorted(KINDS)),
    seed=seeds,
    share=st.integers(1, 300),
    before=st.sampled_from([0.0, 1e-3, 0.1, 0.5, 1.0, 1.5, 3.0, 9.0, 1e30]),
    zeros=st.sampled_from([0, 0.5, 0.95, 1]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_the_largest_sums_and_all_counts(kind, seed, share, before, zeros, dtype):
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(1, 300, 4))])
    sums = KINDS[kind](rng, int(offsets[-1])).astype(dtype)
    sums[rng.random(len(sums)) < zeros] = 0
    share = min(share, len(sums))
    status = np.where(rng.random(4) < 0.2, ABSENT, SENT)
    there = np.repeat(status == SENT, np.diff(offsets))
    magnitudes = np.abs(sums) * there
    # Brute force: descending, ties to the lower index, and no zero.
    best = np.lexsort([np.arange(len(sums)), -magnitudes])[:share]
    expected = np.sort(best[magnitudes[best] > 0])
    threshold = np.sort(magnitudes)[::-1][share - 1]
    pieces, now = _hand_out(sums, status, offsets, share, before * float(threshold))
    assert now == threshold
    base = min(max(int(bin_of(threshold)) - BELOW, 0), LAST_BASE)
    found = []
    for position, piece in enumerate(pieces):
        own = slice(offsets[position], offsets[position + 1])
        if status[position] == ABSENT:
            assert piece is ABSENT
            continue
        found += (piece.indices + offsets[position]).tolist()
        assert np.array_equal(piece.values, sums[own][piece.indices])
        bins = bin_of(magnitudes[own][magnitudes[own] > 0]) - base
        counts = np.bincount(np.minimum(bins[bins >= 0], WINDOW - 1), minlength=WINDOW)
        assert piece.sketch.base == base
        assert np.array_equal(piece.sketch.counts, counts)
    assert found == expected.tolist()


def test_sums_beyond_the_type_are_told_by_piece():
    sums, status = np.array([1, np.inf, 2, 3], np.float32), np.array([SENT, SENT, ABSENT])
    pieces, _ = _hand_out(sums, status, np.array([0, 1, 3, 4]), 2, 0.5)
    assert pieces == [None, None, ABSENT]
    assert status.tolist() == [SENT, NOT_FINITE, ABSENT]
