"""The same model on another number of ranks, or in another type: what was remembered goes on."""

import copy

import numpy as np
import pytest

from hvd_dls.core.balancing.layers import layer_spec
from hvd_dls.core.balancing.schedule import density_at
from hvd_dls.errors import DLSError
from tests.core.options import each_option
from tests.core.ranks import copies, draw_gradients, frozen, make_sessions, run, same, step
from tests.core.ranks import velocities_of as velocities

LAYERS = [
    layer_spec("conv1.weight", (12, 5, 3, 3)),
    layer_spec("conv1.bias", (12,)),
    layer_spec("conv2.weight", (20, 30)),
    layer_spec("fc.weight", (20, 60)),
    layer_spec("conv3.weight", (5, 12)),
]


def sessions_of(n_ranks, layers=LAYERS, **options):
    return make_sessions(n_ranks, layers, **{"dense_below": 0, "density": 0.05} | options)


def trained(n_ranks=2, steps=4, layers=LAYERS, **options):
    sessions = sessions_of(n_ranks, layers, **options)
    run(sessions, np.random.default_rng(0), steps)
    return sessions


def heirs(sessions, n_ranks, factor=1.0, layers=LAYERS, **options):
    """New sessions, of which the first inherit; all agree then."""
    new = sessions_of(n_ranks, layers, **options)
    for session, old in zip(new, sessions, strict=False):
        session.inherit(old, factor)
    for session in new:
        session.agree(new[0].agreed())
    return new


def waiting(sessions, name):
    """What all ranks have not sent yet of a layer."""
    return sum(
        (s.residuals | s.memory.leftovers)[name].astype(float)
        for s in sessions
        if name in s.residuals or name in s.memory.leftovers
    )


@each_option
def test_the_same_ranks_go_on_to_the_bit(options):
    sessions = trained(**options)
    sessions[0].skipped, sessions[0].marks_skipped = 3, True
    others = heirs(sessions, 2, **options)
    assert list(map(frozen, others)) == list(map(frozen, sessions))
    assert (others[0].skipped, others[0].marks_skipped) == (3, True)
    assert others[0].last_step is sessions[0].last_step
    rngs = np.random.default_rng(1), np.random.default_rng(1)
    for _ in range(3):
        assert same(run(sessions, rngs[0], 1), run(others, rngs[1], 1))
    assert list(map(frozen, others)) == list(map(frozen, sessions))


def test_what_was_inherited_is_copied():
    sessions = trained(momentum=0.5)
    before = list(map(frozen, sessions))
    others = heirs(sessions, 2, momentum=0.5)
    run(others, np.random.default_rng(1), 2)
    assert list(map(frozen, sessions)) == before


@pytest.mark.parametrize(("n_ranks", "factor"), [(4, 2.0), (3, 1.5), (1, 0.5)])
def test_residuals_weigh_on_as_they_did_where_sums_are_divided_by_the_number_of_ranks(
    n_ranks, factor
):
    sessions = trained(momentum=0.5, momentum_masking=False)
    others = heirs(sessions, n_ranks, factor, momentum=0.5, momentum_masking=False)
    for session, old in zip(others, sessions, strict=False):
        mine = session.residuals | session.memory.leftovers
        assert same(mine, {n: r * np.float32(factor) for n, r in old.residuals.items()})
        assert same(velocities(session), velocities(old))
    for session in others[2:]:
        assert not any(residual.any() for residual in session.residuals.values())
        assert not any(velocity.any() for velocity in velocities(session).values())
    sums = run(others, np.random.default_rng(1), 1)
    assert all(np.isfinite(values).all() for values in sums.values())
    assert others[0].last_step.step == 5


def test_thresholds_follow_the_factor():
    sessions = trained()
    others = heirs(sessions, 4, 2.0)
    for session, old in zip(others, sessions, strict=False):
        assert session.memory.thresholds == {n: 2 * t for n, t in old.memory.thresholds.items()}


def test_the_loss_scale_is_inherited():
    sessions = trained()
    for session in sessions:
        session.scale_to(1024.0)
    for session, old in zip(heirs(sessions, 2), sessions, strict=True):
        assert session.loss_scale == 1024.0
        session.scale_to(1.0)
        old.scale_to(1.0)
        assert same(session.residuals, old.residuals)


# Layers that are compressed no longer -----------------------------------------------------------


