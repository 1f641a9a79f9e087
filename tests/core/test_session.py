"""Whole steps of several ranks: agreement, conservation, errors, state."""

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_dls.config import DLSConfig
from hvd_dls.core.layers import layer_spec
from hvd_dls.core.session import Session
from hvd_dls.errors import DLSError, NonFiniteGradientError, PayloadError, StateMismatchError
from tests.core.ranks import (
    LAYERS,
    copies,
    draw_gradients,
    k_of,
    make_sessions,
    receive,
    send,
    step,
)
from tests.core.strategies import seeds

SPARSE = ["conv1.weight", "conv2.weight", "conv3.weight", "fc.weight"]
OPTIONS = [
    {},
    {"pair_steps": 4},
    {"pair_steps": 1, "density": 0.1},
    {"adjust_every": 3, "min_k": 20, "density": 0.05},
    {"strategy": "layerwise"},
    {"prior": "paper", "tail": "pareto", "density": 0.3},
    {"density": 1.0},
    {"bucket_bytes": 50_000, "index_code": "plain"},
]
both = pytest.mark.parametrize("options", OPTIONS, ids=str)
few = settings(max_examples=8)


def same(a, b):
    """Equal dictionaries of arrays, to the bit."""
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def run(sessions, rng, n_steps):
    """So many steps; the sums of the last."""
    for _ in range(n_steps):
        sums, errors = step(sessions, [draw_gradients(rng, session) for session in sessions])
        assert not errors
    return sums[0]


# Laws of every step -----------------------------------------------------------------------------


@both
@few
@given(seed=seeds, n_ranks=st.sampled_from([2, 3, 4]))
def test_ranks_agree_and_conserve_whatever_their_order_of_layers(options, seed, n_ranks):
    rng = np.random.default_rng(seed)
    sessions = make_sessions(n_ranks, **options)
    budget = sessions[0].plan.total_k
    for number in range(1, 7):
        k = k_of(sessions[0])
        assert sum(k.values()) == budget
        gradients = [draw_gradients(rng, session) for session in sessions]
        accumulators = [
            {name: session.residuals[name] + gradient[name] for name in SPARSE}
            for session, gradient in zip(sessions, gradients, strict=True)
        ]
        sums, _ = step(sessions, gradients, rng)
        for session in sessions:
            assert k_of(session) == k_of(sessions[0])
            assert session.last_step.step == number
            assert dict(zip(SPARSE, session.last_step.k, strict=True)) == k
        assert all(same(out, sums[0]) for out in sums)
        for name in SPARSE:
            pairs = zip(accumulators, sessions, strict=True)
            sent = [accumulator[name] - session.residuals[name] for accumulator, session in pairs]
            assert all(np.count_nonzero(values) <= k[name] for values in sent)
            assert np.array_equal(sums[0][name], np.sum(sent, axis=0))


@both
def test_nothing_is_lost_over_many_steps(options):
    rng = np.random.default_rng(0)
    sessions = make_sessions(2, **options)
    given_, received = (dict.fromkeys(SPARSE, 0.0) for _ in range(2))
    for _ in range(30):
        gradients = [draw_gradients(rng, session) for session in sessions]
        sums, _ = step(sessions, gradients, rng)
        for name in SPARSE:
            given_[name] += sum(gradient[name].astype(float) for gradient in gradients)
            received[name] += sums[0][name]
    for name in SPARSE:
        kept = sum(session.residuals[name].astype(float) for session in sessions)
        assert np.array_equal(received[name] + kept, given_[name])


@pytest.mark.parametrize("values", ["float16", "bfloat16"])
def test_what_rounding_takes_from_a_value_stays_in_the_residual(values):
    rng = np.random.default_rng(0)
    sessions = make_sessions(2, values=values, density=0.05)
    for _ in range(5):
        gradients = [
            {n: rng.standard_normal(g.shape).astype(np.float32) for n, g in drawn.items()}
            for drawn in (draw_gradients(rng, session) for session in sessions)
        ]
        before = [copies(session.residuals) for session in sessions]
        sums, _ = step(sessions, gradients)
        for name in SPARSE:
            accumulated = [r[name] + g[name] for r, g in zip(before, gradients, strict=True)]
            sent = [a - s.residuals[name] for a, s in zip(accumulated, sessions, strict=True)]
            assert np.array_equal(sums[0][name], sent[0] + sent[1])
            kept = [s.residuals[name][x != 0] for s, x in zip(sessions, sent, strict=True)]
            assert any(values.any() for values in kept)
        assert same(*sums)


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("strategy", ["dls", "layerwise"])
def test_density_one_is_the_plain_sum_in_rank_order(itemsize, strategy):
    rng = np.random.default_rng(1)
    layers = [layer_spec(x.name, x.shape, itemsize=itemsize) for x in LAYERS]
    sessions = make_sessions(3, layers, density=1.0, strategy=strategy)
    for _ in range(3):
        gradients = [
            {name: rng.standard_normal(g.shape).astype(g.dtype) for name, g in drawn.items()}
            for drawn in (draw_gradients(rng, session) for session in sessions)
        ]
        sums, _ = step(sessions, gradients, rng)
        for name in SPARSE:
            work = sums[0][name].dtype
            a, b, c = (gradient[name].astype(work) for gradient in gradients)
            assert np.array_equal(sums[0][name], a + b + c)
            assert not any(session.residuals[name].any() for session in sessions)


