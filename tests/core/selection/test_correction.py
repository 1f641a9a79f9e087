"""Clipping and momentum of one rank's gradients."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_dls.config import DLSConfig
from hvd_dls.core.balancing.layers import layer_spec
from hvd_dls.core.selection.correction import Correction
from hvd_dls.core.selection.norms import l2_norm
from hvd_dls.core.selection.passes_numpy import narrow, widened
from tests.core.strategies import seeds

DTYPES = [np.float32, np.float64, np.float16, np.uint16]  # uint16: bfloat16
SIZES = [0, 1, 7, 1000, (1 << 15) - 1, 1 << 15, (1 << 15) + 1, 100_003]
few = settings(max_examples=25)


def make(size=1000, dtype=np.float32, names=("w",), **options):
    itemsize = 8 if dtype == np.float64 else 4
    layers = [layer_spec(name, (size, 1), itemsize=itemsize) for name in names]
    return Correction(layers, DLSConfig(**options))


def draw(rng, size, dtype=np.float32):
    values = 4 * rng.standard_normal(size)
    if dtype != np.uint16:
        return values.astype(dtype)
    bits = np.empty(size, np.uint16)
    narrow(values.astype(np.float32), bits)
    return bits


def norm(values):
    return np.linalg.norm(widened(values).astype(np.float64))


# Momentum ---------------------------------------------------------------------------------------


@few
@given(
    seeds,
    st.sampled_from(SIZES),
    st.sampled_from(DTYPES),
    st.sampled_from([0.5, 0.9, 0.999]),
    st.booleans(),
)
def test_velocities_follow_torch_s_sgd(seed, size, dtype, momentum, nesterov):
    rng = np.random.default_rng(seed)
    own = make(size, dtype, momentum=momentum, nesterov=nesterov)
    work = np.float64 if dtype == np.float64 else np.float32
    velocity, m = np.zeros(size, work), work(momentum)
    for _ in range(4):
        gradient = draw(rng, size, dtype)
        before = gradient.copy()
        result = own.apply("w", gradient)
        velocity = m * velocity + widened(gradient)
        expected = widened(gradient) + m * velocity if nesterov else velocity
        assert result.dtype == work
        assert result.shape == (size,)
        assert np.array_equal(result, expected)
        assert np.array_equal(gradient, before)
        own.commit({})
        assert np.array_equal(own.velocities["w"], velocity)


@given(seeds, st.booleans())
def test_only_a_commit_changes_velocities(seed, nesterov):
    rng = np.random.default_rng(seed)
    own = make(momentum=0.9, nesterov=nesterov)
    for _ in range(6):
        before, gradient = own.velocities["w"].copy(), draw(rng, 1000)
        result = own.apply("w", gradient).copy()
        assert np.array_equal(own.velocities["w"], before)
        if rng.random() < 0.5:
            own.forget()
            assert np.array_equal(own.velocities["w"], before)
            again = own.apply("w", gradient)
            assert np.array_equal(again, result)
        own.commit({})
        assert not np.array_equal(own.velocities["w"], before)


def test_what_was_forgotten_is_not_committed_with_the_next_step():
    own, rng = make(momentum=0.5, names=("a", "b")), np.random.default_rng(0)
    for _ in range(3):
        before = {name: values.copy() for name, values in own.velocities.items()}
        for name in "ab":
            own.apply(name, draw(rng, 1000))
        own.forget()
        own.apply("a", draw(rng, 1000))
        own.commit({})
        assert np.array_equal(own.velocities["b"], before["b"])
        assert not np.array_equal(own.velocities["a"], before["a"])


def test_layers_that_are_not_in_a_step_keep_their_velocity():
    own, rng = make(momentum=0.5, names=("a", "b")), np.random.default_rng(0)
    for names in ("ab", "a", "b", "ba"):
        before = {name: values.copy() for name, values in own.velocities.items()}
        gradients = {name: draw(rng, 1000) for name in names}
        results = {name: own.apply(name, gradient) for name, gradient in gradients.items()}
        for name in names:  # no layer's result lies in another's memory
            expected = np.float32(0.5) * before[name] + gradients[name]
            assert np.array_equal(results[name], expected)
        own.commit({})
        for name in set("ab") - set(names):
            assert np.array_equal(own.velocities[name], before[name])


@given(seeds, st.sampled_from([0, 1, 30, 1000]), st.booleans())
def test_masking_clears_the_velocity_of_what_was_sent_and_of_nothing_else(seed, k, masking):
    rng = np.random.default_rng(seed)
    own = make(momentum=0.9, momentum_masking=masking, names=("w", "dense"))
    for _ in range(3):
        proposed = {name: own.apply(name, draw(rng, 1000)).copy() for name in ("w", "dense")}
        sent = np.sort(rng.choice(1000, k, replace=False)).astype(np.uint32)
        own.commit({"w": sent})
        if masking:
            proposed["w"][sent] = 0
        for name, velocity in proposed.items():
            assert np.array_equal(own.velocities[name], velocity)


def test_there_are_no_velocities_without_momentum_and_nothing_to_do_without_options():
    assert not make().active
    assert make(clip_norm=1.0).active
    assert make(clip_value=1.0).active
    assert make(momentum=0.5).active
    assert make(clip_norm=1.0).velocities == {}
    assert make(momentum=0.5).velocities["w"].dtype == np.float32
    assert make(momentum=0.5, dtype=np.float64).velocities["w"].dtype == np.float64


# Clipping ---------------------------------------------------------------------------------------

scales = st.sampled_from([1.0, 0.5, 1024.0])


@few
@given(seeds, st.sampled_from(SIZES), st.sampled_from(DTYPES), st.sampled_from([1e-3, 1, 50]))
def test_clip_value_limits_each_entry(seed, size, dtype, limit):
    gradient = draw(np.random.default_rng(seed), size, dtype)
    result = make(size, dtype, clip_value=limit).apply("w", gradient)
    assert np.array_equal(result, np.clip(widened(gradient), -limit, limit).astype(result.dtype))


@few
@given(seeds, st.sampled_from(SIZES), st.sampled_from(DTYPES), st.sampled_from([1e-3, 1, 50, 1e6]))
def test_clip_norm_scales_down_what_is_longer_and_nothing_else(seed, size, dtype, limit):
    gradient = draw(np.random.default_rng(seed), size, dtype)
    result = make(size, dtype, clip_norm=limit).apply("w", gradient)
    if norm(gradient) <= limit:
        assert np.array_equal(result, widened(gradient))
        return
    assert norm(result) == pytest.approx(limit, rel=1e-6)
    assert np.allclose(result, widened(gradient) * (limit / norm(gradient)), rtol=1e-6, atol=0)


@given(seeds, st.sampled_from([0.5, 2.0, 10.0]), st.sampled_from([0.5, 20.0, 1e4]))
def test_values_are_clipped_before_the_norm_is_taken(seed, value, limit):
    gradient = draw(np.random.default_rng(seed), 1000)
    result = make(clip_value=value, clip_norm=limit).apply("w", gradient)
    clipped = np.clip(gradient, -np.float32(value), np.float32(value))
    assert np.allclose(result, clipped * min(1, limit / norm(clipped)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [np.float16, np.uint16])
def test_the_norm_of_short_floats_does_not_overflow(dtype):
    gradient = np.full(1000, 60_000, np.float16)
    if dtype == np.uint16:
        gradient = np.full(1000, 0x7F00, np.uint16)  # 2**127
    result = make(dtype=dtype, clip_norm=10.0).apply("w", gradient)
    assert norm(result) == pytest.approx(10, rel=1e-6)


def test_the_norm_of_huge_float64_gradients_does_not_overflow():
    result = make(dtype=np.float64, clip_norm=10.0).apply("w", np.full(1000, 1e200))
    assert norm(result) == pytest.approx(10, rel=1e-6)


@given(seeds, st.sampled_from(SIZES), st.sampled_from(DTYPES), st.sampled_from([None, 0.5, 1e9]))
@few
def test_the_norm_is_that_of_the_definition(seed, size, dtype, limit):
    values = draw(np.random.default_rng(seed), size, dtype)
    clipped = np.minimum(np.abs(widened(values).astype(float)), np.inf if limit is None else limit)
    assert l2_norm(values, limit) == pytest.approx(np.linalg.norm(clipped), rel=1e-12)
    if size:
        values[-1] = 0x7F80 if dtype == np.uint16 else np.inf
        assert np.isnan(l2_norm(values, limit))


def test_norms_neither_overflow_nor_vanish():
    for size in (1e-300, 1e300):
        assert l2_norm(np.full(100_000, size)) == pytest.approx(size * np.sqrt(100_000))
    assert l2_norm(np.zeros(100_000, np.float32)) == 0


@given(seeds, scales, st.sampled_from([None, 1.0]), st.sampled_from([None, 3.0]), st.booleans())
def test_limits_are_for_gradients_without_their_loss_scale(seed, scale, value, limit, nesterov):
    gradient = draw(np.random.default_rng(seed), 1000)
    options = {"clip_value": value, "clip_norm": limit, "momentum": 0.5, "nesterov": nesterov}
    plain, scaled = make(**options), make(**options)
    for _ in range(3):
        expected = plain.apply("w", gradient)
        result = scaled.apply("w", np.float32(scale) * gradient, scale)
        assert np.array_equal(result, np.float32(scale) * expected)
        plain.commit({})
        scaled.commit({})


@given(seeds, st.booleans(), scales)
def test_what_enters_the_velocity_is_clipped(seed, nesterov, scale):
    rng = np.random.default_rng(seed)
    own = make(clip_value=1.0, clip_norm=20.0, momentum=0.5, nesterov=nesterov)
    clips, velocity = make(clip_value=1.0, clip_norm=20.0), np.zeros(1000, np.float32)
    for _ in range(3):
        gradient = draw(rng, 1000)
        clipped = clips.apply("w", gradient, scale).copy()
        velocity = np.float32(0.5) * velocity + clipped
        result = own.apply("w", gradient, scale)
        expected = clipped + np.float32(0.5) * velocity if nesterov else velocity
        assert np.array_equal(result, expected)
        own.commit({})


# What is not finite -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "options",
    [
        {"clip_value": 1.0},
        {"clip_norm": 1.0},
        {"clip_value": 1.0, "clip_norm": 1.0},
        {"momentum": 0.5},
        {"momentum": 0.5, "clip_value": 1.0, "nesterov": True},
    ],
    ids=str,
)
def test_what_is_not_finite_stays_so_and_leaves_with_the_step(dtype, bad, options):
    own, rng = make(40_000, dtype, **options), np.random.default_rng(0)
    own.apply("w", draw(rng, 40_000, dtype))
    own.commit({})
    before = {name: values.copy() for name, values in own.velocities.items()}
    for where in (0, 17, 39_999):
        gradient = draw(rng, 40_000, dtype)
        gradient[where] = (
            {"nan": 0x7FC0, "inf": 0x7F80, "-inf": 0xFF80}[str(bad)]
            if (dtype == np.uint16)
            else bad
        )
        result = own.apply("w", gradient)
        assert np.flatnonzero(~np.isfinite(result)).tolist() == [where]
        own.forget()
    for name, values in before.items():
        assert np.array_equal(own.velocities[name], values)
    gradient = draw(rng, 40_000, dtype)
    assert np.isfinite(own.apply("w", gradient)).all()


def test_a_velocity_that_overflows_is_infinite_for_all_to_see():
    own = make(momentum=0.9)
    for _ in range(2):
        result = own.apply("w", np.full(1000, 3e38, np.float32))
        own.commit({})
    assert np.isinf(result).all()
