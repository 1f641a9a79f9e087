"""Adam in front of the selection: its recurrences, and what a step that is given up leaves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_dls.config import DLSConfig
from hvd_dls.core.jit import HAVE_NUMBA
from hvd_dls.core.selection import adam, adam_loops, threads
from hvd_dls.core.selection.passes_numpy import widened
from hvd_dls.errors import StateMismatchError
from tests.core.ranks import copies, draw_gradients, make_sessions, run, same, step
from tests.core.selection.test_correction import DTYPES, SIZES, draw, make
from tests.core.strategies import seeds

BETAS = (0.5, 0.999)
few = settings(max_examples=25)


class Adam:
    """The recurrences of arXiv:1412.6980, Algorithm 1, in float64, at a learning rate of 1."""

    def __init__(self, betas=BETAS, eps=1e-8):
        self.betas, self.eps = betas, eps
        self.first = self.second = 0.0
        self.steps = 0

    def update(self, gradient):
        first, second = self.betas
        self.steps += 1
        self.first = first * self.first + (1 - first) * gradient
        self.second = second * self.second + (1 - second) * gradient**2
        mean = self.first / (1 - first**self.steps)
        return mean / (np.sqrt(self.second / (1 - second**self.steps)) + self.eps)


def close(own, expected):
    return np.allclose(own, expected, rtol=1e-5, atol=1e-6)


@few
@given(
    seeds,
    st.sampled_from(SIZES),
    st.sampled_from(DTYPES),
    st.sampled_from([BETAS, (0.9, 0.95), (0.0, 0.9)]),
    st.sampled_from([1.0, 1024.0]),
)
def test_updates_are_adam_s_multiplied_by_the_loss_scale(seed, size, dtype, betas, scale):
    rng = np.random.default_rng(seed)
    own, reference = make(size, dtype, adam=betas), Adam(betas)
    for _ in range(5):
        gradient = draw(rng, size, dtype)
        before = gradient.copy()
        update = own.apply("w", gradient, scale)
        assert update.dtype == (np.float64 if dtype == np.float64 else np.float32)
        assert np.array_equal(gradient, before)
        expected = reference.update(widened(gradient).astype(float) / scale)
        assert close(update / scale, expected)
        own.commit({"w": np.arange(min(size, 3))})  # nothing is cleared
        assert close(own.velocities["w"], scale * reference.first)
        assert close(own.second_moments["w"], reference.second)


@pytest.mark.skipif(not HAVE_NUMBA, reason="numba is not installed")
@given(seeds, st.sampled_from([np.float32, np.float64]), st.sampled_from(SIZES))
def test_the_compiled_loop_does_the_same_as_numpy(seed, dtype, size):
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal(size).astype(dtype) for _ in range(6)]
    np.abs(arrays[2], out=arrays[2])
    arrays[0][::97] = rng.choice([0.0, np.nan, np.inf, 1e30], len(arrays[0][::97]))
    factors = adam.factors_of(
        DLSConfig(adam=BETAS), adam.Weights(0.75, 0.01), 1024.0, np.dtype(dtype)
    )
    by, results = np.array(factors, dtype), []
    for one_pass in (adam._in_blocks, adam_loops.one_pass):
        own = [array.copy() for array in arrays]
        one_pass(*own, by, 0, size)
        results.append([array.tobytes() for array in own])
    assert results[0] == results[1]


def test_large_layers_in_parts_are_the_same_to_the_bit(monkeypatch):
    monkeypatch.setattr(threads, "_LEAST", 50_000)
    gradient = draw(np.random.default_rng(0), 200_001)
    updates = []
    for count in (1, 3):
        monkeypatch.setattr(threads, "_count", count)
        own = make(200_001, adam=BETAS)
        for _ in range(2):
            update = own.apply("w", gradient)
            own.commit({})
        updates.append(update)
    assert np.array_equal(*updates)


@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_a_square_that_overflows_is_the_largest_there_is(scale):
    own, largest = make(4, adam=BETAS), np.finfo(np.float32).max
    for _ in range(3):
        update = own.apply("w", np.array([largest, -1e20 * scale, 1.0, 0.0], np.float32), scale)
        np.testing.assert_allclose(update, scale * np.array([1, -1, 1, 0]), rtol=1e-3)
        own.commit({})
    update = own.apply("w", np.full(4, scale, np.float32), scale)
    assert np.isfinite(update).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_left_to_be_found(bad):
    update = make(2, adam=BETAS).apply("w", np.array([bad, 1.0], np.float32))
    assert np.isnan(update[0])
    assert update[1] == pytest.approx(1)


def test_gradients_are_clipped_before():
    own, reference = make(1000, adam=BETAS, clip_value=1.0), Adam()
    rng = np.random.default_rng(0)
    for _ in range(3):
        gradient = draw(rng, 1000)
        expected = reference.update(np.clip(gradient, -1, 1).astype(float))
        assert close(own.apply("w", gradient), expected)
        own.commit({})


@given(seeds)
def test_only_a_commit_changes_moments(seed):
    rng = np.random.default_rng(seed)
    own = make(adam=BETAS, names=("a", "b"))
    for _ in range(6):
        before = [copies(own.velocities), copies(own.second_moments), dict(own.weights)]
        names = [name for name in "ab" if rng.random() < 0.7]
        gradients = {name: draw(rng, 1000) for name in names}
        updates = {name: own.apply(name, gradient).copy() for name, gradient in gradients.items()}
        if rng.random() < 0.5:
            own.forget()
            again = {name: own.apply(name, gradient) for name, gradient in gradients.items()}
            assert same(again, updates)
        assert same(own.velocities, before[0])
        assert same(own.second_moments, before[1])
        assert own.weights == before[2]
        own.commit({})
        for name in "ab":
            moved = own.weights[name] != before[2][name]
            assert moved == (name in names)
            assert moved != np.array_equal(own.second_moments[name], before[1][name])


@pytest.mark.parametrize("dense_steps", [0, 2])
def test_at_density_1_the_mean_of_all_ranks_updates_arrives(dense_steps):
    rng = np.random.default_rng(0)
    sessions = make_sessions(3, density=1.0, adam=BETAS, dense_steps=dense_steps)
    names = [layer.name for layer in sessions[0].plan.layers]
    references = [{name: Adam() for name in names} for _ in sessions]
    for _ in range(6):
        gradients = [draw_gradients(rng, session) for session in sessions]
        sums, errors = step(sessions, gradients, rng, scale=1 / 3)
        assert not errors
        for name in names:
            updates = [r[name].update(g[name]) for r, g in zip(references, gradients, strict=True)]
            assert close(sums[0][name], np.mean(updates, axis=0))


def test_what_is_saved_goes_on_as_if_never_stopped():
    options = {"adam": BETAS, "density": 0.1}
    sessions, rng = make_sessions(2, **options), np.random.default_rng(0)
    run(sessions, rng, 3)
    states = [session.state_dict() for session in sessions]
    others = make_sessions(2, **options)
    for other, state in zip(others, states, strict=True):
        other.load_state_dict(state)
    for _ in range(2):
        gradients = [draw_gradients(rng, session) for session in sessions]
        sums, _ = step(sessions, gradients)
        again, _ = step(others, gradients)
        assert same(sums[0], again[0])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda s: s["second_moments"]["fc.bias"].__setitem__(0, -1), "second_moments hold -1"),
        (lambda s: s["second_moments"].pop("fc.bias"), "lacks its second_moments"),
        (
            lambda s: s["moment_weights"].update({"fc.bias": [1.0]}),
            r"shape \(1,\), expected \(2,\)",
        ),
        (lambda s: s.pop("moment_weights"), "moment_weights"),
        (
            lambda s: s["config"].update(adam=None),
            r"saved with adam=None, but it is \[0.5, 0.999\]",
        ),
    ],
)
def test_a_damaged_state_is_refused(damage, words):
    session, other = (make_sessions(2, adam=BETAS)[0] for _ in range(2))
    state = session.state_dict()
    damage(state)
    with pytest.raises(StateMismatchError, match=words):
        other.load_state_dict(state)


def test_one_without_adam_is_told_what_differs():
    with pytest.raises(StateMismatchError, match="saved with adam=None"):
        make_sessions(2, adam=BETAS)[0].load_state_dict(make_sessions(2)[0].state_dict())
    with pytest.raises(StateMismatchError, match=r"saved with adam=\[0.5, 0.999\]"):
        make_sessions(2)[0].load_state_dict(make_sessions(2, adam=BETAS)[0].state_dict())
