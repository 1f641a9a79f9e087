"""Clipping by the global norm, of which each layer has its usual share."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_dls.config import DLSConfig
from hvd_dls.core.balancing.layers import layer_spec
from hvd_dls.core.selection.correction import Correction
from hvd_dls.errors import StateMismatchError
from tests.core.network import connect, outputs
from tests.core.ranks import LAYERS, draw_gradients, make_sessions, same, step
from tests.core.strategies import seeds

few = settings(max_examples=10)
NAMES = ("a", "b", "c", "d")
SIZE = 1000
limits = st.sampled_from([1e-3, 1.0, 40.0, 1e6])


def make(limit, names=NAMES, **options):
    layers = [layer_spec(name, (SIZE, 1)) for name in names]
    return Correction(layers, DLSConfig(clip_global_norm=limit, **options))


def draw(rng, spread=1.0, names=NAMES):
    """Layers whose sizes differ by orders of magnitude, anew in each step."""
    sizes = np.exp(spread * rng.standard_normal(len(names)))
    noise = rng.standard_normal((len(names), SIZE))
    return dict(zip(names, (sizes[:, None] * noise).astype(np.float32), strict=True))


def apply(own, gradients, scale=1.0):
    return {name: own.apply(name, g, scale).copy() for name, g in gradients.items()}


def global_norm(gradients):
    return np.sqrt(sum(np.linalg.norm(g.astype(float)) ** 2 for g in gradients.values()))


def clipped(gradients, limit):
    """As torch.nn.utils.clip_grad_norm_."""
    factor = min(1, limit / global_norm(gradients))
    return {name: g * np.float32(factor) for name, g in gradients.items()}


@few
@given(seeds, limits)
def test_while_shares_are_the_usual_ones_it_is_clipping_by_the_global_norm(seed, limit):
    rng, own = np.random.default_rng(seed), make(limit)
    first = draw(rng)
    apply(own, first)
    own.commit({})
    for _ in range(5):
        factor = np.float32(np.exp(2 * rng.standard_normal()))
        gradients = {name: factor * g for name, g in first.items()}
        expected = clipped(gradients, limit)
        for name, result in apply(own, gradients).items():
            np.testing.assert_allclose(result, expected[name], rtol=1e-5)
        own.commit({})


@few
@given(seeds, limits, st.sampled_from([0.1, 1.0, 5.0]))
def test_what_is_left_is_not_longer_than_the_limit_whatever_comes(seed, limit, spread):
    rng, own = np.random.default_rng(seed), make(limit)
    for number in range(20):
        left = apply(own, draw(rng, spread))
        own.commit({})
        if number:  # in the first step no share is known
            assert global_norm(left) <= limit * (1 + 1e-5)
        assert sum(own.shares.squares.values()) == pytest.approx(1)


@few
@given(seeds, st.sampled_from([1e-3, 1.0]))
def test_a_spike_is_clipped_in_its_own_step(seed, limit):
    rng, own = np.random.default_rng(seed), make(limit)
    for number in range(30):
        gradients = draw(rng, 0.1)
        if number == 29:
            gradients = {name: np.float32(1e4) * g for name, g in gradients.items()}
        left = apply(own, gradients)
        own.commit({})
    direction = {name: g / global_norm(gradients) for name, g in gradients.items()}
    assert global_norm(left) == pytest.approx(limit, rel=0.05)
    cosine = sum(np.vdot(left[name].astype(float), direction[name]) for name in NAMES)
    assert cosine / global_norm(left) > 0.97


@given(seeds, st.permutations(NAMES))
@few
def test_the_order_of_layers_does_not_matter(seed, order):
    rng, one, other = np.random.default_rng(seed), make(1.0), make(1.0)
    for _ in range(3):
        gradients = draw(rng)
        expected = apply(one, gradients)
        assert same(apply(other, {name: gradients[name] for name in order}), expected)
        one.commit({})
        other.commit({})
    assert other.shares.squares == pytest.approx(one.shares.squares)


@few
@given(seeds)
def test_gradients_well_within_the_limit_stay_as_they_are(seed):
    rng, own = np.random.default_rng(seed), make(1e4)
    for _ in range(5):
        gradients = draw(rng)
        assert same(apply(own, gradients), gradients)
        own.commit({})


def test_a_step_that_is_forgotten_leaves_no_trace():
    rng, own = np.random.default_rng(0), make(1.0)
    apply(own, draw(rng))
    own.commit({})
    before, gradients = dict(own.shares.squares), draw(rng)
    expected = apply(own, gradients)
    own.forget()
    assert own.shares.squares == before
    apply(own, {"a": np.float32(1e3) * gradients["a"]})
    own.forget()
    assert same(apply(own, gradients), expected)


def test_parts_that_train_in_turns_have_each_the_whole_limit():
    rng, own = np.random.default_rng(0), make(1.0)
    for number in range(20):
        names = ("a", "b") if number % 2 else ("c", "d")
        left = apply(own, draw(rng, 0.0, names))
        own.commit({})
        if number > 1:
            assert global_norm(left) == pytest.approx(1, rel=0.05)


def test_a_layer_without_a_gradient_yet_has_no_usual_share():
    rng, own = np.random.default_rng(0), make(1.0)
    for _ in range(3):
        apply(own, draw(rng) | {"b": np.zeros(SIZE, np.float32)})
        own.commit({})
    assert set(own.shares.squares) == {"a", "c", "d"}
    assert own.shares.limit_of("b") == 1.0
    apply(own, dict.fromkeys(NAMES, np.zeros(SIZE, np.float32)))
    own.commit({})


@few
@given(seeds, st.sampled_from([0.5, 1024.0]), st.booleans())
def test_the_limit_is_for_gradients_without_their_loss_scale(seed, scale, others):
    rng = np.random.default_rng(seed)
    options = {"clip_value": 0.5, "clip_norm": 0.3, "momentum": 0.5} if others else {}
    plain, scaled = make(1.0, **options), make(1.0, **options)
    for _ in range(4):
        gradients = draw(rng)
        large = {name: np.float32(scale) * g for name, g in gradients.items()}
        results = apply(scaled, large, scale)
        for name, expected in apply(plain, gradients).items():
            np.testing.assert_allclose(results[name], np.float32(scale) * expected, rtol=1e-6)
        plain.commit({})
        scaled.commit({})


@few
@given(seeds)
def test_shares_are_of_what_other_limits_leave(seed):
    rng = np.random.default_rng(seed)
    own, of_it = make(1.0, clip_norm=0.6, clip_value=0.1), make(1.0)
    first = Correction(own._layers.values(), DLSConfig(clip_norm=0.6, clip_value=0.1))
    for _ in range(4):
        gradients = draw(rng)
        expected = apply(of_it, apply(first, gradients))
        for name, result in apply(own, gradients).items():
            np.testing.assert_allclose(result, expected[name], rtol=1e-4, atol=1e-7)
        for each in (own, of_it, first):
            each.commit({})


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so_to_be_found(bad):
    rng, own = np.random.default_rng(0), make(1.0, momentum=0.5)
    apply(own, draw(rng))
    own.commit({})
    before, gradients = dict(own.shares.squares), draw(rng)
    gradients["c"][17] = bad
    assert np.flatnonzero(~np.isfinite(apply(own, gradients)["c"])).tolist() == [17]
    own.forget()
    assert own.shares.squares == before


# In sessions ------------------------------------------------------------------------------------

OPTIONS = [{}, {"momentum": 0.5, "momentum_masking": False}, {"density": 0.1, "momentum": 0.5}]


@few
@given(seeds, st.integers(1, 3), st.sampled_from(OPTIONS), st.booleans())
def test_each_rank_clips_its_own_gradient_dense_layers_included(seed, n_ranks, options, scaled):
    """Ranks that clip with the option are ranks that are given clipped gradients."""
    rng, limit = np.random.default_rng(seed), 5.0
    options = {"density": 1.0} | options
    sessions = make_sessions(n_ranks, clip_global_norm=limit, **options)
    given_clipped = make_sessions(n_ranks, **options)
    alone = [Correction(LAYERS, DLSConfig(clip_global_norm=limit)) for _ in sessions]
    scale = 256.0 if scaled else 1.0
    for session in sessions if scaled else []:
        session.scale_to(scale)
    for number in range(4):
        gradients = [draw_gradients(rng, session) for session in sessions]
        gradients[number % n_ranks]["fc.bias"] *= np.float32(64)  # ranks' norms differ
        left = [apply(own, own_g) for own, own_g in zip(alone, gradients, strict=True)]
        large = [{n: np.float32(scale) * g for n, g in own.items()} for own in gradients]
        sums, _ = step(sessions, large, scale=1 / n_ranks)
        expected, _ = step(given_clipped, left, scale=1 / n_ranks)
        for name, array in expected[0].items():
            np.testing.assert_allclose(sums[0][name] / scale, array, rtol=1e-4, atol=1e-6)
        for own in alone:
            own.commit({})


def step_on_network(ranks, gradients):
    """All ranks' sums."""
    names, sums = list(gradients[0]), []
    for rank, own in zip(ranks, gradients, strict=True):
        rank.begin()
        for name in names:
            rank.compress(name, own[name])
    for rank in ranks:
        rank.receive()
        sums.append(outputs(rank.session, names))
        for name in names:
            rank.finish(name, sums[-1][name], ranks)
    return sums


