"""Other numbers of ranks, other layouts: what waits weighs as much as before."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_dls import StateMismatchError
from hvd_dls.core.balancing.layers import layer_spec
from hvd_dls.core.checkpoint.parts import Part, write_part
from hvd_dls.core.checkpoint.redistribution import ARRAYS, MOVED, redistributed, shares, wanted
from hvd_dls.core.session.groups import Groups
from hvd_dls.core.wire.dealing import places_of
from tests.core.network import connect, outputs
from tests.core.ranks import draw_gradients, make_sessions

NAMES = ["conv1.weight", "conv1.bias", "conv2.weight", "fc.weight", "conv3.weight"]
counts = st.integers(1, 12)

LAYERS = [
    layer_spec("conv1.weight", (12, 5, 3, 3)),
    layer_spec("conv1.bias", (12,)),
    layer_spec("conv2.weight", (20, 30)),
    layer_spec("fc.weight", (20, 60)),
    layer_spec("conv3.weight", (5, 12)),
]
OPTIONS = {"dense_below": 0, "density": 0.05, "momentum": 0.5, "bucket_bytes": 4000}


@given(counts, counts)
def test_each_new_rank_takes_a_mean_and_each_old_one_is_taken_alike(before, now):
    taken = dict.fromkeys(range(before), Fraction(0))
    for rank in range(now):
        weights = shares(before, now, rank)
        assert sum(weights.values()) == 1
        assert all(weight > 0 for weight in weights.values())
        for old, weight in weights.items():
            taken[old] += weight
    assert set(taken.values()) == {Fraction(now, before)}


@given(counts)
def test_as_many_ranks_take_their_own(count):
    assert [shares(count, count, rank) for rank in range(count)] == [{r: 1} for r in range(count)]


layouts = st.one_of(
    st.lists(st.just(1), min_size=1, max_size=6),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
)


@st.composite
def saved_states(draw):
    """States of a model as ranks in groups save them: whole numbers, each on some ranks only."""
    sizes = draw(layouts)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    states = {}
    for rank in range(sum(sizes)):
        groups = Groups(sizes, rank)
        residuals = {}
        if groups.trivial or groups.share == 0:  # it sends for its group
            residuals["sparse"] = 720.0 * rng.integers(-9, 10, 5).astype(np.float32)
        if rng.random() < 0.7:  # what waits since the layer was sparse
            residuals["dense"] = 720.0 * rng.integers(-9, 10, 3).astype(np.float32)
        states[rank] = {
            "groups": sizes,
            "config": {"hierarchical": max(sizes) > 1},
            "layers": [["sparse", [5, "float32"]]],
            "loss_scale": draw(st.sampled_from([1.0, 4.0])),
            "residuals": residuals,
            "velocities": {},
            "thresholds": [1.0],
            "norms": [],
        }
    return states


def reaches_the_weights(states, name):
    """As a mean over senders, without the loss scale: see ``Groups``."""
    first = next(iter(states.values()))
    holders = len(first["groups"]) if name == "sparse" else len(states)
    there = [
        s["residuals"][name] / s["loss_scale"] for s in states.values() if name in s["residuals"]
    ]
    return np.sum(there, axis=0, dtype=np.float64) / holders if there else 0


@given(saved_states(), counts, st.booleans())
def test_what_reaches_the_weights_is_kept(states, now, hosts):
    sizes = states[0]["groups"]
    new = {}
    for rank in range(now):
        chosen = {old: states[old] for old in wanted(sizes, now, rank, hosts)}
        new[rank] = redistributed(chosen, now, rank, hosts)
        assert new[rank]["loss_scale"] in (1.0, 4.0)
        new[rank]["loss_scale"] = next(iter(chosen.values()))["loss_scale"]
    for name in ("sparse", "dense"):
        expected, found = reaches_the_weights(states, name), reaches_the_weights(new, name)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-3)
    if len(states) == now and not hosts and max(sizes) == 1:
        for rank, state in new.items():
            for name, array in states[rank]["residuals"].items():
                assert state["residuals"][name] is array


# With sessions ------------------------------------------------------------------------------------


def effective(sessions, part, averages=True):
    """What waits of each layer, as it would reach the weights."""
    groups = sessions[0].groups
    sums = 1 if averages else groups.world_size
    totals = {}
    for session in sessions:
        state = session.memory.state()
        held = {name: array.astype(float) for name, array in state[part].items()}
        for key, kept in state.get("kept", {}).items() if part == "residuals" else ():
            name, piece = key.rsplit("@", 1)
            held[name][places_of(len(held[name]), piece)] += kept
        for name, array in held.items():
            holders = groups.count if session.may_be_sparse(name) else groups.world_size
            totals[name] = totals.get(name, 0) + array * sums / holders
    return totals


def run(sessions, rng, steps):
    """Steps of all ranks, with or without groups."""
    ranks = connect(sessions)
    for _ in range(steps):
        for rank in ranks:
            gradients = draw_gradients(rng, rank.session)
            rank.begin()
            for name in NAMES:
                rank.compress(name, gradients[name])
        for rank in ranks:
            rank.receive()
        for rank in ranks:
            out = outputs(rank.session, NAMES)
            for name in NAMES:
                rank.finish(name, out[name], ranks)


def trained(n_ranks, groups=None, **options):
    sessions = make_sessions(n_ranks, LAYERS, groups, **OPTIONS | options)
    run(sessions, np.random.default_rng(0), 4)
    return sessions


def through_a_file(state, folder):
    write_part(folder / "part", {}, [state])
    with Part(folder / "part") as part:
        (model,) = part.models()
        return {**model, **{kind: dict(model[kind]) for kind in ARRAYS if kind in model}}


def loaded(sessions, n_ranks, groups=None, averages=True, folder=None, **options):
    states = {session.rank: session.state_dict() for session in sessions}
    if folder is not None:
        states = {rank: through_a_file(state, folder) for rank, state in states.items()}
    hosts = groups is not None
    new = make_sessions(n_ranks, LAYERS, groups, **OPTIONS | options)
    sizes = states[0]["groups"]
    for session in new:
        session.memory.averages = averages
        now, rank = session.world_size, session.rank
        chosen = {old: states[old] for old in wanted(sizes, now, rank, hosts)}
        session.load_state_dict(redistributed(chosen, now, rank, hosts))
    return new


LAYOUTS = {
    "2 to 3": ([1] * 2, [1] * 3),
    "3 to 2": ([1] * 3, [1] * 2),
    "4 to 1": ([1] * 4, [1]),
    "1 to 2": ([1], [1] * 2),
    "hosts to ranks": ([2, 1], [1] * 3),
    "ranks to hosts": ([1] * 3, [2, 2]),
    "other hosts": ([2, 2], [1, 2, 1]),
    "hosts to one host": ([2, 2], [3]),
    "one host to hosts": ([3], [2, 2]),
}


@pytest.mark.parametrize(("before", "now"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_adam_s_moments_go_on_as_means_of_those_there_were(before, now):
    """And so does what they are divided by."""

    def layout(sizes):
        hosts = max(sizes) > 1
        return {"groups": sizes if hosts else None, "hierarchical": hosts}

    options = {"momentum": 0.0, "adam": (0.5, 0.999)}
    old = trained(sum(before), **layout(before), **options)
    for session in old:
        session.scale_to(4.0)
    new = loaded(old, sum(now), **layout(now), **options)
    for part in ("residuals", "velocities", "second_moments", "moment_weights"):
        expected, found = effective(old, part), effective(new, part)
        for name in expected.keys() | found.keys():
            np.testing.assert_allclose(
                found.get(name, 0), expected.get(name, 0), rtol=1e-5, atol=1e-6
            )
    for session in new:
        for weights in session.memory.correction.weights.values():
            assert weights == pytest.approx((1 - 0.5**4, 1 - 0.999**4))
    run(new, np.random.default_rng(1), 3)
    for session in new:
        assert session.agreed().tolist() == new[0].agreed().tolist()


@pytest.mark.parametrize("averages", [True, False], ids=["average", "sum"])
@pytest.mark.parametrize(("before", "now"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_sessions_go_on_with_all_that_waited(before, now, averages):
    def layout(sizes):
        hosts = max(sizes) > 1
        return {"groups": sizes if hosts else None, "hierarchical": hosts}

    # Not masked, so that there is momentum of all entries.
    options = {"momentum_masking": False}
    old = trained(sum(before), **layout(before), **options)
    new = loaded(old, sum(now), averages=averages, **layout(now), **options)
    for part in ("residuals", "velocities"):
        expected, found = effective(old, part, averages), effective(new, part, averages)
        for name in expected.keys() | found.keys():
            np.testing.assert_allclose(
                found.get(name, 0), expected.get(name, 0), rtol=1e-6, atol=1e-4
            )
    assert np.any(next(iter(expected.values())))
    for session in new:
        assert session.agreed().tolist() == new[0].agreed().tolist()
        assert session.agreed()[0] == 4
        if len(before) > 1 and len(now) > 1:  # the same layers are compressed
            assert session.k.tolist() == old[0].k.tolist()
    run(new, np.random.default_rng(1), 3)
    for session in new:
        assert session.agreed().tolist() == new[0].agreed().tolist()


BOTH = ("allgather", "sparse_allreduce")


@pytest.mark.parametrize("exchanges", [BOTH, BOTH[::-1], BOTH[1:] * 2], ids="-".join)
@pytest.mark.parametrize(("before", "now"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_what_owners_had_kept_goes_on_with_other_ranks_and_exchanges(
    before, now, exchanges, tmp_path
):
    """From a file: there, it is in the residuals."""

    def layout(sizes):
        hosts = max(sizes) > 1
        return {"groups": sizes if hosts else None, "hierarchical": hosts}

    old = trained(sum(before), **layout(before), exchange=exchanges[0])
    new = loaded(old, sum(now), folder=tmp_path, **layout(now), exchange=exchanges[1])
    expected, found = effective(old, "residuals"), effective(new, "residuals")
    for name in expected.keys() | found.keys():
        np.testing.assert_allclose(found.get(name, 0), expected.get(name, 0), rtol=1e-6, atol=1e-4)
    run(new, np.random.default_rng(1), 3)
    for session in new:
        assert session.agreed().tolist() == new[0].agreed().tolist()


def test_as_many_ranks_go_on_to_the_bit():
    old, other = trained(3), trained(3)
    new = loaded(old, 3)
    rngs = np.random.default_rng(1), np.random.default_rng(1)
    run(new, rngs[0], 3)
    run(other, rngs[1], 3)
    for mine, theirs in zip(new, other, strict=True):
        assert MOVED not in mine.memory.state()
        for name, residual in mine.residuals.items():
            assert residual.tobytes() == theirs.residuals[name].tobytes()
        assert mine.agreed().tolist() == theirs.agreed().tolist()


def test_other_layers_options_numbers_of_ranks_and_damage_are_refused():
    old = trained(2)
    states = {session.rank: session.state_dict() for session in old}
    state = redistributed({0: states[0]}, 3, 0)

    def refused(match, n_ranks=3, layers=LAYERS, change=None, **options):
        (session, *_) = make_sessions(n_ranks, layers, **OPTIONS | options)
        before = session.memory.state()
        with pytest.raises(StateMismatchError, match=match):
            session.load_state_dict({**state, **(change or {})})
        assert not any(r.any() for r in session.residuals.values())
        assert session.memory.state()["step"] == before["step"]

    refused("2 to 3 ranks|redistributed to 3 ranks, but the model trains on 2", n_ranks=2)
    refused("other layers", layers=LAYERS[::-1])
    refused("saved with momentum=0.5, but it is 0.9 now", momentum=0.9)
    refused("damaged", change={"step": "four"})
    refused("damaged", change={"parameters": None})
    refused("residuals hold nan", change={"residuals": {"fc.weight": np.full(1200, np.nan)}})
    wide = [["fc.weight", [20, 60, "float64"]], *state["layers"]]
    refused("was saved as", change={"layers": [*state["layers"][:2], wide[0], state["layers"][3]]})
