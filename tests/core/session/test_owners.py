"""What a rank receives and adds up where owners add up: it does not grow with their number."""

import numpy as np
import pytest

from hvd_dls.core.balancing.layers import layer_spec
from hvd_dls.core.checkpoint.parts import Part, write_part
from hvd_dls.core.wire.dealing import places_of
from hvd_dls.errors import NonFiniteGradientError, StateMismatchError
from tests.core.network import connect
from tests.core.ranks import make_sessions
from tests.core.world import NAMES, World
from tests.core.world import Part as TakesPart

LAYERS = [layer_spec("fc1", (400, 400)), layer_spec("fc2", (200, 300)), layer_spec("fc3", (70, 90))]
K = 2263  # 1 % of them


def received(n_ranks, steps, **options):
    """The most bytes and entries that a rank receives in the last step, and what is applied."""
    sessions = make_sessions(n_ranks, LAYERS, density=0.01, **options)
    ranks, rng = connect(sessions), np.random.default_rng(0)
    scales = {"fc1": 1.0, "fc2": 4.0, "fc3": 2.0}
    for _ in range(steps):
        for rank in ranks:
            rank.begin()
            for layer in reversed(LAYERS):
                noise = rng.standard_normal(layer.size).astype(np.float32)
                rank.compress(layer.name, scales[layer.name] * noise)
        for rank in ranks:
            rank.receive()
        step = sessions[0]._step
        if sessions[0].owners:
            parts = ranks[0].network._scattered
            sent = [[len(part) for part in parts[r][0][-1]] for r in range(n_ranks)]
            shares = sessions[0].owners.shares(0, K)
            room = sessions[0].owners.room(0, K)
            bytes_in = [sum(each[r] for each in sent) - sent[r][r] for r in range(n_ranks)]
            out = [len(ranks[r].network._sent[r][0][-1]) for r in range(n_ranks)]
            most = max(a + sum(out) - b for a, b in zip(bytes_in, out, strict=True))
            entries = int(max(n_ranks * room)) + int(shares.sum())
        else:
            most, entries = (n_ranks - 1) * step.sent[0], n_ranks * K
        applied = []
        for rank in ranks:
            outs = {x.name: np.empty(x.size, np.float32) for x in LAYERS}
            for name, out in outs.items():
                rank.session.decompress(name, out)
            applied.append(sum(np.count_nonzero(out) for out in outs.values()))
    assert len(set(applied)) == 1
    return most, entries, applied[0]


def test_a_checkpoint_holds_what_owners_have_kept_in_the_residuals(tmp_path):
    sessions = make_sessions(2, LAYERS, density=0.01, exchange="sparse_allreduce")
    ranks, rng = connect(sessions), np.random.default_rng(0)
    for rank in ranks:
        rank.begin()
        for layer in LAYERS:
            rank.compress(layer.name, rng.standard_normal(layer.size).astype(np.float32))
    for rank in ranks:
        rank.receive()
        for layer in LAYERS:
            rank.session.decompress(layer.name, np.empty(layer.size, np.float32))
    for session in sessions:
        state = session.state_dict()
        held = {name: array.copy() for name, array in state["residuals"].items()}
        for key, kept in state["kept"].items():
            assert kept.any() or len(kept) < 10
            name, piece = key.rsplit("@", 1)
            held[name][places_of(len(held[name]), piece)] += kept
        write_part(tmp_path / "part", {}, [state])
        with Part(tmp_path / "part") as part:
            (model,) = part.models()
            assert not model["kept"]
            assert all(np.array_equal(model["residuals"][name], held[name]) for name in held)
            model = {**model, "residuals": dict(model["residuals"]), "velocities": {}}
        other = make_sessions(2, LAYERS, density=0.01, exchange="sparse_allreduce")[session.rank]
        other.load_state_dict(model)
        assert all(np.array_equal(other.residuals[name], held[name]) for name in held)
        assert not any(kept.any() for kept in other.owners.kept)
        assert np.array_equal(other.agreed(), session.agreed())
        with pytest.raises(StateMismatchError, match="exchange='sparse_allreduce', but it is"):
            make_sessions(2, LAYERS, density=0.01)[session.rank].load_state_dict(model)
        damaged = {**state, "kept": {"fc1@0/2": np.full(3, np.nan)}}
        with pytest.raises(StateMismatchError, match="what an owner has kept of piece 0/2"):
            session.load_state_dict(damaged)


@pytest.mark.parametrize("saved", [1, 2000, None])
@pytest.mark.parametrize("now", [1, 2000, None])
def test_a_state_goes_to_other_buckets(saved, now):
    """As of a version whose default was the same for any number of ranks."""
    world = World(3, {"exchange": "sparse_allreduce", "bucket_bytes": saved})
    rng = np.random.default_rng(0)

    def step():
        world.step([TakesPart(NAMES, (), (), world.draw(rng)) for _ in world.ranks], [NAMES] * 3)

    world.agree()
    step()
    assert any(kept.any() for session in world.sessions for kept in session.owners.kept)
    world.options["bucket_bytes"] = now
    world.restart(world.save())
    world.check()  # nothing is lost
    step()
    world.check()


def test_a_sum_beyond_the_type_is_no_ranks_own_but_nan_is():
    """The layers of one step: a sum that overflows, NaN on two of three ranks, nothing wrong."""
    sessions = make_sessions(3, LAYERS, density=0.01, exchange="sparse_allreduce")
    ranks = connect(sessions)
    for number, rank in enumerate(ranks):
        rank.begin()
        for layer in LAYERS:
            gradient = np.ones(layer.size, np.float32)
            gradient[7] = {"fc1": 3e38, "fc2": np.nan if number else 1, "fc3": 1}[layer.name]
            rank.compress(layer.name, gradient)
    for rank in ranks:
        rank.receive()
    for session in sessions:
        with pytest.raises(NonFiniteGradientError) as error:
            session.decompress("fc1", np.empty(LAYERS[0].size, np.float32))
        assert error.value.where == [("fc1", None), ("fc2", 1), ("fc2", 2)]
        assert not any(kept.any() for kept in session.owners.kept)


@pytest.fixture(scope="module")
def by_ranks():
    return {p: received(p, 40, exchange="sparse_allreduce") for p in (4, 16)}


def test_bytes_received_do_not_grow_with_the_number_of_ranks(by_ranks):
    few, many = by_ranks[4][0], by_ranks[16][0]
    gathered = received(16, 2)[0]
    print(f"bytes a rank receives: 4 ranks {few}, 16 ranks {many}; gathered, 16 ranks {gathered}")
    # Of all that there is, a rank's own part does not travel: (P - 1) / P does.
    assert many * 16 / 15 < 1.15 * (few * 4 / 3)
    assert many < gathered / 5


def test_entries_added_at_a_rank_stay_below_twice_and_a_half_of_what_it_sends(by_ranks):
    for _, entries, applied in by_ranks.values():
        assert entries <= 2.5 * K, entries / K
        assert applied <= K
