"""Measures of balance."""

import math

import numpy as np
import pytest
from hypothesis import given

from hvd_dls.core.balancing.balance import optimal_adjustment
from hvd_dls.core.balancing.curves import ExactCurves
from hvd_dls.core.session.telemetry import StepRecord, measure_quality
from tests.core.strategies import models, split
from tests.core.taking import take


def record(thresholds, k):
    k = np.array(k)
    return StepRecord(1, 0.0, tuple("abcdef"[: len(k)]), k, k, np.array(thresholds), 0, 0)


@pytest.mark.parametrize(
    ("thresholds", "k", "spread"),
    [
        ([1.0, 4.0, 2.0], [10, 10, 10], 4.0),
        ([1.0, 4.0, 2.0], [9, 10, 10], 2.0),
        ([0.0, 4.0], [10, 10], math.inf),
        ([0.0, 4.0, 2.0], [9, 10, 10], 2.0),
    ],
)
def test_spread_is_largest_over_smallest_threshold_of_layers_with_ten_entries(
    thresholds, k, spread
):
    assert record(thresholds, k).threshold_spread() == spread


@pytest.mark.parametrize("k", [[9, 9], [9, 10], [10]])
def test_spread_of_fewer_than_two_layers_is_nan(k):
    assert math.isnan(record([1.0] * len(k), k).threshold_spread())


def test_spread_takes_another_limit():
    assert record([1.0, 4.0], [5, 5]).threshold_spread(least_k=5) == 4


def quality(model, k):
    taken = [take(layer, n) for layer, n in zip(model.layers, k, strict=True)]
    return measure_quality([found.values for found, _ in taken], [rest for _, rest in taken])


@given(models())
def test_quality_is_that_of_brute_force(model):
    found = quality(model, model.k)
    total = model.k.sum()
    magnitudes = np.concatenate([np.abs(layer) for layer in model.layers])
    owner = np.repeat(np.arange(len(model.layers)), model.sizes)
    sent, _ = split(model, model.k)
    best = np.sort(magnitudes)[::-1][:total]
    energies = [np.square(x, dtype=float).sum() for x in (np.concatenate(sent), best)]
    assert found.energy == pytest.approx(energies[0] / energies[1] if energies[1] else 1)
    # Of all equally good choices k*, the one nearest to k: each layer sends what is above the
    # global threshold, and of the ties at it as many as k likes, while there are any.
    above = np.bincount(owner[magnitudes > best[-1]], minlength=len(model.layers))
    ties = np.bincount(owner[magnitudes == best[-1]], minlength=len(model.layers))
    nearest = np.clip(model.k, above, above + ties)
    surplus = nearest.sum() - total
    for row in range(len(nearest)):
        limit = above[row] if surplus > 0 else above[row] + ties[row]
        step = np.sign(surplus) * min(abs(surplus), abs(nearest[row] - limit))
        nearest[row] -= step
        surplus -= step
    assert surplus == 0
    assert found.misallocation == pytest.approx(np.abs(model.k - nearest).sum() / (2 * total))
    assert found.best_k.sum() == total
    assert (found.best_k >= above).all()
    assert (found.best_k <= above + ties).all()
    assert np.abs(model.k - found.best_k).sum() == np.abs(model.k - nearest).sum()


def test_more_ties_than_the_budget_has_room_for_are_misplaced():
    # The best three are 5, 4 and one 3.
    found = measure_quality(
        [np.array([5.0]), np.array([3.0, -3.0])], [np.array([4.0]), np.array([3.0])]
    )
    assert found.misallocation == pytest.approx(1 / 3)
    assert found.energy == pytest.approx((25 + 9 + 9) / (25 + 16 + 9))


@given(models())
def test_the_balanced_choice_is_ideal(model):
    floor_is_free = np.ones(len(model.layers))
    k = optimal_adjustment(ExactCurves(model.layers), model.k, min_k=1)
    found = quality(model, k)
    if np.all(k > floor_is_free):
        assert found.misallocation == 0
        assert found.energy == pytest.approx(1)
    assert found.energy >= quality(model, model.k).energy - 1e-12


@pytest.mark.parametrize("sent", [[], [np.empty(0)], [np.empty(0, np.float32)] * 2], ids=str)
def test_nothing_is_sent_ideally(sent):
    found = measure_quality(sent, [np.ones(3)] * len(sent))
    assert (found.energy, found.misallocation) == (1, 0)


def test_nothing_but_zeros_is_sent_ideally():
    found = measure_quality([np.zeros(3), np.zeros(1)], [np.zeros(10), np.zeros(5)])
    assert (found.energy, found.misallocation) == (1, 0)
