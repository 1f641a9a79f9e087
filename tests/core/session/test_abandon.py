"""A step can be given up at any point, by one rank or by all, and then comes the next one."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_dls.core.balancing.layers import layer_spec
from hvd_dls.errors import DLSError, NonFiniteGradientError, RanksDisagreeError
from tests.core.network import WaitingError, connect, outputs
from tests.core.options import OPTIONS, each_option
from tests.core.ranks import draw_gradients, frozen, make_sessions, run, same
from tests.core.strategies import seeds

LAYERS = [
    layer_spec("conv1.weight", (12, 5, 3, 3)),
    layer_spec("conv1.bias", (12,)),
    layer_spec("conv2.weight", (20, 30)),
    layer_spec("conv3.weight", (40, 10)),
    layer_spec("fc.weight", (20, 60)),
    layer_spec("fc.bias", (20,)),
]
NAMES = [layer.name for layer in LAYERS]


def sessions_of(n_ranks=2, **options):
    options = {"dense_below": 0, "density": 0.05} | options
    if options.get("bucket_bytes") == 50_000:
        options["bucket_bytes"] = 4000
    return make_sessions(n_ranks, LAYERS, **options)


def trained(rng, steps=3, n_ranks=2, **options):
    sessions = sessions_of(n_ranks, **options)
    run(sessions, rng, steps)
    return sessions


def some_step(ranks, rng):
    """A step of all ranks; each rank's sums."""
    gradients = [draw_gradients(rng, rank.session) for rank in ranks]
    for rank, of_rank in zip(ranks, gradients, strict=True):
        rank.begin()
        for name in rng.permutation(NAMES).tolist():
            rank.compress(name, of_rank[name])
    for rank in ranks:
        rank.receive()
    sums = []
    for rank in ranks:
        sums.append(outputs(rank.session, NAMES))
        for name in rng.permutation(NAMES).tolist():
            rank.finish(name, sums[-1][name], ranks)
    return sums


def check_alike(ranks, others):
    """Two worlds that have been through the same go on alike."""
    rngs = np.random.default_rng(99), np.random.default_rng(99)
    for _ in range(3):
        sums, expected = some_step(ranks, rngs[0]), some_step(others, rngs[1])
        assert all(same(out, sums[0]) for out in sums)
        assert all(same(*pair) for pair in zip(sums, expected, strict=True))
        for rank, other in zip(ranks, others, strict=True):
            assert frozen(rank.session) == frozen(other.session)
    assert ranks[0].network.quiet


# By all ranks, in the middle of gathering -------------------------------------------------------


@settings(max_examples=20)
@given(
    options=st.sampled_from(OPTIONS),
    points=st.tuples(*[st.integers(0, len(NAMES))] * 3),
    receive=st.sets(st.integers(0, 2)),
    times=st.integers(1, 3),
    seed=seeds,
)
def test_before_sums_are_written_nothing_has_changed(options, points, receive, times, seed):
    rng = np.random.default_rng(seed)
    ranks = connect(trained(rng, int(rng.integers(4)), 3, **options))
    others = copy.deepcopy(ranks)
    before = [frozen(rank.session) for rank in ranks]
    records = [rank.session.last_step for rank in ranks]
    for _ in range(times):
        for rank, point in zip(ranks, points, strict=True):
            gradients = draw_gradients(rng, rank.session)
            for name in rng.permutation(NAMES).tolist()[:point]:
                rank.compress(name, gradients[name])
            assert rank.session.in_step == (point > 0)
        if points == (6, 6, 6):  # so that all has been sent
            for number in receive:
                ranks[number].receive()
        for rank, state, record in zip(ranks, before, records, strict=True):
            assert frozen(rank.session) == state  # it can be saved
            rank.abandon()
            assert not rank.session.in_step
            assert frozen(rank.session) == state
            assert rank.session.last_step is record
            assert rank.session.unfinished() == rank.session.ready() == []
    late = [rank for rank, point in zip(ranks, points, strict=True) if not point]
    if late and not ranks[0].session.dense_step:
        if all(point in (0, len(NAMES)) for point in points):
            return  # all was sent: who is late would make the step
        for _ in range(times):
            for rank in late:
                gradients = draw_gradients(rng, rank.session)
                for name in NAMES:
                    rank.compress(name, gradients[name])
            hear(late)
    check_alike(ranks, others)


