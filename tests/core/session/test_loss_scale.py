"""Gradients of a loss that is multiplied by a factor, which changes from step to step."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_dls.core.balancing.layers import layer_spec
from hvd_dls.errors import DLSError
from tests.core.options import OPTIONS
from tests.core.ranks import LAYERS, draw_gradients, make_sessions, run, same, step, velocities_of
from tests.core.strategies import seeds

CLIPPED = [
    {"clip_value": 3.0, "momentum": 0.5, "nesterov": True},
    {"clip_norm": 10.0, "clip_value": 20.0, "momentum": 0.5},
    {"clip_norm": 10.0, "strategy": "hard", "threshold": 0.5},
    {"clip_global_norm": 10.0, "momentum": 0.5},
]


def times(arrays, factor):
    return {name: values * values.dtype.type(factor) for name, values in arrays.items()}


@settings(max_examples=20)
@given(
    options=st.sampled_from(OPTIONS + CLIPPED),
    itemsize=st.sampled_from([4, 8]),
    exponents=st.lists(st.integers(-8, 24), min_size=3, max_size=6),
    values=st.sampled_from(["float32", "float16", "bfloat16"]),
    seed=seeds,
)
def test_sums_are_what_they_would_be_without_to_the_bit(options, itemsize, exponents, values, seed):
    rng = np.random.default_rng(seed)
    layers = [layer_spec(x.name, x.shape, itemsize=itemsize) for x in LAYERS]
    plain, scaled = (make_sessions(2, layers, values=values, **options) for _ in range(2))
    for exponent in exponents:
        scale = 2.0**exponent
        for session in scaled:
            session.scale_to(scale)
        gradients = [draw_gradients(rng, session) for session in plain]
        expected, _ = step(plain, gradients)
        sums, errors = step(scaled, [times(gradient, scale) for gradient in gradients])
        assert not errors
        assert same(times(sums[0], 1 / scale), expected[0])
        for one, other in zip(plain, scaled, strict=True):
            assert same(times(other.residuals, 1 / scale), one.residuals)
            assert same(times(velocities_of(other), 1 / scale), velocities_of(one))
            assert np.array_equal(other.k, one.k)
            assert np.array_equal(other.last_step.thresholds / scale, one.last_step.thresholds)
    for session in scaled:
        session.scale_to(1.0)
    for one, other in zip(plain, scaled, strict=True):
        assert same(other.residuals, one.residuals)


def test_a_skipped_step_halves_the_scale_and_nothing_is_lost():
    """As a GradScaler does it."""
    rng = np.random.default_rng(0)
    plain, scaled = (make_sessions(2, momentum=0.5, nonfinite="skip") for _ in range(2))
    scale = 2.0**16
    for number in range(8):
        for session in scaled:
            session.scale_to(scale)
        gradients = [draw_gradients(rng, session) for session in plain]
        large = [times(gradient, scale) for gradient in gradients]
        if number % 3 == 1:
            large[1]["fc.bias"][3] = np.inf
            step(scaled, large)
            assert all(session.refused for session in scaled)
            scale /= 2
            for session in scaled:
                session.scale_to(scale)
            large = [times(gradient, scale) for gradient in gradients]
        sums, _ = step(scaled, large)
        expected, _ = step(plain, gradients)
        assert same(times(sums[0], 1 / scale), expected[0])
    assert scaled[0].skipped == 3
    assert scaled[0].loss_scale == 2.0**13


@pytest.mark.parametrize("factor", [3.0, 0.1, 1e-3])
def test_other_factors_are_right_up_to_rounding(factor):
    sessions, rng = make_sessions(2, momentum=0.5), np.random.default_rng(0)
    run(sessions, rng, 3)
    residuals, velocities = sessions[0].residuals, velocities_of(sessions[0])
    before = {name: values.copy() for name, values in residuals.items()}
    thresholds = sessions[0].state_dict()["thresholds"]
    sessions[0].scale_to(factor)
    assert np.allclose(sessions[0].state_dict()["thresholds"], factor * thresholds)
    for name, values in before.items():
        assert np.allclose(residuals[name], factor * values, rtol=1e-6, atol=0)
    for name, values in velocities_of(sessions[0]).items():
        assert np.allclose(values, factor * velocities[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [0.0, -2.0, np.inf, -np.inf, np.nan])
def test_what_is_no_scale_is_refused_and_nothing_changes(scale):
    sessions = make_sessions(2, momentum=0.5)
    run(sessions, np.random.default_rng(0), 2)
    sessions[0].scale_to(1024.0)
    before = {name: values.copy() for name, values in sessions[0].residuals.items()}
    with pytest.raises(DLSError, match=f"loss_scale={scale}: accepted is a finite number > 0"):
        sessions[0].scale_to(scale)
    assert sessions[0].loss_scale == 1024.0
    assert same(sessions[0].residuals, before)


@pytest.mark.parametrize("sparse", [True, False])
def test_a_scale_that_changes_within_a_step_is_refused(sparse):
    session, _ = make_sessions(2)
    session.scale_to(8.0)
    if sparse:
        session.compress("conv1.weight", np.ones(2400, np.float32))
    else:
        session.note("conv1.bias", finite=True)
    session.scale_to(8.0)  # it does not
    with pytest.raises(DLSError, match=r"changed from 8\.0 to 4\.0 within a step"):
        session.scale_to(4.0)
    assert session.loss_scale == 8.0
    for bucket in session.unfinished():
        session.receive(bucket, np.tile(session.payload(bucket), 2))
    if sparse:
        session.decompress("conv1.weight", np.empty(2400, np.float32))
    else:
        session.accept("conv1.bias")
    session.scale_to(4.0)
    assert session.loss_scale == 4.0
