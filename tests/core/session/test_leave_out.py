"""Layers that take no part: frozen on one rank or on all, or never there at all."""

import copy

import numpy as np
import pytest

from hvd_dls.core.balancing.attendance import PATIENCE
from hvd_dls.core.balancing.layers import layer_spec
from hvd_dls.errors import DLSError
from tests.core.network import connect, outputs
from tests.core.options import each_option
from tests.core.ranks import (
    contribution,
    copies,
    draw_gradients,
    frozen,
    k_of,
    make_sessions,
    run,
    velocities_of,
)

LAYERS = [
    layer_spec("conv1.weight", (12, 5, 3, 3)),
    layer_spec("conv1.bias", (12,)),
    layer_spec("conv2.weight", (20, 30)),
    layer_spec("conv3.weight", (40, 10)),
    layer_spec("fc.weight", (20, 60)),
    layer_spec("fc.bias", (20,)),
]
NAMES = [layer.name for layer in LAYERS]
SPARSE = [name for name in NAMES if name.endswith("weight")]


def sessions_of(n_ranks=2, **options):
    options = {"dense_below": 0, "density": 0.05} | options
    if options.get("bucket_bytes") == 50_000:
        options["bucket_bytes"] = 4000
    return make_sessions(n_ranks, LAYERS, **options)


def some_step(ranks, gradients, left_out, order=NAMES):
    """A step; of each rank the layers that it leaves out.  Returns each rank's sums."""
    for rank, of_rank, out_of in zip(ranks, gradients, left_out, strict=True):
        rank.begin()
        for name in order:
            if name in out_of:
                rank.leave_out(name)
            elif name in of_rank:
                rank.compress(name, of_rank[name])
    there = [name for name in order if name in gradients[0] or name in left_out[0]]
    sums = []
    for rank in ranks:
        rank.send_rest()
    for rank in ranks:
        rank.receive()
    for rank in ranks:
        sums.append(outputs(rank.session, there))
        for name in there:
            rank.finish(name, sums[-1][name], ranks)
    return sums


# Frozen -----------------------------------------------------------------------------------------


@each_option
@pytest.mark.parametrize("by", [[0], [1], [0, 1], [0, 1, 2]], ids=str)
def test_a_frozen_layer_s_residual_and_velocity_stay_as_they_are(options, by):
    rng, frozen_names = np.random.default_rng(0), {"conv2.weight", "fc.bias"}
    ranks = connect(sessions_of(3, **options))
    run([rank.session for rank in ranks], rng, 3)
    left_out = [frozen_names if number in by else set() for number in range(3)]
    for _ in range(3):
        gradients = [draw_gradients(rng, rank.session) for rank in ranks]
        before = [(copies(r.session.residuals), velocities_of(r.session)) for r in ranks]
        sums = some_step(ranks, gradients, left_out)
        for name in NAMES:
            assert len({out[name].tobytes() for out in sums}) == 1
            added = 0.0
            for number, rank in enumerate(ranks):
                residuals, velocities = before[number]
                session, out_of = rank.session, name in left_out[number]
                own = contribution(session, velocities, name, gradients[number][name])
                if out_of:
                    own = np.zeros_like(own)
                    if session.config.momentum:
                        assert np.array_equal(velocities_of(session)[name], velocities[name])
                if name in residuals:
                    left = session.residuals[name] - residuals[name]
                    assert not out_of or not left.any()
                    own = own - left
                added = added + own
            assert np.array_equal(sums[0][name], added)
        untouched = frozen_names if len(by) == 3 else set()
        for rank in ranks:
            assert rank.session.untouched == untouched
            assert np.array_equal(rank.session.agreed(), ranks[0].session.agreed())
    if len(by) == 3:
        assert not any(out[name].any() for out in sums for name in frozen_names)


def test_thawed_it_goes_on_with_what_it_had():
    rng = np.random.default_rng(0)
    ranks = connect(sessions_of(momentum=0.5, momentum_masking=False, strategy="layerwise"))
    others = copy.deepcopy(ranks)
    gradients = [draw_gradients(rng, rank.session) for rank in ranks]
    nothing = [set(), set()]
    for each in (ranks, others):
        some_step(each, gradients, nothing)
    later = [draw_gradients(rng, rank.session) for rank in ranks]
    for _ in range(5):  # only in one of the two worlds
        of_others = [draw_gradients(rng, rank.session) for rank in ranks]
        some_step(ranks, of_others, [{"conv2.weight"}] * 2)
    sums, expected = some_step(ranks, later, nothing), some_step(others, later, nothing)
    assert np.array_equal(sums[0]["conv2.weight"], expected[0]["conv2.weight"])
    for rank, other in zip(ranks, others, strict=True):
        for part in ("residuals", "velocities"):
            own, theirs = (x.session.state_dict()[part]["conv2.weight"] for x in (rank, other))
            assert np.array_equal(own, theirs)


