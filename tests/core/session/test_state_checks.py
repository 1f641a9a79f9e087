"""Saved states that are damaged, or another rank's, or of an older version."""

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_dls.config import DLSConfig
from hvd_dls.core.balancing.attendance import PATIENCE
from hvd_dls.core.balancing.layers import layer_spec
from hvd_dls.core.session.session import Session
from hvd_dls.errors import DLSError, StateMismatchError
from tests.core.options import each_option
from tests.core.ranks import draw_gradients, frozen, make_sessions, run, same, step

LAYERS = [layer_spec(f"l{i}", (40, 30)) for i in range(3)] + [layer_spec("bias", (30,))]
N = 3  # compressed layers


def sessions_of(**options):
    options = {"density": 0.1, "dense_below": 0, "momentum": 0.5, "nonfinite": "skip"} | options
    return make_sessions(2, LAYERS, **options)


def trained(steps=3, seed=0, **options):
    sessions = sessions_of(**options)
    run(sessions, np.random.default_rng(seed), steps)
    return sessions


def refused(session, state, match):
    """The state is refused, whether it is checked or loaded, and nothing has changed."""
    before = frozen(session)
    for take in (session.check_state, session.load_state_dict):
        with pytest.raises(StateMismatchError, match=match):
            take(state)
        assert frozen(session) == before


def damaged(part, position, value, name=None):
    """A state with one number changed."""
    state = copy.deepcopy(trained()[0].state_dict())
    array = state[part] if name is None else state[part][name]
    array[position] = value
    return state


# Numbers that cannot be -------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("part", "name"), [("residuals", "l1"), ("velocities", "bias")])
def test_arrays_that_are_not_finite_are_refused_by_layer_and_entry(bad, part, name):
    state = damaged(part, 17, bad, name)
    refused(trained()[0], state, f"layer '{name}': {part} hold {bad} at entry 17, expected finite")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_thresholds_that_are_no_magnitudes_are_refused_by_layer(bad):
    state = damaged("thresholds", 2, bad)
    refused(trained()[0], state, f"layer 'l2': thresholds hold {bad}, expected a finite number >=")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_norms_that_are_none_are_refused_by_layer(bad):
    session, _ = trained(strategy="norm")
    state = copy.deepcopy(session.state_dict())
    state["norms"][1] = bad
    refused(session, state, f"layer 'l1': norms hold {bad}, expected a finite number >= 0")


@pytest.mark.parametrize("bad", [0.0, -2.0, np.nan, np.inf, "1.0", None])
def test_a_loss_scale_that_is_none_is_refused(bad):
    session, _ = trained()
    refused(session, session.state_dict() | {"loss_scale": bad}, f"loss_scale is {bad}, expected")


@pytest.mark.parametrize("row", [0, 1])  # what is sent, and what is wanted
@pytest.mark.parametrize("k", [-1, 1201, 2**40])
def test_more_or_less_entries_than_a_layer_has_are_refused_by_layer(row, k):
    state = damaged("ratios", 2 + N * row + 1, k)
    refused(trained()[0], state, f"layer 'l1': sends {k} entries in the saved state, but has 1200")


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("change", [-1, 1, 7])
def test_entries_that_are_not_the_budget_are_refused(row, change):
    state = copy.deepcopy(trained()[0].state_dict())
    state["ratios"][2 + N * row + 1] += change
    match = f"layers send {360 + change} entries in the saved state, expected 360"
    refused(trained()[0], state, match)


@pytest.mark.parametrize(
    ("row", "value", "match"),
    [
        (
            2,
            -1,
            "layer 'l1': stayed away for -1 of 10 steps in the saved state, and came before: 1",
        ),
        (3, 0, "layer 'l1': stayed away for 0 of 0 steps"),
        (4, 2, "layer 'l1': stayed away for 0 of 10 steps in the saved state, and came before: 2"),
        (2, 10, "layer 'l1' stayed away, but sends entries in the saved state"),
    ],
)
def test_an_attendance_that_cannot_be_is_refused_by_layer(row, value, match):
    refused(trained()[0], damaged("ratios", 2 + N * row + 1, value), match)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_means_of_buckets_that_are_not_finite_are_refused(bad):
    mean = np.array(bad).view(np.int64)
    state = damaged("ratios", -1, mean)
    refused(trained()[0], state, rf"means of the buckets' entries are \[{bad}\]")


