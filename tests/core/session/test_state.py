"""Saving, loading, and what rank 0 hands to the others at the start."""

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_dls.config import DLSConfig
from hvd_dls.core.balancing.layers import layer_spec
from hvd_dls.core.session.session import Session
from hvd_dls.errors import DLSError, StateMismatchError
from tests.core.options import each_option
from tests.core.ranks import (
    LAYERS,
    draw_gradients,
    frozen,
    make_sessions,
    receive,
    run,
    same,
    send,
    step,
)
from tests.core.strategies import seeds


@each_option
def test_a_saved_state_goes_on_to_the_bit(options):
    rng = np.random.default_rng(7)
    sessions = make_sessions(2, **options)
    run(sessions, rng, 4)
    states = [pickle.loads(pickle.dumps(session.state_dict())) for session in sessions]
    others = make_sessions(2, **options)
    run(others, np.random.default_rng(8), 2)  # what they did before does not matter
    for session, state in zip(others, states, strict=True):
        session.load_state_dict(state)
    rngs = np.random.default_rng(9), np.random.default_rng(9)
    for _ in range(4):
        assert same(run(sessions, rngs[0], 1), run(others, rngs[1], 1))
        for a, b in zip(sessions, others, strict=True):
            assert frozen(a) == frozen(b)
            assert np.array_equal(a.last_step.thresholds, b.last_step.thresholds)