def test_there_is_nothing_to_give_up_between_steps():
    rng = np.random.default_rng(0)
    sessions = trained(rng)
    before = [frozen(session) for session in sessions]
    assert [session.abandon() for session in sessions] == [{}, {}]
    assert [frozen(session) for session in sessions] == before
    assert sessions[0].last_step.step == 3
    check_alike(connect(sessions), connect(copy.deepcopy(sessions)))


def test_a_layer_that_comes_twice_is_refused_until_the_step_is_given_up():
    session, _ = sessions_of()
    gradient = np.ones(600, np.float32)
    session.compress("conv2.weight", gradient)
    with pytest.raises(DLSError, match=r"'conv2.weight': compressed twice"):
        session.compress("conv2.weight", gradient)
    assert session.has("conv2.weight")
    session.abandon()
    assert not session.has("conv2.weight")
    session.compress("conv2.weight", gradient)
    with pytest.raises(DLSError, match="a step is in progress: end it or abandon it before"):
        session.begin()


def test_the_loss_scale_may_change_once_a_step_is_given_up():
    session, _ = sessions_of()
    session.compress("conv2.weight", np.ones(600, np.float32))
    with pytest.raises(DLSError, match="within a step"):
        session.scale_to(2.0)
    session.abandon()
    session.scale_to(2.0)
    assert session.loss_scale == 2.0


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("dense_steps", [0, 9])
def test_a_step_with_nan_that_is_given_up_is_neither_refused_nor_skipped(nonfinite, dense_steps):
    rng = np.random.default_rng(0)
    ranks = connect(trained(rng, 2, nonfinite=nonfinite, dense_steps=dense_steps, momentum=0.5))
    others = copy.deepcopy(ranks)
    for rank in ranks:
        gradients = draw_gradients(rng, rank.session)
        gradients["fc.weight"][3] = np.nan
        for name in NAMES:
            rank.compress(name, gradients[name])
    for rank in ranks:
        rank.abandon()
        assert not rank.session.refused
        assert rank.session.skipped == 0
    check_alike(ranks, others)


# Once the first sum is written ------------------------------------------------------------------


@each_option
@pytest.mark.parametrize("written", [1, 3, 5])
def test_once_a_sum_is_written_the_step_is_brought_to_its_end(options, written):
    rng = np.random.default_rng(written)
    ranks = connect(trained(rng, 3, **options))
    others = copy.deepcopy(ranks)
    for rank, other in zip(ranks, others, strict=True):
        gradients = draw_gradients(rng, rank.session)
        for name in NAMES:
            rank.compress(name, gradients[name].copy())
            other.compress(name, gradients[name].copy())
    for rank, other in zip(ranks, others, strict=True):
        rank.receive()
        other.receive()
    expected = []
    for other in others:
        out = outputs(other.session, NAMES)
        expected.append(out)
        for name in NAMES:
            other.finish(name, out[name], others)
    # Rank 0 gives it up behind some layers; rank 1 does not.
    order, out = rng.permutation(NAMES).tolist(), outputs(ranks[0].session, NAMES)
    for name in order[:written]:
        ranks[0].finish(name, out[name], ranks)
    with pytest.raises(DLSError, match="while gradients are being written"):
        ranks[0].session.state_dict()
    assert ranks[0].session.abandon() == {}
    assert not ranks[0].session.in_step
    last = outputs(ranks[1].session, NAMES)
    for name in NAMES:
        ranks[1].finish(name, last[name], ranks)
    assert same(last, expected[1])
    assert same({n: out[n] for n in order[:written]}, {n: last[n] for n in order[:written]})
    for rank, other in zip(ranks, others, strict=True):
        assert frozen(rank.session) == frozen(other.session)
        assert rank.session.last_step.step == other.session.last_step.step == 4
        assert np.array_equal(rank.session.last_step.k, other.session.last_step.k)
    check_alike(ranks, others)