@pytest.mark.parametrize(("step", "ratios"), [(3, 2), (-1, -1), (4, 3), (None, 3)])
def test_a_step_that_is_not_that_of_the_ratios_is_refused(step, ratios):
    state = damaged("ratios", 0, ratios) | {"step": step}
    refused(trained()[0], state, f"saved in step {step}, with ratios of {ratios}")


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.bool_, np.complex64])
def test_residuals_that_are_no_floats_are_refused(dtype):
    session, _ = trained()
    state = session.state_dict()
    residuals = state["residuals"] | {"l0": np.zeros(1200, dtype)}
    refused(session, state | {"residuals": residuals}, "layer 'l0': residuals saved as")


@pytest.mark.parametrize("dtype", [np.float64, bool, str])
def test_ratios_that_are_no_whole_numbers_are_refused(dtype):
    session, _ = trained()
    state = session.state_dict()
    refused(session, state | {"ratios": state["ratios"].astype(dtype)}, "ratios|damaged")


GARBAGE = [
    None,
    0,
    -1,
    "x",
    b"x",
    [],
    {},
    [[]],
    [None],
    [["l0"]],
    np.nan,
    1e400,
    {"l0": None},
    object(),
]


@pytest.mark.parametrize("key", sorted(sessions_of()[0].state_dict()))
@pytest.mark.parametrize("value", GARBAGE, ids=lambda value: type(value).__name__)
def test_whatever_stands_in_a_state_is_refused_or_does_no_harm(key, value):
    sessions = trained(2)
    session = sessions[0]
    before, state = frozen(session), session.state_dict() | {key: value}
    try:
        session.load_state_dict(state)
    except StateMismatchError:
        assert frozen(session) == before
        lacking = {k: v for k, v in session.state_dict().items() if k != key}
        refused(session, lacking, f"lacks {key}|version None")
    run(sessions, np.random.default_rng(0), 1)


@given(st.one_of(st.none(), st.integers(), st.text(), st.lists(st.integers()), st.binary()))
def test_what_is_no_state_is_refused(state):
    session, _ = sessions_of()
    with pytest.raises(StateMismatchError, match="saved state has version"):
        session.load_state_dict(state)


# Whose it is ------------------------------------------------------------------------------------


def test_another_rank_s_state_is_refused_by_both_ranks():
    sessions = trained()
    states = [session.state_dict() for session in sessions]
    match = "saved by rank 1, but this is rank 0: residuals are each rank's own, so each rank loads"
    refused(sessions[0], states[1], match)
    refused(sessions[1], states[0], "saved by rank 0, but this is rank 1")


def test_another_model_s_dense_layers_do_not_matter_without_momentum():
    """They have no state; a model is recognised by its parameters before a state is loaded."""
    others = [layer_spec("offset", (30,)) if x.name == "bias" else x for x in LAYERS]
    options = {"density": 0.1, "dense_below": 0}
    saver, loader = (make_sessions(2, layers, **options)[0] for layers in (others, LAYERS))
    loader.load_state_dict(saver.state_dict())


# Version 2, of hvd_dls 0.1 ----------------------------------------------------------------------


def of_version_2(state):
    """As 0.1 would have saved it: no rank, no hosts, no parameters, no attendance."""
    ratios, cut, new = state["ratios"], 2 + 2 * N, ("rank", "groups", "parameters")
    old = {key: value for key, value in state.items() if key not in new}
    old["config"] = {k: v for k, v in state["config"].items() if k != "hierarchical"}
    rest = ratios[cut + 3 * N :]
    return old | {"version": 2, "ratios": np.concatenate([ratios[:cut], rest])}


