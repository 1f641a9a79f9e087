"""Groups of ranks, and how a model is shared out among those of one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_dls.config import DLSConfig
from hvd_dls.core.balancing.layers import layer_spec
from hvd_dls.core.session.groups import Groups
from hvd_dls.core.session.planning import make_plan
from hvd_dls.core.session.routing import Routing
from hvd_dls.errors import DLSError

sizes = st.lists(st.integers(1, 5), min_size=1, max_size=6)


@given(sizes)
def test_every_rank_is_in_one_group_and_each_share_has_one_sender_in_each(sizes):
    groups = [Groups(sizes, rank) for rank in range(sum(sizes))]
    assert [rank for g in groups if g.rank == g.mates[0] for rank in g.mates] == [
        *range(sum(sizes))
    ]
    for g in groups:
        assert g.rank in g.mates
        assert len(g.mates) == sizes[g.own]
        assert g.mates[g.share] == g.rank
        for share in range(g.shares):
            assert [groups[rank].own for rank in g.owners(share)] == [*range(len(sizes))]
            assert {groups[rank].share for rank in g.owners(share)} == {share}


@given(sizes)
def test_all_ranks_count_alike(sizes):
    g = Groups(sizes, 0)
    assert g.weight * g.world_size == pytest.approx(g.count)
    assert g.trivial == (sizes == [1] * len(sizes))


@pytest.mark.parametrize(("sizes", "rank"), [([], 0), ([2, 0], 0), ([2, 2], 4), ([2], -1)])
def test_what_is_no_group_is_refused(sizes, rank):
    with pytest.raises(DLSError, match="in groups of"):
        Groups(sizes, rank)


def routing_of(shapes, sizes, rank, **options):
    config = DLSConfig(density=0.1, dense_below=0, cost_rule=False, **options)
    layers = [layer_spec(f"layer{i}", shape) for i, shape in enumerate(shapes)]
    groups = Groups(sizes, rank)
    return Routing(make_plan(layers, config, groups.count), config, groups)


@given(st.lists(st.integers(10, 80), min_size=1, max_size=30), sizes.filter(lambda s: len(s) > 1))
def test_each_layer_has_one_owner_in_each_group(widths, sizes):
    shapes = [(width, 40) for width in widths]
    made = [routing_of(shapes, sizes, rank) for rank in range(sum(sizes))]
    names = sorted(f"layer{i}" for i in range(len(shapes)))
    for own in range(len(sizes)):
        mates = range(sum(sizes[:own]), sum(sizes[: own + 1]))
        assert sorted(name for rank in mates for name in made[rank].owned) == names
    for routing in made:  # all ranks see the same buckets and senders
        assert [b.id for b in routing.buckets] == [b.id for b in made[0].buckets]
        assert routing.senders == made[0].senders
    for number, bucket in enumerate(made[0].buckets):  # who sends a bucket has all its layers
        for rank, routing in enumerate(made):
            owns = {layer.name for layer in bucket.layers} <= routing.owned
            assert owns == routing.sends[number] == (rank in made[0].senders[number])


def test_equal_layers_are_shared_out_evenly():
    shapes = [(50, 50)] * 16
    owned = [len(routing_of(shapes, [4, 4], rank).owned) for rank in range(8)]
    assert owned == [4] * 8


@pytest.mark.parametrize(
    ("sizes", "buckets"),
    [([1] * 4, 4), ([1] * 64, 4), ([1] * 128, 2), ([1] * 256, 1), ([2] * 128, 4)],
)
def test_the_more_ranks_send_the_fewer_buckets_there_are(sizes, buckets):
    """Where ranks are grouped, each of a group has two to send all the same."""
    shapes = [(2048, 2048)] * 8  # of 16 MiB
    for rank in (0, sum(sizes) - 1):
        routing = routing_of(shapes, sizes, rank, exchange="sparse_allreduce")
        assert len(routing.buckets) == buckets


def test_buckets_are_no_larger_than_they_may_be():
    routing = routing_of([(50, 50)] * 16, [2, 2], 0, bucket_bytes=20_000)
    assert all(4 * bucket.size <= 20_000 for bucket in routing.buckets)
    alone = routing_of([(50, 50)] * 16, [1, 1], 0)
    assert len(alone.buckets) == 1
