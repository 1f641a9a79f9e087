"""Buckets' budgets: constant under noise, following what lasts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_dls.core.balancing.budgets import Budgets
from tests.core.strategies import seeds

SIZES = np.array([1000, 4000, 500, 9000, 300, 2000])
LEAST = np.ones(6, np.int64)
ROWS = [np.array([3, 4, 5]), np.array([0, 1, 2])]
START = np.array([10, 40, 5, 90, 3, 20])


def make(k=START, rows=ROWS):
    return Budgets(rows, SIZES, LEAST, k)


def noisy(rng, k, share):
    """The same total, spread a little differently."""
    weights = k * np.exp(rng.normal(0, share, len(k)))
    noise = np.floor(weights / weights.sum() * (k.sum() - len(k))).astype(np.int64) + 1
    noise[0] += k.sum() - noise.sum()
    return noise


@given(seeds, st.sampled_from([0.01, 0.3, 2.0]))
def test_all_entries_are_shared_out_within_the_limits(seed, share):
    rng, budgets = np.random.default_rng(seed), make()
    for _ in range(20):
        k = budgets.fit(noisy(rng, START, share))
        assert k.sum() == START.sum() == budgets.budgets.sum()
        assert np.all((k >= LEAST) & (k <= SIZES))
        assert [k[rows].sum() for rows in ROWS] == budgets.budgets.tolist()


def test_noise_leaves_budgets_alone_and_layers_move_within_them():
    rng, budgets = np.random.default_rng(0), make()
    seen = [budgets.fit(noisy(rng, START, 0.1)) for _ in range(300)]
    assert {tuple(k[rows].sum() for rows in ROWS) for k in seen} == {(113, 55)}
    assert len({tuple(k) for k in seen}) > 100


@pytest.mark.parametrize("late", [0, 100])
def test_what_lasts_is_followed(late):
    rng, budgets = np.random.default_rng(1), make()
    for _ in range(late):
        budgets.fit(noisy(rng, START, 0.05))
    shifted = np.array([30, 70, 10, 40, 3, 15])
    for _ in range(60):
        budgets.fit(noisy(rng, shifted, 0.05))
    assert budgets.budgets == pytest.approx([58, 110], rel=0.21)


def test_one_bucket_sends_what_is_wanted():
    budgets = make(rows=[np.arange(6)])
    shifted = np.array([60, 70, 10, 10, 3, 15])
    assert budgets.fit(shifted) is shifted


def test_layers_already_in_their_budget_stay_as_wanted():
    within = np.array([15, 35, 5, 95, 3, 15])
    assert make().fit(within).tolist() == within.tolist()