@each_option
def test_a_state_of_version_2_goes_on_to_the_bit(options):
    rng = np.random.default_rng(7)
    layers = [layer_spec(f"conv{i}.weight", (60, 40)) for i in (1, 2, 3)]
    base = {"dense_below": 0, "density": 0.05}
    sessions, others = (make_sessions(2, layers, **base | options) for _ in range(2))
    run(sessions, rng, 4)
    state = sessions[0].state_dict()
    if len(sessions[0].plan.sparse) < N:
        pytest.skip("the options leave fewer layers to be compressed")
    for session, other in zip(sessions, others, strict=True):
        state = session.state_dict()
        other.load_state_dict(of_version_2(state))
        assert other.memory.controller.attendance.seen.all()
        assert other.memory.controller.attendance.patience.tolist() == [PATIENCE] * N
    for _ in range(3):
        gradients = [draw_gradients(rng, session) for session in sessions]
        assert same(step(sessions, gradients)[0][0], step(others, gradients)[0][0])
        for session, other in zip(sessions, others, strict=True):
            assert np.array_equal(session.k, other.k)
            assert same(session.residuals, other.residuals)


def test_a_state_of_version_2_belongs_to_whoever_loads_it():
    sessions, others = trained(), sessions_of()
    others[1].load_state_dict(of_version_2(sessions[0].state_dict()))
    assert same(others[1].residuals, sessions[0].residuals)
    assert others[1].state_dict()["rank"] == 1
    assert others[1].state_dict()["version"] == 3


@pytest.mark.parametrize("version", [0, 1, 4, 99, None, "3"])
def test_other_versions_are_refused(version):
    session, _ = trained()
    state = session.state_dict() | {"version": version}
    refused(session, state, f"saved state has version {version}, expected 3")


def test_damaged_states_of_version_2_are_refused():
    session, _ = trained()
    old = of_version_2(session.state_dict())
    for key in old.keys() - {"version"}:
        lacking = {k: v for k, v in old.items() if k != key}
        refused(session, lacking, f"lacks {key}|numbers")
    refused(session, old | {"ratios": old["ratios"][:5]}, "the saved ratios are")


# Plain values -----------------------------------------------------------------------------------


def plain(value):
    """Whether a value is made of what ``torch.load(weights_only=True)`` accepts, or is an array."""
    if isinstance(value, dict):
        return all(plain(x) for pair in value.items() for x in pair)
    if isinstance(value, list):
        return all(map(plain, value))
    return type(value) in (int, float, str, bool, type(None), np.ndarray)


def test_numpy_s_numbers_as_options_make_states_of_plain_ones():
    numbers = {
        "density": np.float64(0.1),
        "momentum": np.float32(0.5),
        "warmup_density": np.float16(0.5),
        "clip_norm": np.float32(3),
        "clip_value": np.float64(3),
        "warmup_steps": np.int64(3),
        "min_k": np.uint8(2),
        "adjust_every": np.int32(1),
        "bucket_bytes": np.int64(1 << 20),
        "threads": np.int64(1),
        "layer_density": {"l0": np.float32(0.5), "l1": np.float64(0.25)},
    }
    config = DLSConfig.from_options(dense_below=0, cost_rule=False, **numbers)
    session = Session(LAYERS, config, 2)
    state = session.state_dict()
    assert plain(state)
    assert state["config"]["layer_density"] == [["l0", 0.5], ["l1", 0.25]]
    python = DLSConfig.from_options(
        dense_below=0,
        cost_rule=False,
        **{k: v.item() for k, v in numbers.items() if k != "layer_density"},
        layer_density={"l0": 0.5, "l1": 0.25},
    )
    assert repr(config) == repr(python)  # what ranks compare


@each_option
def test_states_are_of_plain_values(options):
    sessions = make_sessions(2, **options)
    run(sessions, np.random.default_rng(0), 2)
    assert plain(sessions[0].state_dict())


# What an error has spoiled ----------------------------------------------------------------------


def test_a_state_that_could_not_be_loaded_whole_is_not_gone_on_with(monkeypatch):
    sessions = trained()
    states = [copy.deepcopy(session.state_dict()) for session in sessions]

    def fail(array, saved):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setitem(sessions[0].memory.backends, "l2", sessions[0].memory.backends["l2"])
        broken = copy.copy(sessions[0].memory.backends["l2"])
        broken.load = fail
        sessions[0].memory.backends["l2"] = broken
        with pytest.raises(MemoryError):
            sessions[0].load_state_dict(states[0])
    for attempt in (sessions[0].state_dict, sessions[0].begin):
        with pytest.raises(DLSError, match="an error came while loaded residuals were being writt"):
            attempt()
    for session, state in zip(sessions, states, strict=True):
        session.load_state_dict(state)
    run(sessions, np.random.default_rng(1), 1)
