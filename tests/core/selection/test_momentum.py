"""Momentum and clipping before the selection, in whole steps of several ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_dls.core.balancing.layers import layer_spec
from tests.core.ranks import (
    DENSE,
    LAYERS,
    SPARSE,
    contribution,
    copies,
    draw_gradients,
    make_sessions,
    run,
    same,
    step,
    velocities_of,
)
from tests.core.strategies import seeds

few = settings(max_examples=6)


@few
@given(
    seed=seeds,
    n_ranks=st.sampled_from([1, 2, 4]),
    nesterov=st.booleans(),
    dense_steps=st.sampled_from([0, 2, 9]),
    itemsize=st.sampled_from([2, 4, 8]),
)
def test_while_everything_is_sent_it_is_momentum_of_the_average(
    seed, n_ranks, nesterov, dense_steps, itemsize
):
    """As torch.optim.SGD would have it behind an allreduce, for sparse and for dense layers."""
    rng = np.random.default_rng(seed)
    layers = [layer_spec(x.name, x.shape, itemsize=itemsize) for x in LAYERS]
    options = {"momentum": 0.5, "nesterov": nesterov, "momentum_masking": False}
    sessions = make_sessions(n_ranks, layers, density=1.0, dense_steps=dense_steps, **options)
    velocity = dict.fromkeys(SPARSE + DENSE, 0.0)
    for _ in range(5):
        gradients = [draw_gradients(rng, session) for session in sessions]
        sums, errors = step(sessions, gradients, rng, scale=1 / n_ranks)
        assert not errors
        for name in velocity:
            mean = sum(gradient[name].astype(float) for gradient in gradients) / n_ranks
            velocity[name] = 0.5 * velocity[name] + mean
            expected = 0.5 * velocity[name] + mean if nesterov else velocity[name]
            assert all(np.array_equal(out[name], expected) for out in sums)


@pytest.mark.parametrize("momentum", [0.9, 0.99])
def test_so_it_is_with_any_momentum_up_to_rounding(momentum):
    rng = np.random.default_rng(0)
    sessions = make_sessions(3, density=1.0, momentum=momentum, momentum_masking=False)
    velocity = dict.fromkeys(SPARSE + DENSE, 0.0)
    for _ in range(30):
        gradients = [draw_gradients(rng, session) for session in sessions]
        sums, _ = step(sessions, gradients, scale=1 / 3)
        for name in velocity:
            mean = sum(gradient[name].astype(float) for gradient in gradients) / 3
            velocity[name] = momentum * velocity[name] + mean
            largest = np.abs(velocity[name]).max()
            assert np.allclose(sums[0][name], velocity[name], rtol=1e-5, atol=1e-5 * largest)


@few
@given(seeds, st.booleans(), st.booleans(), st.sampled_from(["dls", "global", "norm"]))
def test_masking_clears_velocities_of_what_was_sent_on_each_rank(seed, masking, nesterov, strategy):
    rng = np.random.default_rng(seed)
    sessions = make_sessions(
        2, momentum=0.5, momentum_masking=masking, nesterov=nesterov, strategy=strategy
    )
    for _ in range(4):
        gradients = [draw_gradients(rng, session) for session in sessions]
        residuals = [copies(session.residuals) for session in sessions]
        velocities = [velocities_of(session) for session in sessions]
        step(sessions, gradients, rng)
        for rank, session in enumerate(sessions):
            after = velocities_of(session)
            k = dict(zip(SPARSE, session.last_step.k, strict=True))
            for name, gradient in gradients[rank].items():
                expected = np.float32(0.5) * velocities[rank][name] + gradient
                if masking and name in SPARSE:
                    added = contribution(session, velocities[rank], name, gradient)
                    sent = (session.residuals[name] == 0) & (residuals[rank][name] + added != 0)
                    assert np.count_nonzero(sent) == k[name]
                    expected[sent] = 0
                assert np.array_equal(after[name], expected)


def test_dense_steps_clear_nothing():
    sessions, rng = make_sessions(2, momentum=0.5, dense_steps=3), np.random.default_rng(0)
    expected = [dict.fromkeys(SPARSE + DENSE, 0.0) for _ in sessions]
    for _ in range(3):
        gradients = [draw_gradients(rng, session) for session in sessions]
        step(sessions, gradients)
        for rank, session in enumerate(sessions):
            for name, velocity in velocities_of(session).items():
                expected[rank][name] = 0.5 * expected[rank][name] + gradients[rank][name]
                assert np.array_equal(velocity, expected[rank][name])


def test_layers_missing_in_a_step_keep_their_velocity():
    sessions, rng = make_sessions(2, momentum=0.5), np.random.default_rng(0)
    run(sessions, rng, 2)
    before = velocities_of(sessions[0])
    gradients = [draw_gradients(rng, session) for session in sessions]
    step(sessions, [{name: g[name] for name in ("conv2.weight", "fc.bias")} for g in gradients])
    after = velocities_of(sessions[0])
    for name in SPARSE + DENSE:
        untouched = name not in ("conv2.weight", "fc.bias")
        assert np.array_equal(after[name], before[name]) == untouched


@pytest.mark.parametrize("density", [0.05, 1.0])
@pytest.mark.parametrize("dense_steps", [0, 1])
def test_each_rank_clips_its_own_gradient_of_every_layer(density, dense_steps):
    rng = np.random.default_rng(0)
    sessions = make_sessions(2, clip_value=1.5, density=density, dense_steps=dense_steps)
    for number in range(3):
        gradients = [draw_gradients(rng, session) for session in sessions]
        before = [copies(session.residuals) for session in sessions]
        sums, _ = step(sessions, gradients, rng)
        for name in SPARSE + DENSE:
            total = sum(np.clip(gradient[name], -1.5, 1.5) for gradient in gradients)
            if name in SPARSE and number >= dense_steps:
                total += sum(residuals[name] for residuals in before)
                total -= sum(session.residuals[name] for session in sessions)
            assert np.array_equal(sums[0][name], total)


@pytest.mark.parametrize("dense_steps", [0, 1])
def test_clip_norm_holds_for_each_layer_of_each_rank(dense_steps):
    rng = np.random.default_rng(0)
    sessions = make_sessions(2, clip_norm=2.0, density=1.0, dense_steps=dense_steps)
    gradients = [draw_gradients(rng, session) for session in sessions]
    gradients[1]["fc.bias"][:] = 0.01  # short enough
    sums, _ = step(sessions, gradients, rng)
    for name in SPARSE + DENSE:
        norms = [max(1.0, np.linalg.norm(g[name].astype(float)) / 2) for g in gradients]
        assert norms[0] > 1
        total = sum(gradient[name] / norm for gradient, norm in zip(gradients, norms, strict=True))
        assert np.allclose(sums[0][name], total, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"clip_norm": 1e9}], ids=str)
def test_what_correct_hands_out_is_the_caller_s_to_change(options):
    for n_ranks in (1, 2):
        session, other = (make_sessions(n_ranks, momentum=0.5, **options)[0] for _ in range(2))
        rng = np.random.default_rng(0)
        for _ in range(3):
            gradient = draw_gradients(rng, session)["fc.bias"]
            before, results = gradient.copy(), []
            for each in (session, other):
                each.note("fc.bias", finite=True)
                corrected = each.correct("fc.bias", gradient)
                assert corrected.dtype == np.float32
                results.append(corrected.copy())
                if each is other:
                    corrected[:] = np.nan
            assert np.array_equal(gradient, before)
            assert np.array_equal(*results)
            for each in (session, other):
                for bucket in each.unfinished():
                    each.receive(bucket, np.tile(each.payload(bucket), n_ranks))
                assert each.accept("fc.bias")
        assert same(velocities_of(session), velocities_of(other))


def test_gradients_are_only_corrected_where_an_option_says_so():
    assert not make_sessions(2)[0].corrects
    for options in ({"momentum": 0.5}, {"clip_norm": 1.0}, {"clip_value": 1.0}):
        assert make_sessions(2, **options)[0].corrects