def test_layers_that_are_frozen_everywhere_are_told_from_the_first_sum_on():
    rng = np.random.default_rng(0)
    ranks = connect(sessions_of(bucket_bytes=1))
    some_step(ranks, [draw_gradients(rng, rank.session) for rank in ranks], [{"fc.bias"}] * 2)
    assert ranks[0].session.untouched == {"fc.bias"}
    ranks[0].begin()
    assert (
        ranks[0].session.untouched == frozenset()
    )  # those of a step before would be the wrong ones
    gradients = [draw_gradients(rng, rank.session) for rank in ranks]
    for rank, of_rank in zip(ranks, gradients, strict=True):
        for name in NAMES:
            rank.leave_out(name) if name[:4] == "conv" else rank.compress(name, of_rank[name])
    for rank in ranks:
        rank.receive()
    ranks[0].finish("fc.bias", np.empty(20, np.float32), ranks)
    assert ranks[0].session.untouched == {name for name in NAMES if name[:4] == "conv"}


def test_layers_that_did_not_come_in_are_not_among_them():
    """They are somebody else's: Horovod reduces sparse gradients of embeddings itself."""
    rng = np.random.default_rng(0)
    ranks = connect(sessions_of())
    gradients = [draw_gradients(rng, rank.session) for rank in ranks]
    some = [{n: g for n, g in x.items() if n not in ("conv2.weight", "fc.bias")} for x in gradients]
    some_step(ranks, some, [{"conv1.weight", "conv1.bias"}] * 2)
    assert ranks[0].session.untouched == {"conv1.weight", "conv1.bias"}


def test_in_a_dense_step_nobody_knows_what_the_others_left_out():
    rng = np.random.default_rng(0)
    ranks = connect(sessions_of(dense_steps=1, momentum=0.5))
    gradients = [draw_gradients(rng, rank.session) for rank in ranks]
    sums = some_step(ranks, gradients, [{"conv2.weight"}, set()])
    assert np.array_equal(sums[0]["conv2.weight"], gradients[1]["conv2.weight"])
    assert not velocities_of(ranks[0].session)["conv2.weight"].any()
    assert velocities_of(ranks[1].session)["conv2.weight"].any()
    for rank in ranks:
        assert rank.session.untouched == frozenset()
        assert rank.session.last_step.step == 1


def test_untouched_layers_of_a_step_before_are_not_those_of_a_dense_one():
    ranks = connect(sessions_of(dense_steps=1))
    states = [rank.session.state_dict() for rank in ranks]
    rng = np.random.default_rng(0)
    for left_out in (set(), {"conv2.weight"}):
        gradients = [draw_gradients(rng, rank.session) for rank in ranks]
        some_step(ranks, gradients, [left_out] * 2)
    assert ranks[0].session.untouched == {"conv2.weight"}
    for rank, state in zip(ranks, states, strict=True):
        rank.session.load_state_dict(state)
    gradients = [draw_gradients(rng, rank.session) for rank in ranks]
    some_step(ranks, gradients, [set()] * 2)
    assert ranks[0].session.untouched == frozenset()


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_refused_step_leaves_those_that_were_left_out_alone_too(nonfinite):
    rng = np.random.default_rng(0)
    ranks = connect(sessions_of(nonfinite=nonfinite, momentum=0.5))
    run([rank.session for rank in ranks], rng, 2)
    before = [frozen(rank.session) for rank in ranks]
    gradients = [draw_gradients(rng, rank.session) for rank in ranks]
    gradients[0]["conv2.weight"][:] = np.nan  # it does not take part: nobody looks
    gradients[1]["fc.weight"][3] = np.nan
    if nonfinite == "raise":
        with pytest.raises(ArithmeticError, match=r"in layer 'fc.weight' on rank 1;"):
            some_step(ranks, gradients, [{"conv2.weight"}] * 2)
    else:
        sums = some_step(ranks, gradients, [{"conv2.weight"}] * 2)
        assert not any(values.any() for out in sums for values in out.values())
    assert [frozen(rank.session) for rank in ranks] == before


