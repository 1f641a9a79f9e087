"""Entries above a threshold: exactly, and from sketches within a bin."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_dls.core.balancing.curves import ExactCurves, SketchedCurves
from hvd_dls.core.balancing.sketch import BELOW, N_BINS, WINDOW, Sketch, bin_of, edges
from tests.core.strategies import CONTINUOUS, densities, models, seeds
from tests.core.taking import stacked

# Exactly ----------------------------------------------------------------------------------------


@given(models(), seeds)
def test_exact_curves_are_counts_and_order_statistics(model, seed):
    curves = ExactCurves(model.layers)
    k = np.random.default_rng(seed).integers(0, model.sizes + 1)
    sent, unsent = curves.smallest_sent(k), curves.largest_unsent(k)
    for row, (layer, n) in enumerate(zip(model.layers, k, strict=True)):
        magnitudes = np.sort(np.abs(layer))[::-1]
        assert sent[row] == (magnitudes[n - 1] if n else np.inf)
        assert unsent[row] == (magnitudes[n] if n < len(layer) else -np.inf)
        for threshold in (0.0, magnitudes[0], magnitudes[-1], magnitudes[len(layer) // 2]):
            assert curves.above(row, threshold) == np.count_nonzero(magnitudes > threshold)
            assert curves.at_least(row, threshold) == np.count_nonzero(magnitudes >= threshold)


# From sketches ----------------------------------------------------------------------------------


def full_sketch(magnitudes, base):
    """A sketch that has looked at everything, with the window where one wants it."""
    bins = bin_of(magnitudes) - base
    counts = np.bincount(np.minimum(bins[bins >= 0], WINDOW - 1), minlength=WINDOW)
    return Sketch(base, counts.astype(np.uint32))


@st.composite
def ranks_of_one_layer(draw):
    """(magnitudes of each rank, bases of their windows): 1 to 5 ranks, bases up to two octaves
    apart."""
    rng = np.random.default_rng(draw(seeds))
    kind, size = draw(st.sampled_from(list(CONTINUOUS))), draw(st.sampled_from([10, 300, 5000]))
    n_ranks, density = draw(st.sampled_from([1, 2, 5])), draw(densities)
    ranks = [np.abs(CONTINUOUS[kind](rng, size)).astype(np.float32) for _ in range(n_ranks)]
    thresholds = np.quantile(ranks, 1 - density, axis=1, method="nearest")
    bases = bin_of(thresholds).mean().astype(int) - BELOW + rng.integers(-8, 9, n_ranks)
    return ranks, np.maximum(bases, 0).tolist()


@given(ranks_of_one_layer())
def test_sketched_counts_are_exact_at_edges_that_every_window_covers(case):
    ranks, bases = case
    sketches = [full_sketch(values, base) for values, base in zip(ranks, bases, strict=True)]
    curves = SketchedCurves(*stacked([sketches]), np.array([len(ranks[0])]))
    covered = edges(max(bases), min(bases) + WINDOW - 1)  # the last bin holds all beyond it
    for edge in covered[:-1]:
        mean = np.mean([np.count_nonzero(values >= edge) for values in ranks])
        assert curves.at_least(0, edge) == pytest.approx(mean, rel=1e-12)


@given(ranks_of_one_layer())
def test_sketched_counts_fall_and_are_constant_below_the_windows(case):
    ranks, bases = case
    sketches = [full_sketch(values, base) for values, base in zip(ranks, bases, strict=True)]
    curves = SketchedCurves(*stacked([sketches]), np.array([len(ranks[0])]))
    thresholds = np.concatenate([[0], np.geomspace(1e-6, 1e6, 500)])
    counts = np.array([curves.above(0, threshold) for threshold in thresholds])
    assert np.all(np.diff(counts) <= 0)
    (bottom,) = edges(max(bases), max(bases))
    assert np.all(counts[thresholds <= bottom] == curves.above(0, bottom))
    assert counts[-1] == 0


@given(ranks_of_one_layer(), st.floats(0, 1))
def test_sketched_thresholds_lie_in_the_bin_of_the_exact_ones(case, share):
    ranks, _ = case
    # One rank's data, several times: the mean curve is the exact one.
    values, n = ranks[0], 1 + round(share * (len(ranks[0]) - 1))
    exact = ExactCurves([values]).smallest_sent(np.array([n]))[0]
    base = max(0, int(bin_of(np.array([exact]))[0]) - BELOW)
    curves = SketchedCurves(
        *stacked([[full_sketch(values, base)] * len(ranks)]), np.array([len(values)])
    )
    sketched = curves.smallest_sent(np.array([n]))[0]
    low, high = edges(*(bin_of(np.array([exact]))[0] + [0, 1]))
    assert low <= sketched <= high
    assert curves.at_least(0, sketched) == pytest.approx(n, rel=1e-9)


def test_largest_unsent_is_the_next_entry_and_none_where_no_window_shows_one():
    values = np.array([1.0, 1.01, 8.0, 0.01], np.float32)
    base = int(bin_of(np.array([1.0]))[0])
    curves = SketchedCurves(*stacked([[full_sketch(values, base)]]), np.array([4]))
    assert curves.largest_unsent(np.array([1]))[0] == pytest.approx(1, rel=0.125)
    assert curves.largest_unsent(np.array([2]))[0] == pytest.approx(1, rel=0.125)
    assert curves.largest_unsent(np.array([3]))[0] == -np.inf  # 0.01 lies below the window
    assert curves.largest_unsent(np.array([4]))[0] == -np.inf


def test_ranks_with_other_windows_add_up_in_their_common_part():
    low = Sketch(80, np.full(WINDOW, 2, np.uint32))
    high = Sketch(84, np.full(WINDOW, 4, np.uint32))
    curves = SketchedCurves(*stacked([[low, high]]), np.array([1000]))
    everything = (2 * (WINDOW - 4) + 4 * WINDOW) / 2
    for edge, count in [(0, everything), (80, everything), (84, everything), (85, everything - 3)]:
        assert curves.at_least(0, edges(edge, edge)[0]) == count
    above_the_low_window = edges(80 + WINDOW, 80 + WINDOW)[0]
    assert curves.at_least(0, above_the_low_window) == 4 * 4 / 2


def test_more_than_all_windows_show_has_its_threshold_where_they_begin():
    sketches = [Sketch(80, np.ones(WINDOW, np.uint32)), Sketch(84, np.ones(WINDOW, np.uint32))]
    curves = SketchedCurves(*stacked([sketches]), np.array([1000]))
    shown = WINDOW - 4 / 2
    for k in (np.floor(shown), np.ceil(shown) + 1, 999):
        assert curves.smallest_sent(np.array([k]))[0] == edges(84, 84)[0]
        assert curves.largest_unsent(np.array([k]))[0] == -np.inf


@given(models(kinds=tuple(CONTINUOUS)))
def test_common_threshold_shares_out_the_total(model):
    sketches = [
        [full_sketch(np.abs(layer), max(0, int(bin_of(np.abs(layer)).max()) - 40))]
        for layer in model.layers
    ]
    curves = SketchedCurves(*stacked(sketches), model.sizes)
    least = np.minimum(model.min_k, model.sizes)
    counts = np.clip(curves.counts, least[:, None], model.sizes[:, None])
    total = int(min(model.k.sum(), counts[:, 0].sum()))
    shares = curves.at_common_threshold(total, least)
    assert shares.sum() == pytest.approx(total, rel=1e-9)
    # Common: in one and the same bin, each layer sends what is above the bin and not what is below.
    tall = shares[:, None] * (1 + 1e-9)
    assert np.any(np.all((counts[:, 1:] <= tall) & (tall <= counts[:, :-1] * (1 + 2e-9)), axis=0))


def test_windows_may_be_of_any_length():
    """Whole histograms are windows too."""
    magnitudes = [np.array([1.0, 2.0, 2.5, 8.0], np.float32), np.array([0.5, 4.0], np.float32)]
    counts = np.array([[np.bincount(bin_of(m), minlength=N_BINS)] for m in magnitudes])
    curves = SketchedCurves(np.zeros((2, 1)), counts, np.array([4, 2]))
    exact = ExactCurves(magnitudes)
    for edge in (0.25, 1.0, 2.25, 4.0, 16.0):
        for layer in (0, 1):
            assert curves.at_least(layer, edge) == exact.at_least(layer, edge)
    assert curves.at_common_threshold(3, np.array([1, 1])) == pytest.approx([2, 1], abs=0.01)


def test_more_than_all_windows_show_is_everything_they_show():
    curves = SketchedCurves(
        *stacked([[Sketch(8, np.ones(WINDOW, np.uint32))]] * 2), np.array([99, 99])
    )
    assert curves.at_common_threshold(150, np.array([1, 1])).tolist() == [WINDOW, WINDOW]
