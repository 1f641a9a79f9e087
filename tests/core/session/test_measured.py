"""prior="measured": k from the whole gradients of a dense first step."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_dls.config import DLSConfig
from hvd_dls.core.balancing.layers import layer_spec
from hvd_dls.core.balancing.plan import measured_k
from hvd_dls.core.balancing.sketch import N_BINS, bin_of, histogram
from hvd_dls.core.session.planning import make_plan
from tests.core.ranks import LAYERS, draw_gradients, k_of, make_sessions, run, step
from tests.core.strategies import KINDS, seeds


def bounds(gradients, total, least):
    """Of each layer: the entries in bins above that of the common threshold, and with that bin.

    The threshold is such that ``total`` entries reach it, where each layer counts with ``least``.
    """
    bins = [bin_of(np.abs(gradient)) for gradient in gradients]
    above = np.array([[np.count_nonzero(b >= edge) for edge in range(1, N_BINS + 1)] for b in bins])
    sizes = np.array(list(map(len, gradients)))[:, None]
    above = np.clip(above, np.minimum(least, sizes), sizes)
    edge = np.flatnonzero(above.sum(axis=0) >= total)
    if not len(edge):  # not even all that is not zero
        return above[:, 0], sizes[:, 0]
    return above[:, min(edge[-1] + 1, N_BINS - 1)], above[:, edge[-1]]


@st.composite
def models(draw):
    rng = np.random.default_rng(draw(seeds))
    kind, count = draw(st.sampled_from(list(KINDS))), draw(st.sampled_from([1, 2, 6]))
    scales = rng.choice(draw(st.sampled_from([[1.0], [0.0], [0.0, 1.0], [0.01, 1.0, 30.0]])), count)
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    sizes = [draw(st.sampled_from([40, 300, 2000])) for _ in range(count)]
    return [(s * KINDS[kind](rng, n)).astype(dtype) for s, n in zip(scales, sizes, strict=True)]


@settings(max_examples=40)
@given(models(), st.sampled_from([0.01, 0.1, 0.5, 1.0]), st.sampled_from([1, 20]))
def test_k_is_the_count_above_a_common_threshold_within_a_bin(gradients, density, min_k):
    layers = [layer_spec(f"l{i}", (len(g), 1)) for i, g in enumerate(gradients)]
    density = max(density, min_k * len(layers) / sum(map(len, gradients)))
    config = DLSConfig(density=density, min_k=min_k, dense_below=0, cost_rule=False)
    plan = make_plan(layers, config, 2)
    total = plan.budget(density)
    histograms = {f"l{i}": histogram(g) for i, g in enumerate(gradients)}
    k = measured_k(plan, config, histograms, density)
    assert k.sum() == total
    low, high = bounds(gradients, total, min_k)
    assert np.all((low - 1 <= k) & (k <= high + 1))


@given(seeds, st.sampled_from([np.float16, np.float32, np.float64]))
def test_histograms_count_magnitudes_by_their_bins(seed, dtype):
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal(300) * 2.0 ** rng.integers(-10, 10, 300)).astype(dtype)
    counts = histogram(values)
    assert counts.shape == (N_BINS,)
    assert counts.sum() == 300
    assert np.array_equal(counts, histogram(-values))
    for edge in np.flatnonzero(counts):
        assert counts[edge] == np.count_nonzero(bin_of(np.abs(values)) == edge)


def test_a_layer_without_a_gradient_gets_the_least():
    config = DLSConfig(density=0.1, min_k=3, cost_rule=False, dense_below=0)
    plan = make_plan([layer_spec(name, (100, 10)) for name in "abc"], config, 2)
    values = np.random.default_rng(0).standard_normal(1000)
    k = measured_k(plan, config, {"a": histogram(values), "c": histogram(values)}, 0.1)
    assert k.tolist() == [149, 3, 148]


# In sessions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dense_steps": 3},
        {"density": 0.1, "min_k": 40},
        {"warmup_steps": 4},
        {"layer_density": {"conv2*": 0.1}},
        {"bucket_bytes": 1},
        {"momentum": 0.5},
        {"strategy": "dls", "pair_steps": 1},
    ],
    ids=str,
)
def test_the_dense_step_s_sums_give_k_the_same_on_all_ranks(options):
    sessions = make_sessions(3, prior="measured", **options)
    rng, plan, config = np.random.default_rng(0), sessions[0].plan, sessions[0].config
    for _ in range(max(config.dense_steps, 1)):
        assert sessions[0].dense_step
        sums = run(sessions, rng, 1)
    assert not sessions[0].dense_step
    density = 0.25 if config.warmup_steps else config.density
    names = [plan.sparse[row].name for row in plan.sharing]
    low, high = bounds([sums[name] for name in names], plan.budget(density), config.min_k)
    for session in sessions:
        assert np.array_equal(session.agreed(), sessions[0].agreed())
        k = session.k[plan.sharing]
        assert k.sum() == plan.budget(density)
        assert np.all((low - 1 <= k) & (k <= high + 1))
    run(sessions, rng, 1)
    assert sessions[0].last_step.k[plan.sharing].tolist() == k.tolist()


def test_the_first_sparse_step_is_balanced_then():
    sessions, rng = make_sessions(2, prior="measured", density=0.05), np.random.default_rng(0)
    run(sessions, rng, 2)
    assert sessions[0].last_step.threshold_spread() < 2
    sessions, rng = make_sessions(2, prior="uniform", density=0.05), np.random.default_rng(0)
    run(sessions, rng, 1)
    assert sessions[0].last_step.threshold_spread() > 20


@pytest.mark.parametrize("strategy", ["layerwise", "norm", "global"])
@pytest.mark.parametrize("dense_steps", [0, 2])
def test_other_strategies_do_not_measure(strategy, dense_steps):
    options = {"strategy": strategy, "dense_steps": dense_steps, "density": 0.05}
    plain, measured = make_sessions(2, **options), make_sessions(2, prior="measured", **options)
    assert measured[0].dense_step == (dense_steps > 0)
    for seed in range(4):
        for sessions in (plain, measured):
            run(sessions, np.random.default_rng(seed), 1)
        assert k_of(plain[0]) == k_of(measured[0])
        assert np.array_equal(plain[0].last_step.k, measured[0].last_step.k)


@pytest.mark.parametrize("n_ranks", [1, 2])
@pytest.mark.parametrize(
    "options", [{"dense_below": 1 << 30}, {"layer_density": {"*": 0.1}}], ids=str
)
def test_where_no_layer_shares_the_budget_there_is_nothing_to_measure(n_ranks, options):
    sessions = make_sessions(n_ranks, prior="measured", **options)
    fixed = sessions[0].k.tolist()
    run(sessions, np.random.default_rng(0), 3)
    assert sessions[0].k.tolist() == fixed
    assert sessions[0].last_step.step == 3


def test_a_dense_step_of_zeros_tells_nothing_and_training_goes_on():
    sessions, rng = make_sessions(2, prior="measured"), np.random.default_rng(0)
    zeros = {layer.name: np.zeros(layer.size, np.float32) for layer in LAYERS}
    step(sessions, [zeros] * 2)
    assert sessions[0].k.sum() == sessions[0].plan.budget(0.01)
    run(sessions, rng, 10)
    assert sessions[0].last_step.threshold_spread() < 1.5


def test_only_layers_of_the_last_dense_step_are_measured():
    sessions, rng = make_sessions(2, prior="measured", min_k=5), np.random.default_rng(0)
    gradients = [draw_gradients(rng, session) for session in sessions]
    step(sessions, [{n: g for n, g in each.items() if n != "conv2.weight"} for each in gradients])
    assert k_of(sessions[0])["conv2.weight"] == 5
    assert k_of(sessions[0]) == k_of(sessions[1])