@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_sums_and_residuals_have_the_work_dtype(itemsize):
    layers = [layer_spec(x.name, x.shape, itemsize=itemsize) for x in LAYERS]
    sessions = make_sessions(2, layers)
    out = run(sessions, np.random.default_rng(0), 2)
    work = np.float64 if itemsize == 8 else np.float32
    assert {values.dtype for values in out.values()} == {np.dtype(work)}
    assert {values.dtype for values in sessions[0].residuals.values()} == {np.dtype(work)}


@pytest.mark.parametrize("options", [{}, {"pair_steps": 4}], ids=str)
def test_layers_missing_in_a_step_keep_their_k_and_residual(options):
    rng = np.random.default_rng(2)
    sessions = make_sessions(2, **options)
    budget = sessions[0].plan.total_k
    for present in (SPARSE, SPARSE[:2], SPARSE[2:], SPARSE[:1], SPARSE[1:], SPARSE):
        k, residuals = k_of(sessions[0]), copies(sessions[0].residuals)
        gradients = [draw_gradients(rng, session) for session in sessions]
        step(sessions, [{name: g[name] for name in present} for g in gradients], rng)
        assert k_of(sessions[0]) == k_of(sessions[1])
        assert sum(k_of(sessions[0]).values()) == budget
        for name in set(SPARSE) - set(present):
            assert k_of(sessions[0])[name] == k[name]
            assert np.array_equal(sessions[0].residuals[name], residuals[name])


def test_dense_layers_are_not_the_session_s():
    session, _ = make_sessions(2)
    assert [layer.name for layer in LAYERS if session.is_sparse(layer.name)] == SPARSE


def test_one_rank_has_nothing_to_do():
    (session,) = make_sessions(1)
    assert not any(session.is_sparse(layer.name) for layer in LAYERS)
    assert session.last_step is None


@pytest.mark.parametrize(
    ("options", "steps"), [({}, 5), ({"pair_steps": 4}, 30), ({"pair_steps": 1}, 50)], ids=str
)
def test_thresholds_become_one_and_stay_so(options, steps):
    sessions = make_sessions(2, measure_every=1, **options)
    rng = np.random.default_rng(3)
    run(sessions, rng, 1)
    assert sessions[0].last_step.threshold_spread() > 30
    run(sessions, rng, steps)
    energies = []
    for _ in range(30):
        run(sessions, rng, 1)
        assert sessions[0].last_step.threshold_spread() < 1.5
        energies.append(sessions[0].last_step.quality.energy)
    assert np.mean(energies) > 0.97


def test_layerwise_thresholds_stay_apart():
    sessions = make_sessions(2, strategy="layerwise")
    run(sessions, np.random.default_rng(3), 50)
    assert sessions[0].last_step.threshold_spread() > 30


# What happened, as a record ---------------------------------------------------------------------


@pytest.mark.parametrize("every", [0, 1, 3])
def test_records_tell_what_happened(every):
    rng = np.random.default_rng(4)
    sessions = make_sessions(2, measure_every=every)
    for number in range(1, 7):
        gradients = [draw_gradients(rng, session) for session in sessions]
        own = sessions[0]
        accumulators = {name: own.residuals[name] + gradients[0][name] for name in SPARSE}
        k = k_of(own)
        payload_bytes = sum(map(len, send(copy.deepcopy(own), gradients[0], SPARSE).values()))
        step(sessions, gradients)
        record = own.last_step
        assert record.names == tuple(SPARSE)
        assert record.sizes.tolist() == [2400, 18_432, 1280, 46_080]
        assert record.sparse_bytes == payload_bytes
        assert record.dense_bytes == 4 * (32 + 40)
        falling = [np.sort(np.abs(accumulators[name]))[::-1] for name in SPARSE]
        sent = np.concatenate([a[: k[name]] for name, a in zip(SPARSE, falling, strict=True)])
        thresholds = [a[k[name] - 1] for name, a in zip(SPARSE, falling, strict=True)]
        assert record.thresholds.tolist() == thresholds
        if every and number % every == 0:
            best = np.sort(np.concatenate(falling))[::-1][: own.plan.total_k]
            energy = np.square(sent, dtype=float).sum() / np.square(best, dtype=float).sum()
            assert record.quality.energy == pytest.approx(energy)
        else:
            assert record.quality is None