@settings(max_examples=25)
@given(
    options=st.fixed_dictionaries(
        {
            "strategy": st.sampled_from(["dls", "layerwise", "global", "norm"]),
            "momentum": st.sampled_from([0.0, 0.9]),
            "momentum_masking": st.booleans(),
            "dense_steps": st.sampled_from([0, 2]),
            "warmup_steps": st.sampled_from([0, 4]),
            "prior": st.sampled_from(["uniform", "measured"]),
            "bucket_bytes": st.sampled_from([1, 1 << 25]),
            "adjust_every": st.sampled_from([1, 3]),
        }
    ),
    n_before=st.integers(0, 7),
    scale=st.sampled_from([1.0, 1024.0, 3.0]),
    seed=seeds,
)
def test_wherever_it_was_saved_it_goes_on_to_the_bit(options, n_before, scale, seed):
    rng = np.random.default_rng(seed)
    sessions, others = (make_sessions(2, **options) for _ in range(2))
    for session in sessions:
        session.scale_to(scale)
    run(sessions, rng, n_before)
    run(others, rng, n_before // 2)
    for session, other in zip(sessions, others, strict=True):
        other.load_state_dict(pickle.loads(pickle.dumps(session.state_dict())))
        assert frozen(other) == frozen(session)
        assert other.loss_scale == scale
        assert other.dense_step == session.dense_step
        assert np.array_equal(other.k, session.k)
    for number in range(4):
        for session in (*sessions, *others):
            session.scale_to(scale / 2**number)
        gradients = [draw_gradients(rng, session) for session in sessions]
        sums, expected = (step(each, gradients)[0] for each in (others, sessions))
        assert all(same(*pair) for pair in zip(sums, expected, strict=True))
        for session, other in zip(sessions, others, strict=True):
            assert frozen(other) == frozen(session)
            assert np.array_equal(other.last_step.k, session.last_step.k)


def test_a_state_of_other_buckets_goes_on_with_the_same_ratios():
    rng = np.random.default_rng(7)
    sessions = make_sessions(2)
    run(sessions, rng, 4)
    others = make_sessions(2, bucket_bytes=1)
    for session, other in zip(sessions, others, strict=True):
        other.load_state_dict(session.state_dict())
        assert np.array_equal(other.k, session.k)
    run(others, rng, 2)


def test_a_loaded_state_is_copied():
    rng = np.random.default_rng(7)
    sessions = make_sessions(2, momentum=0.9)
    run(sessions, rng, 2)
    state = copy.deepcopy(sessions[0].state_dict())
    kept = copy.deepcopy(state)
    sessions[0].load_state_dict(state)
    run(sessions, rng, 2)
    assert same(state["residuals"], kept["residuals"])
    assert same(state["velocities"], kept["velocities"])
    assert np.array_equal(state["ratios"], kept["ratios"])


def test_a_state_of_lists_loads_too():
    sessions = make_sessions(2)
    run(sessions, np.random.default_rng(7), 2)
    state = sessions[0].state_dict()
    plain = state | {"ratios": state["ratios"].tolist(), "thresholds": state["thresholds"].tolist()}
    (other, _) = make_sessions(2)
    other.load_state_dict(plain)
    assert np.array_equal(other.agreed(), sessions[0].agreed())


def test_in_the_middle_of_a_step_the_state_is_that_of_before_it():
    sessions, rng = make_sessions(2, momentum=0.9), np.random.default_rng(0)
    run(sessions, rng, 2)
    states = [frozen(session) for session in sessions]
    gradients = [draw_gradients(rng, session) for session in sessions]
    names = list(gradients[0])
    ranks = [send(s, g, names) for s, g in zip(sessions, gradients, strict=True)]
    assert [frozen(session) for session in sessions] == states
    receive(sessions[0], ranks)
    assert frozen(sessions[0]) == states[0]
    sessions[0].decompress("conv1.weight", gradients[0]["conv1.weight"])
    with pytest.raises(DLSError, match="while gradients are being written: call it after optimiz"):
        sessions[0].state_dict()


def test_with_a_loaded_state_a_step_in_progress_is_forgotten():
    session, _ = make_sessions(2)
    state = session.state_dict()
    session.compress("conv1.weight", np.ones(2400, np.float32))
    session.load_state_dict(state)
    assert not session.in_step
    session.compress("conv1.weight", np.ones(2400, np.float32))


def test_velocities_of_another_layer_that_goes_dense_are_refused():
    others = [layer_spec("other.bias", (40,)) if x.name == "fc.bias" else x for x in LAYERS]
    saver, _ = make_sessions(2, others, momentum=0.9)
    loader, _ = make_sessions(2, momentum=0.9)
    refused(saver, loader, r"'fc.bias': the saved state lacks its velocities")


def refused(saver, loader, match):
    """The state is refused, and nothing of the loader has changed."""
    run_state = copy.deepcopy(loader.state_dict())
    with pytest.raises(StateMismatchError, match=match):
        loader.load_state_dict(saver if isinstance(saver, dict) else saver.state_dict())
    after = loader.state_dict()
    assert same(after.pop("residuals"), run_state.pop("residuals"))
    assert repr(after) == repr(run_state)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"density": 0.02}, "saved with density=0.02, but it is 0.01 now"),
        ({"strategy": "layerwise"}, "saved with strategy='layerwise', but it is 'dls' now"),
        ({"pair_steps": 4}, "saved with pair_steps=4, but it is None now"),
        ({"min_k": 2}, "saved with min_k=2, but it is 1 now"),
        ({"momentum": 0.9}, "saved with momentum=0.9, but it is 0.0 now"),
        ({"momentum_masking": False}, "saved with momentum_masking=False, but it is True now"),
        ({"dense_steps": 3}, "saved with dense_steps=3, but it is 0 now"),
        ({"warmup_steps": 3}, "saved with warmup_steps=3, but it is 0 now"),
        ({"warmup_density": 0.5}, "saved with warmup_density=0.5, but it is 0.25 now"),
        (
            {"layer_density": {"fc*": 1}},
            r"saved with layer_density=\[\['fc\*', 1.0\]\], but it is \[\]",
        ),
        ({"strategy": "hard", "threshold": 1.0}, "saved with strategy='hard', but it is 'dls' now"),
    ],
    ids=str,
)
def test_a_state_of_other_options_is_refused_by_the_option(options, match):
    refused(make_sessions(2, **options)[0], make_sessions(2)[0], match)


def test_what_the_network_carries_and_how_often_quality_is_measured_may_change():
    saver, _ = make_sessions(
        2,
        measure_every=5,
        values="float16",
        index_code="plain",
        bucket_bytes=1,
        nonfinite="skip",
        clip_norm=3.0,
        clip_value=1.0,
        clip_global_norm=5.0,
    )
    make_sessions(2)[0].load_state_dict(saver.state_dict())