@few
@given(
    seeds,
    st.sampled_from([{"groups": [2, 1]}, {"groups": [2, 2]}, {"exchange": "sparse_allreduce"}]),
    st.sampled_from([{"momentum": 0.5}, {"dense_steps": 2}]),
)
def test_so_it_is_where_hosts_average_first_and_where_owners_add_up(seed, where, options):
    rng, limit = np.random.default_rng(seed), 5.0
    options = where | options | {"density": 0.3, "hierarchical": "groups" in where}
    n_ranks = sum(where.get("groups", [1, 1, 1]))
    ranks = connect(make_sessions(n_ranks, clip_global_norm=limit, **options))
    given_clipped = connect(make_sessions(n_ranks, **options))
    alone = [Correction(LAYERS, DLSConfig(clip_global_norm=limit)) for _ in ranks]
    for number in range(4):
        gradients = [draw_gradients(rng, rank.session) for rank in ranks]
        gradients[number % n_ranks]["conv2.weight"] *= np.float32(64)
        left = [apply(own, own_g) for own, own_g in zip(alone, gradients, strict=True)]
        sums, expected = step_on_network(ranks, gradients), step_on_network(given_clipped, left)
        for name, array in expected[0].items():
            np.testing.assert_allclose(sums[0][name], array, rtol=1e-4, atol=1e-5)
        for own, rank in zip(alone, ranks, strict=True):
            own.commit({})
            squares = rank.session.memory.correction.shares.squares
            assert squares == pytest.approx(own.shares.squares)