def small_layers_go_dense(n_ranks, **options):
    """With the cost rule, some layers are not worth compressing for that many ranks."""
    sessions = sessions_of(n_ranks, cost_rule=True, **options)
    return sessions, [layer.name for layer, _ in sessions[0].plan.dense]


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("n_ranks", [1, 4])
def test_what_waits_in_a_layer_that_goes_dense_now_is_added_once(momentum, nesterov, n_ranks):
    options = {"momentum": momentum, "nesterov": nesterov and momentum > 0, "cost_rule": True}
    sessions = trained(**options)
    assert "conv3.weight" in sessions[0].residuals
    others = heirs(sessions, n_ranks, n_ranks / 2, **options)
    assert "conv3.weight" not in others[0].residuals
    assert others[0].corrects
    left = waiting(others, "conv3.weight")
    assert left.any()
    rng = np.random.default_rng(1)
    twins = copy.deepcopy(others)
    for twin in twins:
        twin.memory.leftovers = {}
    for number in range(3):
        gradients = [draw_gradients(rng, session) for session in others]
        sums, without = (step(each, gradients)[0] for each in (others, twins))
        for name in ("conv3.weight", "fc.weight", "conv1.bias"):
            there = sums[0][name] - without[0][name]
            if name == "conv3.weight" and number == 0:
                assert np.array_equal(there, left)
            elif name in twins[0].memory.leftovers or name not in twins[0].residuals:
                assert number == 0 or not there.any()
        assert not any(session.memory.leftovers for session in others)
    assert others[0].corrects == bool(momentum)


@pytest.mark.parametrize("how", ["missing", "left out", "refused", "abandoned"])
def test_what_waits_goes_on_waiting_until_its_layer_is_reduced(how):
    sessions = trained(cost_rule=True)
    others = heirs(sessions, 4, 2.0, cost_rule=True, nonfinite="skip")
    left, rng = waiting(others, "conv3.weight"), np.random.default_rng(1)
    gradients = [draw_gradients(rng, session) for session in others]
    if how == "missing":
        step(others, [{n: g for n, g in x.items() if n != "conv3.weight"} for x in gradients])
    elif how == "refused":
        gradients[1]["fc.weight"][0] = np.nan
        step(others, gradients)
        assert others[0].refused
    else:
        for session, of_rank in zip(others, gradients, strict=True):
            if how == "left out":
                session.leave_out("conv3.weight")
                session.receive(0, np.tile(session.payload(session.unfinished()[0]), 4))
                assert session.accept("conv3.weight")
            else:
                session.note("conv3.weight", True)
                session.correct("conv3.weight", of_rank["conv3.weight"])
                session.abandon()
    assert np.array_equal(waiting(others, "conv3.weight"), left)


@pytest.mark.parametrize("n_ranks", [1, 4])
def test_what_waits_is_saved_and_loaded(n_ranks):
    sessions = trained(cost_rule=True)
    others = heirs(sessions, n_ranks, n_ranks / 2, cost_rule=True)
    twins = sessions_of(n_ranks, cost_rule=True)
    for session, twin in zip(others, twins, strict=True):
        twin.load_state_dict(session.state_dict())
        assert frozen(twin) == frozen(session)
        assert same(twin.memory.leftovers, session.memory.leftovers)
        assert ("conv3.weight" in twin.memory.leftovers) == (session.rank < 2)
    rngs = np.random.default_rng(1), np.random.default_rng(1)
    assert same(run(others, rngs[0], 1), run(twins, rngs[1], 1))
    assert list(map(frozen, twins)) == list(map(frozen, others))
    fresh = sessions_of(n_ranks, cost_rule=True)
    for session, twin in zip(others, fresh, strict=True):
        twin.load_state_dict(session.state_dict())
        assert twin.memory.leftovers == {}


def test_what_waits_follows_the_loss_scale():
    others = heirs(trained(cost_rule=True), 4, 2.0, cost_rule=True)
    left = waiting(others, "conv3.weight")
    for session in others:
        session.scale_to(8.0)
    assert np.array_equal(waiting(others, "conv3.weight"), 8 * left)


def test_to_and_fro_nothing_is_lost():
    sessions = trained(cost_rule=True)
    before = {name: waiting(sessions, name) for name in sessions[0].residuals}
    there = heirs(sessions, 4, 2.0, cost_rule=True)
    back = heirs(there, 2, 0.5, cost_rule=True)
    assert {n: waiting(back, n).tolist() for n in before} == {
        n: w.tolist() for n, w in before.items()
    }
    assert not any(session.memory.leftovers for session in back)