@pytest.mark.parametrize("accepted", [1, 3, 5])
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("bad", [None, *NAMES])
def test_a_dense_step_writes_nothing_before_its_end(accepted, nonfinite, bad):
    """So velocities do not take in what may turn out to hold NaN."""
    options = {"momentum": 0.5, "dense_steps": 9, "nonfinite": nonfinite, "prior": "measured"}
    rng = np.random.default_rng(0)
    ranks = connect(trained(rng, 2, **options))
    others, before = copy.deepcopy(ranks), [frozen(rank.session) for rank in ranks]
    for rank in ranks:
        gradients = draw_gradients(rng, rank.session)
        if bad:
            gradients[bad][0] = np.inf
        for name in NAMES:
            rank.compress(name, gradients[name])
    for rank, state in zip(ranks, before, strict=True):
        out = outputs(rank.session, NAMES)
        for name in NAMES[:accepted]:
            rank.finish(name, out[name], ranks)
        rank.abandon()
        assert not rank.session.in_step
        assert frozen(rank.session) == state
        assert rank.session.skipped == 0
    check_alike(ranks, others)


@pytest.mark.parametrize("written", [1, 3, 5])
def test_a_skipped_step_is_skipped_also_where_it_is_given_up(written):
    rng = np.random.default_rng(0)
    ranks = connect(trained(rng, 2, nonfinite="skip", momentum=0.5))
    others, before = copy.deepcopy(ranks), [frozen(rank.session) for rank in ranks]
    for rank in ranks:
        gradients = draw_gradients(rng, rank.session)
        gradients["conv1.weight"][0] = np.nan
        for name in NAMES:
            rank.compress(name, gradients[name])
    for rank in ranks:
        rank.receive()
    for rank, state in zip(ranks, before, strict=True):
        out = outputs(rank.session, NAMES)
        for name in NAMES[:written]:
            rank.finish(name, out[name], ranks)
            assert not out[name].any()
        assert frozen(rank.session) == state  # nothing is being written: it can be saved
        rank.abandon()
        assert (rank.session.refused, rank.session.skipped) == (True, 1)
        assert frozen(rank.session) == state
    check_alike(ranks, others)


def test_behind_an_error_about_nan_there_is_nothing_left_to_give_up():
    rng = np.random.default_rng(0)
    ranks = connect(trained(rng, 2))
    others = copy.deepcopy(ranks)
    for rank in ranks:
        gradients = draw_gradients(rng, rank.session)
        gradients["conv1.bias"][0] = np.nan
        for name in NAMES:
            rank.compress(name, gradients[name])
    for rank in ranks:
        rank.receive()
        with pytest.raises(NonFiniteGradientError):
            rank.finish("fc.weight", np.empty(1200, np.float32), ranks)
        assert not rank.session.in_step
        assert rank.session.abandon() == {}
    check_alike(ranks, others)