# Gradients that are not finite ------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"pair_steps": 4}, {"density": 1.0}], ids=str)
@pytest.mark.parametrize(
    "where", [[("conv2.weight", 1)], [("conv1.weight", 0), ("fc.weight", 0), ("fc.weight", 2)]]
)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_or_inf_on_one_rank_raises_the_same_on_all_and_changes_nothing(options, where, bad):
    rng = np.random.default_rng(5)
    sessions = make_sessions(3, **options)
    run(sessions, rng, 3)
    before = [copies(session.residuals) for session in sessions]
    agreed = sessions[0].agreed()
    gradients = [draw_gradients(rng, session) for session in sessions]
    for name, rank in where:
        gradients[rank][name][7] = bad
    _, errors = step(sessions, gradients, rng)
    assert [error.where for error in errors] == [where] * 3
    assert len({str(error) for error in errors}) == 1
    for session, residuals in zip(sessions, before, strict=True):
        assert np.array_equal(session.agreed(), agreed)  # neither step nor k have moved
        assert same(session.residuals, residuals)
    run(sessions, rng, 3)
    assert len({session.agreed().tobytes() for session in sessions}) == 1


def test_every_rank_names_the_layer_and_the_rank():
    error = NonFiniteGradientError([("b", 1), ("a", 3), ("b", 1)])
    assert "layer 'a' on rank 3, layer 'b' on rank 1;" in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.where) == (str(error), error.where)
    assert isinstance(error, ArithmeticError)


def test_a_residual_that_would_overflow_raises_and_stays_as_it_is():
    layers = [layer_spec("a", (2000, 1)), layer_spec("b", (2000, 1))]
    sessions = make_sessions(2, layers)
    rng = np.random.default_rng(6)
    huge = [{name: np.full(2000, 3e38, np.float32) for name in "ab"} for _ in sessions]
    tiny = [{name: rng.random(2000, np.float32) for name in "ab"} for _ in sessions]
    huge[1] = tiny[1]
    assert step(sessions, huge)[1] == []
    before = copies(sessions[0].residuals)
    _, errors = step(sessions, huge)
    assert errors[0].where == [("a", 0), ("b", 0)]
    assert same(sessions[0].residuals, before)
    assert step(sessions, tiny)[1] == []


def test_gathered_buffers_may_be_used_again_after_the_step():
    sessions = make_sessions(2)
    gradients = [draw_gradients(np.random.default_rng(rank), sessions[0]) for rank in range(2)]
    others = copy.deepcopy(sessions)
    step(sessions, gradients)
    payloads = [send(s, g, SPARSE) for s, g in zip(others, gradients, strict=True)]
    gathered = {b: np.concatenate([sent[b] for sent in payloads]) for b in payloads[0]}
    for bucket, buffer in gathered.items():
        others[0].receive(bucket, buffer)
    for name in SPARSE:
        others[0].decompress(name, gradients[0][name])  # in the gradient's own memory
    for buffer in gathered.values():
        buffer[:] = 0
    assert k_of(others[0]) == k_of(sessions[0])
    assert same(others[0].residuals, sessions[0].residuals)


# Wrong use --------------------------------------------------------------------------------------


def test_a_layer_cannot_be_in_a_step_twice():
    session, _ = make_sessions(2)
    gradient = np.ones(2400, np.float32)
    session.compress("conv1.weight", gradient)
    with pytest.raises(DLSError, match=r"'conv1.weight': compressed twice"):
        session.compress("conv1.weight", gradient)
    (bucket,) = session.unfinished()
    session.receive(bucket, np.tile(session.payload(bucket), 2))
    session.decompress("conv1.weight", gradient)
    with pytest.raises(DLSError, match=r"'conv1.weight': decompressed, but not on its way"):
        session.decompress("conv1.weight", gradient)


def test_nothing_is_decompressed_before_all_has_arrived():
    session, _ = make_sessions(2, bucket_bytes=1)
    for name in SPARSE[:2]:
        session.compress(name, np.ones(session.residuals[name].shape, np.float32))
    first, second = session.unfinished()
    session.receive(first, np.tile(session.payload(first), 2))
    session.payload(second)
    with pytest.raises(DLSError, match=rf"before buckets \[{second}\] were received"):
        session.decompress(SPARSE[1], np.empty(18_432, np.float32))
    assert not any(residual.any() for residual in session.residuals.values())


