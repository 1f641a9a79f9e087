"""How dense each step is: dense at first, then stairs down to the configured density."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_dls.config import DLSConfig
from hvd_dls.core.balancing.schedule import density_at
from tests.core.ranks import LAYERS, draw_gradients, k_of, make_sessions, run, same, step
from tests.core.strategies import seeds

configs = st.builds(
    DLSConfig,
    density=st.sampled_from([1e-6, 0.001, 0.01, 0.03, 0.25, 1.0]) | st.floats(1e-6, 1),
    warmup_steps=st.integers(0, 60) | st.integers(0, 100_000),
    warmup_density=st.sampled_from([0.25, 0.5, 1.0]) | st.floats(1e-6, 1),
)


def densities(config):
    return [density_at(config, step) for step in range(config.warmup_steps)]


@given(configs, st.integers(0, 1000))
def test_from_the_last_warm_up_step_on_the_density_is_the_configured_one(config, later):
    assert density_at(config, config.warmup_steps + later) == config.density


@given(configs)
def test_the_density_falls_in_exact_halves_and_stays_above_the_configured_one(config):
    warmup = densities(config)[:2000]
    if config.warmup_density <= config.density:
        assert set(warmup) <= {config.density}
        return
    assert not warmup or warmup[0] == config.warmup_density
    for density in warmup:
        assert density > config.density
        halvings = Fraction(config.warmup_density) / Fraction(density)
        assert halvings.denominator == 1
        assert halvings.numerator & (halvings.numerator - 1) == 0
    assert all(after <= before for before, after in pairwise(warmup))


@given(st.floats(1e-4, 1), st.sampled_from([0.25, 0.5, 1.0]), st.integers(1, 40))
def test_all_stairs_are_equally_long_and_the_last_is_less_than_twice_as_high(density, start, each):
    stairs = 0
    while start / 2**stairs > density:
        stairs += 1
    config = DLSConfig(density=density, warmup_density=start, warmup_steps=max(stairs, 1) * each)
    counted = np.unique(densities(config), return_counts=True)
    if stairs:
        assert counted[0].tolist() == [start / 2**stair for stair in reversed(range(stairs))]
        assert set(counted[1]) == {each}
        assert counted[0][0] <= 2 * density


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (0, [0.1]),
        (1, [0.8, 0.1]),
        (2, [0.8, 0.4, 0.1]),
        (3, [0.8, 0.4, 0.2, 0.1]),
        (7, [0.8, 0.8, 0.8, 0.4, 0.4, 0.2, 0.2, 0.1]),
    ],
)
def test_stairs_by_example(steps, expected):
    config = DLSConfig(density=0.1, warmup_steps=steps, warmup_density=0.8)
    assert [density_at(config, step) for step in range(steps + 1)] == expected


# In a session -----------------------------------------------------------------------------------


@settings(max_examples=12)
@given(
    seed=seeds,
    strategy=st.sampled_from(["dls", "layerwise", "global", "norm"]),
    dense_steps=st.integers(0, 2),
    warmup_steps=st.integers(0, 6),
    bucket_bytes=st.sampled_from([1, 50_000, 1 << 25]),
    pair_steps=st.sampled_from([None, 2]),
)
def test_each_step_sends_the_rounded_share_of_all_entries(
    seed, strategy, dense_steps, warmup_steps, bucket_bytes, pair_steps
):
    sessions = make_sessions(
        2,
        strategy=strategy,
        density=0.013,
        dense_steps=dense_steps,
        warmup_steps=warmup_steps,
        warmup_density=0.3,
        bucket_bytes=bucket_bytes,
        pair_steps=pair_steps,
    )
    rng, config = np.random.default_rng(seed), sessions[0].config
    entries = sum(layer.size for layer in sessions[0].plan.sparse)
    for number in range(dense_steps + warmup_steps + 2):
        dense = number < dense_steps
        assert sessions[0].dense_step == dense
        assert sessions[0].is_sparse("fc.weight") != dense
        wanted = entries if dense else round(density_at(config, number - dense_steps) * entries)
        if not dense and strategy in ("dls", "layerwise"):
            assert sum(k_of(sessions[0]).values()) == wanted
        sums, _ = step(sessions, [draw_gradients(rng, session) for session in sessions], rng)
        assert same(*sums)
        assert sessions[0].last_step.k.sum() == sessions[1].last_step.k.sum() == wanted


def test_ratios_move_in_a_warm_up_too_and_are_balanced_soon_on_each_stair():
    sessions = make_sessions(2, density=0.01, warmup_steps=24, warmup_density=0.16)
    rng = np.random.default_rng(0)
    run(sessions, rng, 1)
    assert sessions[0].last_step.threshold_spread() > 10
    run(sessions, rng, 3)
    for _ in range(4):  # the last two steps of each stair
        for _ in range(2):
            run(sessions, rng, 1)
            assert sessions[0].last_step.threshold_spread() < 2
        run(sessions, rng, 4)


def test_dense_steps_send_whole_sums_and_leave_residuals_and_ratios_alone():
    sessions = make_sessions(3, dense_steps=2)
    rng, k = np.random.default_rng(0), k_of(sessions[0])
    for number in (1, 2):
        assert sessions[0].dense_step
        assert not any(sessions[0].is_sparse(layer.name) for layer in LAYERS)
        gradients = [draw_gradients(rng, session) for session in sessions]
        sums, errors = step(sessions, gradients, rng, scale=0.5)
        assert not errors
        for layer in LAYERS:
            total = sum(gradient[layer.name] for gradient in gradients) / 2
            assert all(np.array_equal(out[layer.name], total) for out in sums)
        for session in sessions:
            assert not any(residual.any() for residual in session.residuals.values())
            assert session.unfinished() == []
            record = session.last_step
            assert record.step == number
            assert record.sparse_bytes == 0
            assert record.dense_bytes == sum(4 * layer.size for layer in LAYERS)
            assert record.k.tolist() == record.sizes.tolist()
            assert record.quality is None
    assert k_of(sessions[0]) == k
    assert not sessions[0].dense_step


def test_a_dense_step_with_only_some_layers_is_a_step():
    sessions = make_sessions(2, dense_steps=1)
    gradients = [draw_gradients(np.random.default_rng(0), session) for session in sessions]
    some = [{name: g[name] for name in ("conv1.bias", "fc.weight")} for g in gradients]
    step(sessions, some)
    assert not sessions[0].dense_step
    assert sessions[0].last_step.dense_bytes == 4 * (32 + 46_080)