# By one rank alone ------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    options=st.sampled_from(OPTIONS),
    point=st.integers(1, len(NAMES) - 1),
    others_are_at=st.tuples(*[st.integers(0, len(NAMES))] * 2),
    seed=seeds,
)
def test_one_that_gives_up_takes_the_others_along(options, point, others_are_at, seed):
    """They hear of it when they wait for its payloads, however far they are when it happens."""
    rng = np.random.default_rng(seed)
    options = options | {"dense_steps": 0}
    ranks = connect(trained(rng, int(rng.integers(3)), 3, **options))
    if ranks[0].session.dense_step:
        return
    others, before = copy.deepcopy(ranks), [frozen(rank.session) for rank in ranks]
    orders = [rng.permutation(NAMES).tolist() for _ in ranks]
    gradients = [draw_gradients(rng, rank.session) for rank in ranks]
    leaver = int(rng.integers(3))
    stays = [rank for number, rank in enumerate(ranks) if number != leaver]
    done = dict(zip(map(id, stays), others_are_at, strict=True))
    for number, rank in enumerate(ranks):
        rank.begin()
        for name in orders[number][: done.get(id(rank), point)]:
            rank.compress(name, gradients[number][name])
    assert ranks[leaver].abandon()
    for number, rank in enumerate(ranks):
        if number != leaver:
            for name in orders[number][done[id(rank)] :]:
                rank.compress(name, gradients[number][name])
    hear(stays, rf"\[{leaver}\]")
    assert [frozen(rank.session) for rank in ranks] == before
    check_alike(ranks, others)


def hear(ranks, of=r"\[\d.*\]"):
    """These ranks wait for what others have given up, and give it up, too."""
    for rank in ranks:
        with pytest.raises(
            RanksDisagreeError, match=rf"^rank\(s\) {of} gave step \d+ up, by an exc"
        ):
            rank.receive()
        rank.abandon()


@each_option
def test_a_rank_that_has_not_begun_hears_of_each_attempt(options):
    rng = np.random.default_rng(0)
    ranks = connect(trained(rng, 3, 3, **options))
    if ranks[0].session.dense_step:
        pytest.skip("nobody waits for payloads in a dense step")
    others = copy.deepcopy(ranks)
    for attempt in range(3):
        for rank in ranks[1:]:
            gradients = draw_gradients(rng, rank.session)
            for name in NAMES[attempt::2]:
                rank.compress(name, gradients[name])
            rank.abandon()
    for _ in range(3):
        gradients = draw_gradients(rng, ranks[0].session)
        for name in NAMES:
            ranks[0].compress(name, gradients[name])
        hear(ranks[:1], r"\[1, 2\]")
    check_alike(ranks, others)


def test_nobody_hears_of_a_step_that_was_given_up_after_all_was_sent():
    """The others make it, and what is out of step then is told on all ranks."""
    rng = np.random.default_rng(0)
    ranks = connect(trained(rng, 3, 3))
    for rank in ranks:
        gradients = draw_gradients(rng, rank.session)
        for name in NAMES:
            rank.compress(name, gradients[name])
    assert ranks[1].abandon() == {}
    for rank in (ranks[0], ranks[2]):
        rank.receive()
        out = outputs(rank.session, NAMES)
        for name in NAMES:
            rank.finish(name, out[name], [rank])
    for _ in range(2):
        for rank in ranks:
            gradients = draw_gradients(rng, rank.session)
            for name in NAMES:
                rank.compress(name, gradients[name])
        before = [frozen(rank.session) for rank in ranks]
        for rank, match in zip(ranks, OUT_OF_STEP, strict=True):
            with pytest.raises(RanksDisagreeError, match=match):
                rank.receive()
            rank.abandon()
        assert [frozen(rank.session) for rank in ranks] == before
    states = [rank.session.state_dict() for rank in ranks]
    ranks = connect(sessions_of(3))
    agreed = states[0]["ratios"]
    for rank, state in zip(ranks, states, strict=True):
        rank.session.load_state_dict(state | {"ratios": agreed, "step": int(agreed[0])})
    check_alike(ranks, copy.deepcopy(ranks))


OUT_OF_STEP = [
    r"this rank is in step 5, attempt \d, but rank 1 in step 4, attempt \d: a step that ended",
    r"this rank is in step 4, attempt \d, but rank 0 in step 5, attempt \d, rank 2 in step 5, att",
    r"this rank is in step 5, attempt \d, but rank 1 in step 4, attempt \d: .* may differ",
]


