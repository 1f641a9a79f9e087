"""A step that one rank gives up alone: the others hear of it."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_dls.errors import RanksDisagreeError
from tests.core.network import WaitingError, connect, outputs
from tests.core.options import OPTIONS, each_option
from tests.core.ranks import draw_gradients, frozen
from tests.core.session.small_steps import (
    NAMES,
    check_alike,
    hear,
    sessions_of,
    trained,
)
from tests.core.strategies import seeds


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


def load(ranks):
    """All ranks go on from what they remember."""
    rounds = np.max([rank.session.rounds for rank in ranks], axis=0)
    for rank in ranks:
        rank.load(copy.deepcopy(rank.session.state_dict()), rounds)


@each_option
@pytest.mark.parametrize(("at", "gone"), [((6, 0, 0), []), ((0, 1, 0), []), ((1, 0, 6), [0, 2])])
def test_ranks_load_a_state_wherever_each_of_them_is_in_a_step(options, at, gone):
    """What some have sent of it meets nothing of the next step, which has the same number."""
    rng = np.random.default_rng(0)
    ranks = connect(trained(rng, 3, 3, **options))
    others = copy.deepcopy(ranks)
    for attempt in range(2):
        for number, rank in enumerate(ranks):
            gradients = draw_gradients(rng, rank.session)
            for name in NAMES[: at[number - attempt]]:
                rank.compress(name, gradients[name])
            if number in gone:
                rank.abandon()
        load(ranks)
        assert ranks[0].network.quiet
    check_alike(ranks, others)


def test_a_bucket_that_no_rank_has_begun_is_not_sent_when_a_state_is_loaded():
    """Of layers that were not there in the last step, a rank with all others sends nothing."""
    rng = np.random.default_rng(0)
    ranks = connect(trained(rng, 3, 3, bucket_bytes=1))
    some = ["fc.bias", "fc.weight"]  # one bucket of four
    for loads in (False, True):
        gradients = [draw_gradients(rng, rank.session) for rank in ranks]
        for rank, of_rank in zip(ranks[: 1 if loads else 3], gradients, strict=False):
            for name in some:
                rank.compress(name, of_rank[name])
        if loads:
            load(ranks)
            continue
        for rank in ranks:
            rank.receive()
        for rank in ranks:
            out = outputs(rank.session, some)
            for name in some:
                rank.finish(name, out[name], ranks)
    assert ranks[0].network.quiet
    assert [rank.session.rounds.tolist() for rank in ranks] == [[5, 3, 3, 3, 5]] * 3
    check_alike(ranks, copy.deepcopy(ranks))


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
