"""Layers that stay away leave their share to the others, and get one again when they come back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_dls.config import DLSConfig
from hvd_dls.core.balancing.attendance import PATIENCE
from hvd_dls.core.balancing.controller import Controller
from hvd_dls.core.balancing.layers import layer_spec
from hvd_dls.core.balancing.plan import initial_k
from hvd_dls.core.session.planning import make_plan
from tests.core.strategies import seeds
from tests.core.taking import stacked, take

SIZES = {"a": 1000, "b": 4000, "c": 500, "d": 9000, "e": 3000}
NAMES = list(SIZES)
BUCKETS = [None, [[0, 1, 2, 3, 4]], [[3, 4], [0, 1, 2]], [[4], [2, 3], [0, 1]]]


def make(buckets=None, **options):
    options = {"density": 0.02, "cost_rule": False, "dense_below": 0, "prior": "uniform"} | options
    config = DLSConfig(**options)
    plan = make_plan([layer_spec(name, (n, 1)) for name, n in SIZES.items()], config, 2)
    rows = None if buckets is None else [np.array(own) for own in buckets]
    return Controller(plan, config, initial_k(plan, config), rows)


def step(controller, rng, present, steps=1, octaves=4):
    """So many steps in which these layers take part, with Gaussian gradients of many scales."""
    for _ in range(steps):
        rows, found = np.array(sorted(NAMES.index(name) for name in present), np.int64), []
        for row in rows:
            values = 2.0 ** rng.integers(-octaves, octaves + 1) * rng.standard_normal(
                SIZES[NAMES[row]]
            )
            k = max(
                int(controller.k[row]), 1
            )  # of a layer without a share, the largest is looked at
            found.append([take(values, k)[0].sketch])
        bases, counts = stacked(found) if found else (np.zeros((0, 1)), np.zeros((0, 1, 48)))
        controller.advance(rows, bases, counts)


def k_of(controller):
    return dict(zip(NAMES, controller.k.tolist(), strict=True))


def check(controller):
    """What holds after every step."""
    plan, attendance = controller._plan, controller.attendance
    least = np.minimum(controller._config.min_k, plan.sizes)
    live = attendance.live
    for k in (controller.k, controller.wanted):
        assert (k[~live] == 0).all()
        assert (k[live] >= least[live]).all()
        assert (k <= plan.sizes).all()
        assert k[plan.sharing].sum() == max(
            plan.budget(controller.density, attendance),
            least[live & np.isnan(plan.own_density)].sum(),
        )
    fixed = plan.fixed_k(controller._config, controller.density)
    own = ~np.isnan(plan.own_density)
    assert np.array_equal(controller.k[own & live], fixed[own & live])
    assert controller.budgets.budgets.sum() == controller.k[plan.sharing].sum()


OPTIONS = [
    {},
    {"pair_steps": 2},
    {"adjust_every": 4},
    {"strategy": "layerwise"},
    {"strategy": "norm"},
    {"strategy": "global"},
    {"strategy": "hard", "threshold": 1.0},
    {"min_k": 20},
    {"density": 0.7},
    {"density": 1.0},
    {"layer_density": {"b": 0.1}},
    {"layer_density": {"[abde]": 0.1}},
    {"warmup_steps": 8, "density": 0.05},
]
each_option = pytest.mark.parametrize("options", OPTIONS, ids=str)
# With which there are shares to give away.
each_sharing = pytest.mark.parametrize(
    "options", [options for options in OPTIONS if options.get("density") != 1], ids=str
)
each_bucket = pytest.mark.parametrize("buckets", BUCKETS, ids=str)


@each_sharing
@each_bucket
def test_shares_of_those_that_stay_away_go_to_the_others_until_they_come_back(options, buckets):
    controller, rng = make(buckets, **options), np.random.default_rng(0)
    step(controller, rng, NAMES)
    before = controller._plan.budget(controller.density)
    step(controller, rng, "acd", PATIENCE - 1)
    check(controller)
    assert min(k_of(controller)[name] for name in "be") > 0
    step(controller, rng, "acd", 3)
    check(controller)
    assert [k_of(controller)[name] for name in "be"] == [0, 0]
    sharing = controller._plan.sharing
    if "density" not in options:
        assert controller.k[sharing].sum() == before
    step(controller, rng, NAMES)
    check(controller)
    assert controller.k.min() > 0
    step(controller, rng, NAMES, 3)
    check(controller)


@each_sharing
@each_bucket
def test_layers_that_never_come_count_as_if_they_were_not_compressed(options, buckets):
    controller, rng = make(buckets, **options), np.random.default_rng(0)
    step(controller, rng, "abc", PATIENCE + 2)
    check(controller)
    k, plan = k_of(controller), controller._plan
    shared = [name for name in "abc" if NAMES.index(name) in plan.sharing]
    entries = sum(SIZES[name] for name in shared)
    least = sum(min(options.get("min_k", 1), SIZES[name]) for name in shared)
    assert sum(k[name] for name in shared) == max(round(controller.density * entries), least)
    assert k["d"] == k["e"] == 0
    step(controller, rng, NAMES)
    check(controller)
    assert controller.k[plan.sharing].sum() == plan.budget(controller.density)


def test_what_the_living_cannot_hold_is_not_sent():
    controller, rng = make(density=0.5), np.random.default_rng(0)
    step(controller, rng, NAMES)
    step(controller, rng, "ac", PATIENCE)
    check(controller)
    assert k_of(controller) == {"a": 1000, "b": 0, "c": 500, "d": 0, "e": 0}
    step(controller, rng, NAMES)
    check(controller)
    assert controller.k.sum() == controller._plan.budget(0.5)


@pytest.mark.parametrize("buckets", BUCKETS, ids=str)
def test_where_least_numbers_are_more_than_the_budget_of_the_living_these_are_sent(buckets):
    """The plan's budget has room for them; that of the layers that ever came may not."""
    controller, rng = make(buckets, density=0.02, min_k=40), np.random.default_rng(0)
    step(controller, rng, "ac", PATIENCE + 3)
    check(controller)
    assert k_of(controller) == {"a": 40, "b": 0, "c": 40, "d": 0, "e": 0}