def test_a_rank_that_leaves_everything_out_is_no_hindrance():
    rng = np.random.default_rng(0)
    ranks = connect(sessions_of(momentum=0.5))
    run([rank.session for rank in ranks], rng, 2)
    before = copies(ranks[1].session.residuals)
    gradients = [draw_gradients(rng, rank.session) for rank in ranks]
    sums = some_step(ranks, gradients, [set(), set(NAMES)])
    assert np.array_equal(sums[1]["fc.bias"], sums[0]["fc.bias"])
    assert sums[1]["fc.weight"].any()
    assert all(np.array_equal(before[n], ranks[1].session.residuals[n]) for n in SPARSE)
    some_step(ranks, gradients, [set(NAMES)] * 2)
    assert ranks[0].session.untouched == set(NAMES)
    assert ranks[0].session.last_step.step == 4


# Buckets that need not wait ---------------------------------------------------------------------


def test_buckets_do_not_wait_for_layers_that_are_away():
    session, _ = sessions_of()  # one bucket
    session.begin(away={"conv1.weight", "fc.bias"})
    assert not session.complete
    for name, n in (("conv2.weight", 600), ("conv3.weight", 400), ("fc.weight", 1200)):
        assert session.compress(name, np.ones(n, np.float32)) is None
        assert not session.complete
        assert session.ready() == []
    assert session.note("conv1.bias", True) == 0
    assert session.complete
    assert session.ready() == session.unfinished() == [0]
    session.payload(0)
    assert session.ready() == session.unfinished() == []
    assert session.leave_out("conv1.weight") is None
    assert session.leave_out("fc.bias") is None


def test_a_bucket_of_which_all_are_away_is_not_waited_for():
    session, _ = sessions_of(bucket_bytes=1)
    session.begin(away={"conv2.weight", "conv1.weight", "conv1.bias"})
    assert session.note("fc.bias", True) is None
    assert session.compress("fc.weight", np.ones(1200, np.float32)) == 0
    assert not session.complete
    assert session.compress("conv3.weight", np.ones(400, np.float32)) == 1
    assert session.complete
    assert session.unfinished() == [0, 1]
    assert session.leave_out("conv2.weight") == 2  # there is nothing to wait for
    assert session.unfinished() == [0, 1, 2]


def test_one_that_is_away_takes_part_if_it_comes_in_time():
    rng = np.random.default_rng(0)
    ranks = connect(sessions_of())
    gradients = [draw_gradients(rng, rank.session) for rank in ranks]
    for rank, of_rank in zip(ranks, gradients, strict=True):
        rank.begin(away={"conv1.weight"})
        for name in NAMES:
            rank.compress(name, of_rank[name])
    out = outputs(ranks[0].session, NAMES)
    for rank in ranks:
        rank.receive()
    for name in NAMES:
        ranks[0].finish(name, out[name], ranks)
    assert out["conv1.weight"].any()
    assert ranks[0].session.missed == frozenset()


@pytest.mark.parametrize("name", ["conv1.weight", "conv1.bias"])
def test_one_that_comes_when_its_bucket_is_gone_is_refused_and_comes_with_the_next_step(name):
    rng = np.random.default_rng(0)
    ranks = connect(sessions_of())
    others = copy.deepcopy(ranks)
    before = [frozen(rank.session) for rank in ranks]
    for rank in ranks:
        gradients = draw_gradients(rng, rank.session)
        rank.begin(away={name})
        for other in NAMES:
            if other != name:
                rank.compress(other, gradients[other])
        with pytest.raises(DLSError, match=rf"'{name}': its gradient came after those that it tr"):
            rank.compress(name, gradients[name])
        assert rank.session.in_step
        rank.abandon()
    assert [frozen(rank.session) for rank in ranks] == before
    gradients = [draw_gradients(rng, rank.session) for rank in ranks]
    sums, expected = (some_step(each, gradients, [set()] * 2) for each in (ranks, others))
    assert np.array_equal(sums[0][name], expected[0][name])


def test_who_is_away_is_said_anew_in_each_step():
    session, _ = sessions_of()
    session.begin(away={"fc.weight"})
    session.leave_out("fc.weight")
    session.abandon()
    for name in NAMES[:-1]:
        n = next(layer.size for layer in LAYERS if layer.name == name)
        ones = np.ones(n, np.float32)
        assert (
            session.compress(name, ones) if name in SPARSE else session.note(name, True)
        ) is None
    assert session.note(NAMES[-1], True) == 0


def test_what_did_not_come_in_at_all_is_known_when_the_step_is_over():
    rng = np.random.default_rng(0)
    ranks = connect(sessions_of())
    gradients = [draw_gradients(rng, rank.session) for rank in ranks]
    some = [{n: g for n, g in each.items() if n != "conv2.weight"} for each in gradients]
    some_step(ranks, some, [{"fc.weight"}, set()])
    assert [rank.session.missed for rank in ranks] == [{"conv2.weight"}] * 2
    for rank, of_rank in zip(ranks, gradients, strict=True):
        rank.compress("fc.weight", of_rank["fc.weight"])
        rank.abandon()
        assert rank.session.missed == {"conv2.weight"}
    some_step(ranks, gradients, [set()] * 2)
    assert [rank.session.missed for rank in ranks] == [frozenset()] * 2