# The schedule -----------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["dls", "layerwise", "norm", "global"])
@pytest.mark.parametrize("steps", [0, 1, 4, 12])
@pytest.mark.parametrize(("old", "new"), [(2, 4), (4, 2), (1, 2)])
def test_the_density_goes_on_where_it_was_also_with_other_layers(strategy, steps, old, new):
    options = {"strategy": strategy, "warmup_steps": 8, "dense_steps": 2, "cost_rule": True}
    sessions = trained(old, steps, **options)
    others = heirs(sessions, new, new / old, **options)
    rng = np.random.default_rng(1)
    for number in range(steps, steps + 4):
        assert others[0].dense_step == (number < 2)
        run(others, rng, 1)
        record = others[0].last_step
        assert record.step == number + 1
        if number >= 2:
            plan, config = others[0].plan, others[0].config
            assert record.k.sum() == plan.budget(density_at(config, number - 2))


@pytest.mark.parametrize(("before", "after"), [(4, 8), (8, 4), (4, 2), (2, 4)])
def test_a_model_in_another_type_goes_on(before, after):
    of = {size: [layer_spec(x.name, x.shape, itemsize=size) for x in LAYERS] for size in (2, 4, 8)}
    sessions = trained(layers=of[before], momentum=0.5)
    others = heirs(sessions, 2, layers=of[after], momentum=0.5)
    for session, old in zip(others, sessions, strict=True):
        for part in ("residuals", "velocities"):
            mine, theirs = session.state_dict()[part], old.state_dict()[part]
            for name, values in theirs.items():
                wanted = np.float64 if after == 8 else np.float32
                assert mine[name].dtype == wanted
                assert np.array_equal(mine[name], values.astype(wanted))
        assert np.array_equal(session.k, old.k)
    run(others, np.random.default_rng(1), 2)


def test_a_step_in_progress_is_not_inherited():
    sessions = trained(momentum=0.5)
    before = copies(sessions[0].residuals)
    sessions[0].compress("fc.weight", np.ones(1200, np.float32))
    others = heirs(sessions, 2, momentum=0.5)
    assert not others[0].in_step
    assert same(others[0].residuals, before)


# Ranks of a host --------------------------------------------------------------------------------


def owed(sessions, name):
    """What waits of a layer on all ranks, as it reaches the weights where averages do."""
    total = 0.0
    for session in sessions:
        groups, sparse = session.groups, [x.name for x in session.plan.sparse]
        senders = groups.count if name in sparse else groups.world_size
        waiting = (session.residuals | session.memory.leftovers).get(name)
        total = total + (0.0 if waiting is None else waiting.astype(float) / senders)
    return total


@pytest.mark.parametrize("after", [[4], [1, 1, 1, 1], [2, 2], [1, 3]])
def test_what_waits_of_hosts_reaches_the_weights_also_where_it_goes_dense(after):
    options = {"cost_rule": True, "hierarchical": True}
    sessions = make_sessions(4, LAYERS, [2, 2], dense_below=0, density=0.05, **options)
    fill_residuals(sessions)
    new = make_sessions(4, LAYERS, after, dense_below=0, density=0.05, **options)
    for session, old in zip(new, sessions, strict=True):
        session.inherit(old, len(after) / 2)
    back = make_sessions(4, LAYERS, [2, 2], dense_below=0, density=0.05, **options)
    for session, old in zip(back, new, strict=True):
        session.inherit(old, 2 / len(after))
    for name in [layer.name for layer in sessions[0].plan.sparse]:
        before = owed(sessions, name)
        assert before.any()
        assert np.array_equal(owed(new, name), before), name
        assert np.array_equal(owed(back, name), before), name


def test_adam_s_updates_are_not_added_to_the_gradients_of_another_rank_s_layer():
    options = {"hierarchical": True, "adam": (0.5, 0.999), "dense_below": 0, "density": 0.05}
    sessions = make_sessions(4, LAYERS, [2, 2], **options)
    for session, old in zip(make_sessions(4, LAYERS, [2, 2], **options), sessions, strict=True):
        session.inherit(old)
    new = make_sessions(4, LAYERS, [1, 3], **options)
    lost = [old.residuals.keys() - own.residuals for own, old in zip(new, sessions, strict=True)]
    number = next(i for i, names in enumerate(lost) if names)
    with pytest.raises(DLSError, match=r"is sent by another rank of this host.*checkpoint"):
        new[number].inherit(sessions[number])


def fill_residuals(sessions):
    """Whole numbers, in the residuals of the layers that each rank sends."""
    rng = np.random.default_rng(0)
    for session in sessions:
        for residual in session.residuals.values():
            residual[:] = rng.integers(-99, 99, residual.size)