def test_ranks_that_have_tried_more_or_less_often_are_told():
    """That cannot happen to ranks that tell each other; it must not go unnoticed if it does."""
    rng = np.random.default_rng(0)
    ranks = connect(trained(rng, 3))
    ranks[0].session.note("fc.bias", True)
    ranks[0].session.abandon()  # and the other one is not told
    for rank in ranks:
        gradients = draw_gradients(rng, rank.session)
        for name in NAMES:
            rank.compress(name, gradients[name])
    for rank, match in zip(
        ranks, (r"attempt 2, but rank 1 .* 1:", r"attempt 1, .* 2:"), strict=True
    ):
        with pytest.raises(RanksDisagreeError, match=match):
            rank.receive()
        rank.abandon()
    for rank in ranks:
        rank.session.agree(ranks[0].session.agreed())  # as after hvd.init()
    check_alike(ranks, copy.deepcopy(ranks))


def test_buckets_that_were_not_there_in_the_last_step_are_told_of_with_the_others():
    """Or payloads of one rank's attempt would meet those of the others' next one, for ever."""
    rng = np.random.default_rng(0)
    ranks = connect(trained(rng, 3, 3, bucket_bytes=1))
    some = ["fc.bias", "fc.weight"]  # one bucket of four
    gradients = [draw_gradients(rng, rank.session) for rank in ranks]
    for rank, of_rank in zip(ranks, gradients, strict=True):
        for name in some:
            rank.compress(name, of_rank[name])
    for rank in ranks:
        rank.receive()
    for rank in ranks:
        out = outputs(rank.session, some)
        for name in some:
            rank.finish(name, out[name], ranks)
        assert rank.session.missed == set(NAMES) - set(some)
    others = copy.deepcopy(ranks)
    gradients = [draw_gradients(rng, rank.session) for rank in ranks]
    ranks[0].compress("conv2.weight", gradients[0]["conv2.weight"])  # which is sent at once
    assert sorted(ranks[0].abandon()) == [0, 1, 3]
    ranks[1].compress("fc.bias", gradients[1]["fc.bias"])
    assert sorted(ranks[1].abandon()) == [0, 1, 2, 3]
    for name in some:
        ranks[2].compress(name, gradients[2][name])
    with pytest.raises(RanksDisagreeError, match=r"rank\(s\) \[0, 1\] gave step"):
        ranks[2].receive()
    assert sorted(ranks[2].abandon()) == [1, 2, 3]
    check_alike(ranks, others)


@pytest.mark.parametrize("options", [{"strategy": "norm"}, {"bucket_bytes": 1}, {}], ids=str)
def test_ranks_in_other_steps_are_told_so_also_where_their_payloads_have_other_lengths(options):
    rng = np.random.default_rng(0)
    ahead, behind = trained(rng, 6, **options), trained(rng, 2, **options)
    ranks = connect([ahead[0], behind[1]])
    for rank in ranks:
        gradients = draw_gradients(rng, rank.session)
        for name in NAMES:
            rank.compress(name, gradients[name])
    with pytest.raises(RanksDisagreeError, match=r"this rank is in step 7, .* rank 1 in step 3"):
        ranks[0].receive()
    with pytest.raises(RanksDisagreeError, match=r"this rank is in step 3, .* rank 0 in step 7"):
        ranks[1].receive()


def test_a_rank_waits_for_one_that_is_late_and_can_give_up_waiting():
    rng = np.random.default_rng(0)
    ranks = connect(trained(rng))
    others = copy.deepcopy(ranks)
    before = [frozen(rank.session) for rank in ranks]
    gradients = [draw_gradients(rng, rank.session) for rank in ranks]
    for name in NAMES:
        ranks[0].compress(name, gradients[0][name])
    with pytest.raises(WaitingError):
        ranks[0].receive()
    ranks[0].abandon()  # all was sent: the other one would make the step
    assert [frozen(rank.session) for rank in ranks] == before
    for name in NAMES[:2]:
        ranks[1].compress(name, gradients[1][name])
    farewell = ranks[1].abandon()  # but it gives it up, too
    assert list(farewell) == [0]
    check_alike(ranks, others)