@pytest.mark.parametrize("shape", [(2399,), (2401,), (32, 75), ()])
def test_a_gradient_of_another_shape_is_refused(shape):
    session, _ = make_sessions(2)
    with pytest.raises(DLSError, match=r"'conv1.weight': gradient of shape .* expected \(2400,\)"):
        session.compress("conv1.weight", np.ones(shape, np.float32))


def test_another_bucket_s_payloads_are_refused_and_the_right_ones_taken_then():
    sessions = make_sessions(2, bucket_bytes=1)
    gradients = [draw_gradients(np.random.default_rng(rank), sessions[0]) for rank in range(2)]
    payloads = [send(s, g, SPARSE) for s, g in zip(sessions, gradients, strict=True)]
    wrong = np.concatenate([sent[1] for sent in payloads])
    with pytest.raises(PayloadError, match=r"'fc.weight'"):
        sessions[0].receive(0, wrong)
    receive(sessions[0], payloads)
    for name in SPARSE:
        sessions[0].decompress(name, gradients[0][name])
    assert sessions[0].last_step.step == 1


# State ------------------------------------------------------------------------------------------


@both
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
            assert same(a.residuals, b.residuals)
            assert np.array_equal(a.agreed(), b.agreed())
            assert np.array_equal(a.last_step.thresholds, b.last_step.thresholds)


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
    sessions = make_sessions(2)
    run(sessions, rng, 2)
    state = copy.deepcopy(sessions[0].state_dict())
    kept = copy.deepcopy(state)
    sessions[0].load_state_dict(state)
    run(sessions, rng, 2)
    assert same(state["residuals"], kept["residuals"])
    assert np.array_equal(state["ratios"], kept["ratios"])


def test_a_state_of_lists_loads_too():
    sessions = make_sessions(2)
    run(sessions, np.random.default_rng(7), 2)
    state = sessions[0].state_dict()
    plain = state | {"ratios": state["ratios"].tolist(), "thresholds": state["thresholds"].tolist()}
    (other, _) = make_sessions(2)
    other.load_state_dict(plain)
    assert np.array_equal(other.agreed(), sessions[0].agreed())


def test_no_state_in_the_middle_of_a_step():
    session, _ = make_sessions(2)
    state = session.state_dict()
    session.compress("conv1.weight", np.ones(2400, np.float32))
    with pytest.raises(DLSError, match="middle of a step"):
        session.state_dict()
    session.load_state_dict(state)  # as after a failure: the step is forgotten
    session.compress("conv1.weight", np.ones(2400, np.float32))


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
    ],
    ids=str,
)
def test_a_state_of_other_options_is_refused_by_the_option(options, match):
    refused(make_sessions(2, **options)[0], make_sessions(2)[0], match)


def test_what_the_network_carries_and_how_often_quality_is_measured_may_change():
    saver, _ = make_sessions(
        2, measure_every=5, values="float16", index_code="plain", bucket_bytes=1
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
    refused(loader.state_dict() | {"version": 99}, loader, "version 99, expected 1")
    refused({}, loader, "version None")


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
    first, second = (Session(LAYERS, config, 2, each) for each in (norms, backwards))
    assert np.array_equal(first.agreed(), second.agreed())


@pytest.mark.parametrize(
    ("broken", "match"),
    [
        (lambda state: state.pop("ratios"), "lacks ratios"),
        (lambda state: state.update(ratios=[0, 0, 1]), "ratios have only 3 numbers"),
        (lambda state: state.update(thresholds=[1.0]), "1 thresholds, expected"),
        (lambda state: state["residuals"].pop("l1"), "residuals, expected"),
        (lambda state: state["residuals"].update(l1=np.zeros(3)), r"'l1'.*\(3,\)"),
        (lambda state: state["layers"][1][1].__setitem__(-1, "float64"), "'l1'.*float64"),
    ],
    ids=[
        "no ratios",
        "few ratios",
        "too few thresholds",
        "a residual missing",
        "a residual too short",
        "other type",
    ],
)
def test_a_damaged_state_is_refused_before_anything_changes(broken, match):
    layers = [layer_spec(f"l{i}", (40, 30)) for i in range(3)]
    session = Session(layers, DLSConfig(density=0.1, dense_below=0, cost_rule=False), 2)
    state = copy.deepcopy(session.state_dict())
    state["ratios"][0] = 7
    broken(state)
    with pytest.raises(StateMismatchError, match=match):
        session.load_state_dict(state)
    assert session.agreed()[0] == 0


def test_what_is_not_on_its_way_cannot_be_decompressed():
    layer = layer_spec("l", (40, 30))
    session = Session([layer], DLSConfig(density=0.1, dense_below=0, cost_rule=False), 2)
    with pytest.raises(DLSError, match="'l': decompressed, but not on its way"):
        session.decompress("l", np.zeros(1200, np.float32))