@each_bucket
def test_when_nobody_comes_nothing_is_sent_and_training_goes_on_all_the_same(buckets):
    controller, rng = make(buckets), np.random.default_rng(0)
    step(controller, rng, "", PATIENCE + 5)
    check(controller)
    assert controller.k.tolist() == [0] * 5
    for present in ("c", "c", "cd", NAMES):
        step(controller, rng, present)
        check(controller)
    assert controller.k.sum() == controller._plan.budget(0.02)


def test_one_that_comes_back_starts_from_the_density_and_is_balanced_then():
    controller, rng = make(), np.random.default_rng(0)
    step(controller, rng, NAMES, octaves=0)
    step(controller, rng, "abcd", 2 * PATIENCE, octaves=0)
    step(controller, rng, NAMES, octaves=0)
    # Its sketch was one of a single entry, so it is known down to two octaves below its largest.
    assert 30 < k_of(controller)["e"] < 90
    step(controller, rng, NAMES, 5, octaves=0)
    assert k_of(controller)["e"] == pytest.approx(60, abs=15)
    check(controller)


def test_other_strategies_share_out_by_size_again():
    controller, rng = make(strategy="layerwise"), np.random.default_rng(0)
    start = controller.k.copy()
    step(controller, rng, NAMES)
    step(controller, rng, "abd", PATIENCE)
    k = k_of(controller)
    for name, n in SIZES.items():
        there = n if name in "abd" else 0
        assert k[name] == pytest.approx(controller._plan.budget(0.02) * there / 14_000, abs=1)
    step(controller, rng, NAMES)
    assert np.array_equal(controller.k, start)


def test_a_warm_up_goes_on_among_the_living():
    controller = make(density=0.01, warmup_steps=2 * PATIENCE)  # 0.25, 0.125, ..., 0.015625
    rng, sent = np.random.default_rng(0), []
    step(controller, rng, NAMES)
    for _ in range(3 * PATIENCE):
        step(controller, rng, "abde")
        check(controller)
        sent.append(int(controller.k.sum()))
        assert sent[-1] == controller._plan.budget(controller.density)
    assert len(set(sent)) == 6
    assert controller.k[2] == 0


def test_dense_steps_tell_nothing_of_who_is_there():
    controller = make(dense_steps=3 * PATIENCE)
    for _ in range(3 * PATIENCE):
        controller.advance()
    assert controller.attendance.live.all()
    assert not controller.attendance.seen.any()


# In any order, and through a restart ------------------------------------------------------------

lives = st.lists(
    st.tuples(st.sets(st.sampled_from(NAMES)), st.sampled_from([1, 2, PATIENCE - 1, PATIENCE, 25])),
    min_size=1,
    max_size=5,
)


@settings(max_examples=40)
@given(st.sampled_from(OPTIONS), st.sampled_from(BUCKETS), lives, st.integers(0, 4), seeds)
def test_whoever_comes_and_goes_the_budget_is_kept_also_after_a_restart(
    options, buckets, life, restart, seed
):
    controller, rng, twin = make(buckets, **options), np.random.default_rng(seed), None
    for number, (present, steps) in enumerate(life):
        if number == restart:
            twin = make(buckets, **options)
            twin.restore(controller.state())
            rng = np.random.default_rng(seed)
            twin_rng = np.random.default_rng(seed)
        for _ in range(steps):
            step(controller, rng, present)
            check(controller)
            if twin is not None:
                step(twin, twin_rng, present)
        if twin is not None:
            assert np.array_equal(twin.state(), controller.state())


@each_sharing
def test_a_state_of_other_buckets_keeps_who_is_live(options):
    controller, rng = make(BUCKETS[2], **options), np.random.default_rng(0)
    step(controller, rng, NAMES)
    step(controller, rng, "ab", PATIENCE + 2)
    other = make(BUCKETS[3], **options)
    other.restore(controller.state())
    check(other)
    assert np.array_equal(other.k, controller.k)
    assert np.array_equal(other.attendance.state(), controller.attendance.state())
    step(other, rng, "ab", 3)
    check(other)
    assert [k_of(other)[name] for name in "cde"] == [0, 0, 0]


@pytest.mark.parametrize("options", [{"density": 1.0}, {"density": 1.0, "strategy": "layerwise"}])
def test_at_density_one_nobody_has_a_share_to_give(options):
    """As others send all they have: what comes back is sent at once, as dense training does."""
    controller, rng = make(**options), np.random.default_rng(0)
    for present in (NAMES, "abcd", "a", NAMES):
        step(controller, rng, present, 3 * PATIENCE)
        assert k_of(controller) == SIZES
        check(controller)


def test_a_state_of_density_one_in_which_a_layer_is_away_is_gone_on_from():
    """Earlier versions had such states."""
    controller, rng = make(density=1.0), np.random.default_rng(0)
    for _ in range(2 * PATIENCE):
        controller.attendance.observe(np.array([name != "e" for name in NAMES]))
    controller.start_at(2 * PATIENCE)
    assert k_of(controller) == SIZES | {"e": 0}
    restored = make(density=1.0)
    restored.restore(controller.state())
    step(restored, rng, "abcd", 3)
    assert k_of(restored) == SIZES | {"e": 0}
    step(restored, rng, NAMES)
    assert k_of(restored) == SIZES
    check(restored)