def test_a_saved_state_goes_on_with_its_shares():
    rng = np.random.default_rng(0)
    saver = make_sessions(2, clip_global_norm=5.0)
    step(saver, [draw_gradients(rng, session) for session in saver])
    loader = make_sessions(2, clip_global_norm=5.0)
    for one, other in zip(saver, loader, strict=True):
        other.load_state_dict(one.state_dict())
        assert other.copy().memory.correction.shares.squares == one.state_dict()["usual_shares"]
    gradients = [draw_gradients(rng, session) for session in saver]
    (expected, *_), (sums, *_) = (step(each, gradients)[0] for each in (saver, loader))
    assert same(sums, expected)


def test_the_option_may_come_and_go_between_saving_and_loading():
    rng = np.random.default_rng(0)
    for before, now in (({}, {"clip_global_norm": 5.0}), ({"clip_global_norm": 5.0}, {})):
        saver, loader = make_sessions(2, **before), make_sessions(2, **now)
        step(saver, [draw_gradients(rng, session) for session in saver])
        loader[0].load_state_dict(saver[0].state_dict())
        assert loader[0].state_dict().get("usual_shares", {}) == {}


@pytest.mark.parametrize("share", [-0.1, 1.5, np.nan, "half"])
def test_damaged_shares_are_refused(share):
    session = make_sessions(1, clip_global_norm=5.0)[0]
    state = session.state_dict() | {"usual_shares": {"fc.bias": share}}
    with pytest.raises(StateMismatchError):
        session.check_state(state)
