"""Layers with a density of their own beside those that share the budget."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_dls.config import DLSConfig
from hvd_dls.core.balancing.plan import initial_k
from hvd_dls.core.balancing.schedule import density_at
from hvd_dls.core.session.baselines import BASELINES
from hvd_dls.core.session.planning import make_plan
from hvd_dls.errors import DLSError
from tests.core.ranks import LAYERS, SPARSE, draw_gradients, make_sessions, run, step
from tests.core.strategies import seeds

SIZES = {"conv1.weight": 2400, "conv2.weight": 18_432, "conv3.weight": 1280, "fc.weight": 46_080}


def plan_of(pairs, world_size=2, **options):
    options = {"cost_rule": False} | options
    return make_plan(LAYERS, DLSConfig(layer_density=pairs, **options), world_size)


def sent(session):
    return dict(zip(session.last_step.names, session.last_step.k.tolist(), strict=True))


# Which layers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pairs", "own"),
    [
        ({"conv1.weight": 0.5}, [0.5, None, None, None]),
        ({"conv*": 0.5}, [0.5, 0.5, 0.5, None]),
        ({"conv[13]*": 0.5}, [0.5, None, 0.5, None]),
        ({"conv?.weight": 0.5, "*": 0.1}, [0.5, 0.5, 0.5, 0.1]),
        ({"*": 0.1, "conv?.weight": 0.5}, [0.1] * 4),
        ([("conv2*", 0.2), ("conv2*", 0.3), ("*2*", 0.4)], [None, 0.2, None, None]),
        ({"*.bias": 0.1}, [None] * 4),
        ({}, [None] * 4),
    ],
)
def test_the_first_pattern_that_matches_counts(pairs, own):
    plan = plan_of(pairs)
    assert [None if np.isnan(d) else d for d in plan.own_density] == own
    assert plan.sharing.tolist() == [row for row, density in enumerate(own) if density is None]
    shared = sum(SIZES[SPARSE[row]] for row in plan.sharing)
    assert plan.budget(0.01) == round(0.01 * shared)


def test_dense_ones_go_dense_and_say_why():
    plan = plan_of({"conv2*": "dense", "fc.bias": "dense", "*": 0.1})
    assert [layer.name for layer in plan.sparse] == ["conv1.weight", "conv3.weight", "fc.weight"]
    whys = {layer.name: why for layer, why in plan.dense}
    assert whys["conv2.weight"] == whys["fc.bias"] == "layer_density says so"
    assert whys["conv1.bias"] == "bias, normalisation or scalar"
    assert plan.budget(0.01) == 0


def test_a_pattern_that_matches_no_layer_is_refused_by_its_name():
    with pytest.raises(DLSError, match=r"no layer's name matches 'conv9\*'; there are conv1.weig"):
        plan_of({"conv1*": 0.1, "conv9*": 0.5})
    with pytest.raises(DLSError, match=r"no layer's name matches 'CONV1.weight'"):
        plan_of({"CONV1.weight": 0.1})
    plan_of({"*": 0.1, "conv1*": 0.5})  # it would, if it came first


def test_one_rank_sends_nothing_all_the_same():
    assert plan_of({"*": 0.5}, world_size=1).sparse == ()


def test_the_cost_rule_goes_by_the_layer_s_own_density():
    plan = plan_of({"fc.weight": 0.9, "conv2*": 0.1}, world_size=4, cost_rule=True, density=0.05)
    whys = {layer.name: why for layer, why in plan.dense}
    assert "a dense allreduce moves no more bytes" in whys["fc.weight"]
    assert "conv2.weight" in [layer.name for layer in plan.sparse]
    plan = plan_of({"fc.weight": 0.01}, world_size=4, cost_rule=True, density=0.9)
    assert [layer.name for layer in plan.sparse] == ["fc.weight"]


def test_the_budget_s_floor_is_that_of_the_layers_that_share_it():
    options = {"density": 0.01, "min_k": 24}
    with pytest.raises(DLSError, match=r"13 of 1280 entries, but 1 layers with min_k=24 need 24"):
        plan_of({"conv[12]*": 0.1, "fc*": 0.1}, **options)
    plan_of({"conv*": 0.001, "fc*": 0.1}, **options)


# How much ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["dls", "layerwise", "global", "norm", "hard"])
@pytest.mark.parametrize("density", [0.001, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("min_k", [1, 30])
def test_own_densities_are_rounded_and_at_least_min_k(strategy, density, min_k):
    config = DLSConfig(
        strategy=strategy,
        threshold=1.0 if strategy == "hard" else None,
        layer_density={"conv1*": density, "fc*": density},
        density=0.05,
        min_k=min_k,
        cost_rule=False,
    )
    k = dict(zip(SPARSE, initial_k(make_plan(LAYERS, config, 2), config).tolist(), strict=True))
    for name in ("conv1.weight", "fc.weight"):
        assert k[name] == max(round(density * SIZES[name]), min_k)
    assert k["conv2.weight"] + k["conv3.weight"] == round(0.05 * (18_432 + 1280))


@settings(max_examples=20)
@given(
    seed=seeds,
    strategy=st.sampled_from(["dls", "layerwise", "global", "norm", "hard"]),
    pairs=st.sampled_from(
        [
            {"conv1*": 0.2},
            {"conv1*": 0.001, "conv3*": 1.0},
            {"conv2*": 0.1, "fc*": "dense"},
            {"conv[12]*": 0.3, "conv3*": 0.02},  # one layer has the budget for itself
            {"*": 0.03},
        ]
    ),
    bucket_bytes=st.sampled_from([1, 90_000, 1 << 25]),
    warmup_steps=st.sampled_from([0, 4]),
    pair_steps=st.sampled_from([None, 3]),
)
def test_they_stay_fixed_while_the_others_share(
    seed, strategy, pairs, bucket_bytes, warmup_steps, pair_steps
):
    sessions = make_sessions(
        2,
        strategy=strategy,
        threshold=6.0 if strategy == "hard" else None,
        layer_density=pairs,
        bucket_bytes=bucket_bytes,
        warmup_steps=warmup_steps,
        warmup_density=0.4,
        pair_steps=pair_steps,
    )
    rng, plan, config = np.random.default_rng(seed), sessions[0].plan, sessions[0].config
    for number in range(warmup_steps + 8):
        density = density_at(config, number)
        gradients = [draw_gradients(rng, session) for session in sessions]
        for gradient in gradients:  # what the others want differs from step to step
            for name in gradient:
                gradient[name] *= 2.0 ** rng.integers(-4, 5)
        step(sessions, gradients, rng)
        for session in sessions:
            k = session.last_step.k
            for row, own in enumerate(plan.own_density):
                if not np.isnan(own):
                    lifted = density if density > config.density and density > own else own
                    assert k[row] == max(round(lifted * plan.sizes[row]), 1)
            if strategy != "hard":
                assert k[plan.sharing].sum() == plan.budget(density)
            if strategy not in BASELINES:
                assert np.array_equal(session.agreed(), sessions[0].agreed())


def test_they_stay_fixed_when_the_budgets_of_buckets_move():
    sessions = make_sessions(2, layer_density={"conv1*": 0.2}, density=0.05, bucket_bytes=90_000)
    assert [len(bucket.layers) for bucket in sessions[0].routing.buckets] == [1, 3]
    rng, sent = np.random.default_rng(0), []
    for number in range(12):
        gradients = [draw_gradients(rng, session) for session in sessions]
        for gradient in gradients:
            gradient["fc.weight"] *= 2.0**number
        step(sessions, gradients)
        assert sessions[0].last_step.k[0] == 480
        assert sessions[0].last_step.k.sum() == 480 + sessions[0].plan.budget(0.05)
        sent.append(sessions[0].last_step.k[3])
    assert max(sent) - min(sent) > 1000


def test_they_stay_fixed_when_layers_are_missing():
    sessions, rng = make_sessions(2, layer_density={"conv2*": 0.1}), np.random.default_rng(0)
    for present in (SPARSE, SPARSE[1:2], SPARSE[:2], SPARSE[2:], ["fc.bias"], SPARSE):
        gradients = [draw_gradients(rng, session) for session in sessions]
        step(sessions, [{name: g[name] for name in present} for g in gradients])
        assert sessions[0].k[1] == 1843
        assert sessions[0].k.sum() == 1843 + sessions[0].plan.budget(0.01)


def test_the_others_become_balanced_among_themselves():
    sessions = make_sessions(2, layer_density={"conv1*": 0.05}, density=0.3)
    run(sessions, np.random.default_rng(0), 8)
    thresholds = sessions[0].last_step.thresholds
    assert thresholds[1:].max() < 1.5 * thresholds[1:].min()
    assert thresholds[0] > 10 * thresholds[1:].max()