# Their share ------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["dls", "layerwise", "norm", "global"])
@pytest.mark.parametrize("bucket_bytes", [1, 1 << 25])
@pytest.mark.parametrize("how", ["left out", "missing"])
def test_the_others_have_the_share_of_a_layer_that_stays_away(strategy, bucket_bytes, how):
    rng = np.random.default_rng(0)
    sessions = sessions_of(strategy=strategy, bucket_bytes=bucket_bytes)
    ranks, budget = connect(sessions), sessions[0].plan.budget(0.05)
    run(sessions, rng, 1)
    lengths = []
    for _ in range(PATIENCE + 2):
        gradients = [draw_gradients(rng, session) for session in sessions]
        if how == "missing":
            gradients = [{n: g for n, g in x.items() if n != "fc.weight"} for x in gradients]
        some_step(ranks, gradients, [{"fc.weight"} if how == "left out" else set()] * 2)
        record = sessions[0].last_step
        lengths.append(record.sparse_bytes)
        sent = dict(zip(record.names, record.k.tolist(), strict=True))
    assert sent["fc.weight"] == 0
    assert sum(sent.values()) == budget
    assert k_of(sessions[0])["fc.weight"] == 0
    residuals = [session.residuals["fc.weight"].copy() for session in sessions]
    run(sessions, rng, 1)  # it comes back: nothing is sent of it yet
    if strategy in ("dls", "layerwise"):
        assert k_of(sessions[0])["fc.weight"] > 0
        for session, residual in zip(sessions, residuals, strict=True):
            assert np.count_nonzero(session.residuals["fc.weight"] - residual)
    run(sessions, rng, 1)
    sent = dict(zip(SPARSE, sessions[0].last_step.k.tolist(), strict=True))
    assert sum(sent.values()) == budget
    assert sent["fc.weight"] > 0 or strategy == "global"  # whose choice goes by magnitudes alone


@pytest.mark.parametrize("strategy", ["dls", "norm", "global", "layerwise"])
def test_who_stays_away_is_remembered_by_a_saved_state(strategy):
    rng = np.random.default_rng(0)
    sessions = sessions_of(strategy=strategy)
    run(sessions, rng, 1)
    ranks, others = connect(sessions), sessions_of(strategy=strategy)
    for _ in range(PATIENCE + 1):
        gradients = [draw_gradients(rng, session) for session in sessions]
        some_step(ranks, gradients, [{"fc.weight"}] * 2)
    for session, other in zip(sessions, others, strict=True):
        other.load_state_dict(session.state_dict())
    for names in ({"fc.weight"}, set(), set()):
        gradients = [draw_gradients(rng, session) for session in sessions]
        sums, again = (some_step(each, gradients, [names] * 2) for each in (ranks, connect(others)))
        for name in NAMES:
            assert np.array_equal(sums[0][name], again[0][name])
        for session, other in zip(sessions, others, strict=True):
            assert np.array_equal(session.last_step.k, other.last_step.k)
            assert frozen(session) == frozen(other)


# Wrong use --------------------------------------------------------------------------------------


def test_a_layer_is_left_out_or_takes_part():
    session, _ = sessions_of()
    ones = np.ones(600, np.float32)
    session.leave_out("conv2.weight")
    for again in (session.leave_out, lambda name: session.compress(name, ones)):
        with pytest.raises(DLSError, match=r"'conv2.weight': compressed twice"):
            again("conv2.weight")
    session.compress("conv3.weight", np.ones(400, np.float32))
    with pytest.raises(DLSError, match=r"'conv3.weight': compressed twice"):
        session.leave_out("conv3.weight")


def test_what_was_compressed_is_decompressed_and_what_went_dense_is_not():
    session, _ = sessions_of()
    session.compress("conv2.weight", np.ones(600, np.float32))
    session.note("fc.bias", True)
    session.leave_out("conv1.bias")
    session.receive(0, np.tile(session.payload(0), 2))
    with pytest.raises(DLSError, match=r"'conv2.weight': reduced, but it was compressed"):
        session.accept("conv2.weight")
    for name in ("fc.bias", "conv1.bias"):
        with pytest.raises(DLSError, match=rf"'{name}': decompressed, but it went dense"):
            session.decompress(name, np.empty(20, np.float32))
    session.decompress("conv2.weight", np.empty(600, np.float32))
    assert session.accept("fc.bias")
    assert session.accept("conv1.bias")
    assert session.last_step.step == 1