def changed(index, **changes):
    layers = list(LAYERS)
    if not changes:
        del layers[index]
        return layers
    layer = layers[index]
    layers[index] = layer_spec(changes.get("name", layer.name), changes.get("shape", layer.shape))
    return layers


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        ([*LAYERS, layer_spec("new.weight", (64, 64))], "saved with .* 'new.weight', not there"),
        (changed(3), "'conv3.weight' is not in the saved state"),
        (changed(3, name="conv4.weight"), "saved with .* 'conv4.weight', not there now"),
        (changed(4, shape=(1152, 40)), r"saved as \[1152, 40, .*\], it is \[40, 1152, .*\] now"),
        ([LAYERS[i] for i in (0, 1, 3, 2, 4, 5)], "another order"),
    ],
)
def test_a_state_of_other_layers_is_refused_by_the_layer(layers, match):
    refused(make_sessions(2, layers)[0], make_sessions(2)[0], match)


def test_a_state_of_another_world_or_version_is_refused():
    loader, _ = make_sessions(2)
    refused(make_sessions(3)[0], loader, "saved by one of 3 ranks, but there are 2 now")
    refused(loader.state_dict() | {"version": 99}, loader, "version 99, expected 3")
    refused({}, loader, "version None")


@pytest.mark.parametrize(
    ("broken", "match"),
    [
        (lambda state: state.pop("ratios"), "lacks ratios"),
        (
            lambda state: state.update(ratios=[0, 0, 1]),
            "ratios are 3 numbers of int64, expected 17 ",
        ),
        (lambda state: state.update(thresholds=[1.0]), "1 thresholds, expected"),
        (lambda state: state["residuals"].pop("l1"), "'l1': the saved state lacks its residuals"),
        (
            lambda state: state["residuals"].update(l9=np.zeros(3)),
            "residuals of layer 'l9' are sav",
        ),
        (lambda state: state["residuals"].update(l1=np.zeros(3)), r"'l1'.*\(3,\)"),
        (lambda state: state["layers"][1][1].__setitem__(-1, "float64"), "'l1'.*float64"),
        (lambda state: state.pop("velocities"), "lacks velocities"),
        (lambda state: state.pop("loss_scale"), "lacks loss_scale"),
        (lambda state: state["velocities"].pop("l2"), "'l2': the saved state lacks its velocities"),
        (lambda state: state["velocities"].update(l9=np.zeros(3)), "velocities of layer 'l9' are"),
        (lambda state: state["velocities"].update(l1=np.zeros(3)), r"'l1': velocities.*\(3,\)"),
        (lambda state: state.update(norms=[1.0]), "1 norms, expected 0"),
        (lambda state: state.update(version=1), "version 1, expected 3"),
    ],
    ids=[
        "no ratios",
        "few ratios",
        "too few thresholds",
        "a residual missing",
        "a residual of no layer",
        "a residual too short",
        "other type",
        "no velocities",
        "no loss scale",
        "a velocity missing",
        "a velocity of no layer",
        "a velocity too short",
        "norms too many",
        "old version",
    ],
)
def test_a_damaged_state_is_refused_before_anything_changes(broken, match):
    layers = [layer_spec(f"l{i}", (40, 30)) for i in range(3)]
    options = {"density": 0.1, "dense_below": 0, "cost_rule": False, "momentum": 0.9}
    session = Session(layers, DLSConfig(**options), 2)
    state = copy.deepcopy(session.state_dict())
    state["ratios"][0] = state["step"] = 7
    broken(state)
    with pytest.raises(StateMismatchError, match=match):
        session.load_state_dict(state)
    assert session.agreed()[0] == 0


# Agreement at the start -------------------------------------------------------------------------


def test_ranks_take_over_rank_0_s_step_and_ratios():
    ahead, other = make_sessions(2), make_sessions(2)
    run(ahead, np.random.default_rng(1), 3)
    agreed = ahead[0].agreed()
    assert agreed.dtype == np.int64
    assert agreed[0] == 3
    other[1].agree(agreed)
    assert np.array_equal(other[1].agreed(), agreed)
    agreed[:] = 0  # a copy was taken
    assert np.array_equal(other[1].agreed(), ahead[0].agreed())


def test_norms_are_taken_by_name():
    norms = {layer.name: float(i + 1) for i, layer in enumerate(LAYERS)}
    config = make_sessions(2, prior="weight_norm", strategy="layerwise")[0].config
    backwards = dict(reversed(norms.items()))
    first, second = (Session(LAYERS, config, 2, 0, each) for each in (norms, backwards))
    assert np.array_equal(first.agreed(), second.agreed())
