"""The ratios, from all ranks' sketches."""

import numpy as np
import pytest

from hvd_dls.config import DLSConfig
from hvd_dls.core.balancing.controller import Controller
from hvd_dls.core.balancing.layers import layer_spec
from hvd_dls.core.session.planning import make_plan
from tests.core.taking import stacked, take

NAMES = ["a", "b", "c", "d"]
SCALES = {"a": 1.0, "b": 0.1, "c": 10.0, "d": 1.0}
LAYERS = [layer_spec(name, (50, 100)) for name in NAMES]


def make(**options):
    config = DLSConfig(**{"density": 0.02, "cost_rule": False, "dense_below": 0} | options)
    return Controller(make_plan(LAYERS, config, 2), config, np.full(4, 100))


def sketches(controller, names=NAMES, seed=0):
    """Two ranks' sketches of Gaussian layers, as these would send them now."""
    rng, found = np.random.default_rng(seed), {}
    for name in names:
        found[name] = []
        for _ in range(2):
            values = SCALES[name] * rng.standard_normal(5000)
            found[name].append(take(values, controller.k_of(name))[0].sketch)
    return found


def advance(controller, arrived):
    """Ends a step with these sketches."""
    names = sorted(arrived)
    rows = np.array([NAMES.index(name) for name in names], np.int64)
    bases, counts = stacked([arrived[name] for name in names])
    controller.advance(rows, bases, counts)


@pytest.mark.parametrize("pair_steps", [None, 1, 4])
def test_entries_move_to_layers_of_larger_magnitudes(pair_steps):
    controller = make(pair_steps=pair_steps)
    for _ in range(10):
        advance(controller, sketches(controller))
        assert controller.k.sum() == 400
    assert controller.k_of("c") > 380
    assert controller.k_of("b") == 1


@pytest.mark.parametrize("min_k", [1, 30])
def test_no_layer_falls_below_the_floor(min_k):
    controller = make(min_k=min_k)
    for seed in range(5):
        advance(controller, sketches(controller, seed=seed))
        assert controller.k.min() >= min_k
    assert controller.k_of("b") == min_k


@pytest.mark.parametrize("pair_steps", [1, 4])
def test_pair_steps_limits_the_layers_that_move_in_a_step(pair_steps):
    controller = make(pair_steps=pair_steps)
    before = controller.k.copy()
    advance(controller, sketches(controller))
    assert 2 <= np.count_nonzero(controller.k != before) <= 2 * pair_steps


@pytest.mark.parametrize("adjust_every", [1, 2, 5])
def test_ratios_move_in_every_so_many_eth_step(adjust_every):
    controller, moved = make(adjust_every=adjust_every, pair_steps=1), []
    for number in range(1, 11):
        before = controller.k.copy()
        advance(controller, sketches(controller, seed=number))
        assert controller.step == number
        if not np.array_equal(controller.k, before):
            moved.append(number)
    assert moved[0] == adjust_every
    assert all(number % adjust_every == 0 for number in moved)


def test_layerwise_never_moves():
    controller = make(strategy="layerwise")
    advance(controller, sketches(controller))
    assert controller.step == 1
    assert controller.k.tolist() == [100] * 4


@pytest.mark.parametrize("names", [[], ["c"], ["b", "c"], ["d", "b", "a"]])
def test_missing_layers_keep_their_k_and_the_others_share_theirs(names):
    controller = make()
    advance(controller, sketches(controller, names))
    missing = set(NAMES) - set(names)
    assert all(controller.k_of(name) == 100 for name in missing)
    assert controller.k.sum() == 400
    assert (len(names) > 1) == np.any(controller.k != 100)


def test_ties_go_by_the_plan_s_order():
    controller = make()
    controller.k[:] = [101, 100, 101, 100]
    advance(controller, dict.fromkeys(NAMES, sketches(controller)["a"]))
    assert controller.k.tolist() == [101, 101, 100, 100]


def test_a_layer_of_zeros_gives_what_it_has_and_takes_it_back():
    controller = make()
    arrived = sketches(controller)
    arrived["a"] = [take(np.zeros(5000), 100)[0].sketch] * 2
    advance(controller, arrived)
    assert controller.k_of("a") == 1
    for _ in range(3):
        advance(controller, sketches(controller))
    assert controller.k_of("a") == pytest.approx(controller.k_of("d"), abs=3)


def test_the_start_is_not_changed():
    k = np.full(4, 100)
    config = DLSConfig(density=0.02, cost_rule=False)
    controller = Controller(make_plan(LAYERS, config, 2), config, k)
    advance(controller, sketches(controller))
    assert k.tolist() == [100] * 4


# What density the next step has ----------------------------------------------------------------


@pytest.mark.parametrize("pair_steps", [None, 2])
def test_another_density_shares_out_what_was_wanted_before(pair_steps):
    controller = make(warmup_steps=3, warmup_density=0.16, pair_steps=pair_steps)
    controller.start_from(np.array([100, 200, 2500, 400]))
    controller.advance()  # 0.16, 0.08, 0.04
    assert controller.k.tolist() == [50, 100, 1250, 200]
    advance(controller, sketches(controller))
    assert controller.k.sum() == 800
    assert controller.k_of("c") > 625
    advance(controller, sketches(controller))
    assert controller.k.sum() == 400
    advance(controller, sketches(controller))
    assert controller.k.sum() == 400


def test_dense_steps_come_first_and_leave_the_ratios_alone():
    controller = make(dense_steps=2, warmup_steps=1, warmup_density=0.16)
    for number in range(2):
        assert controller.dense
        assert controller.density == 0.16
        assert not controller.measures_now
        controller.advance()
        assert controller.step == number + 1
        assert controller.k.tolist() == [100] * 4
    assert not controller.dense
    assert controller.density == 0.16
    controller.advance()
    assert controller.density == 0.02


def test_only_the_last_dense_step_measures():
    controller, measures = make(dense_steps=3, prior="measured"), []
    for _ in range(5):
        measures.append(controller.measures_now)
        controller.advance()
    assert measures == [False, False, True, False, False]
    assert make(prior="measured").dense_steps == 1
    assert make(prior="measured", strategy="layerwise").dense_steps == 0
    assert not make(prior="measured", strategy="layerwise", dense_steps=1).measures_now


def test_where_nothing_is_to_be_learnt_the_ratios_stay():
    controller = make()
    controller.advance()
    assert (controller.step, controller.k.tolist()) == (1, [100] * 4)


def test_layers_with_a_density_of_their_own_neither_give_nor_take():
    controller = make(layer_density={"c": 0.02})
    for _ in range(5):
        advance(controller, sketches(controller))
        assert controller.k_of("c") == 100
        assert controller.k.sum() == 400
    assert controller.k_of("b") == 1
    assert controller.k_of("a") == pytest.approx(controller.k_of("d"), abs=20)
