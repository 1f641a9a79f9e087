"""Which layers travel together, and which bucket tells of those that go dense."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_dls.config import DLSConfig
from hvd_dls.core.balancing.layers import layer_spec
from hvd_dls.core.wire.buckets import bucket_bytes_of, make_bucket, make_buckets
from hvd_dls.core.wire.layout import MAX_ENTRIES
from hvd_dls.errors import DLSError
from tests.core.strategies import seeds


def named(buckets):
    return [([layer.name for layer in b.layers], list(b.watched)) for b in buckets]


def layers_of(sizes, itemsizes=None):
    itemsizes = itemsizes or [4] * len(sizes)
    pairs = enumerate(zip(sizes, itemsizes, strict=True))
    return [layer_spec(f"l{i}", (n, 1), itemsize=itemsize) for i, (n, itemsize) in pairs]


@st.composite
def models(draw):
    rng = np.random.default_rng(draw(seeds))
    count = draw(st.sampled_from([0, 1, 2, 5, 40]))
    sizes = rng.integers(1, 3000, count).tolist()
    mixed = draw(st.sampled_from([[4], [2, 4], [2, 4, 8]]))
    layers = layers_of(sizes, rng.choice(mixed, count).tolist())
    share = draw(st.sampled_from([0, 0.5, 1]))
    return layers, [layer for layer in layers if rng.random() < share]


@given(models(), st.sampled_from([1, 4000, 20_000, 1 << 25]))
def test_every_layer_is_in_one_bucket_in_the_order_of_backward(model, bucket_bytes):
    layers, sparse = model
    buckets = make_buckets(layers, sparse, DLSConfig(bucket_bytes=bucket_bytes))
    compressed = [layer.name for bucket in buckets for layer in bucket.layers]
    watched = [name for bucket in buckets for name in bucket.watched]
    assert compressed == [layer.name for layer in reversed(sparse)]
    if sparse:
        assert watched == [x.name for x in reversed(layers) if x.name not in compressed]
    else:
        assert buckets == ()
    for bucket in buckets:
        assert len({layer.work_dtype for layer in bucket.layers}) == 1
        sizes = [layer.size * layer.itemsize for layer in bucket.layers]
        assert len(sizes) == 1 or sum(sizes) <= bucket_bytes


@given(models())
def test_a_layer_that_goes_dense_is_watched_by_the_next_one_that_does_not(model):
    layers, sparse = model
    buckets = make_buckets(layers, sparse, DLSConfig(bucket_bytes=1))
    order = [layer.name for layer in reversed(layers)]
    sparse_names = {layer.name for layer in sparse}
    bucket_of = {b.layers[0].name: b for b in buckets}
    last = buckets[-1] if buckets else None
    for position, name in enumerate(order):
        if name not in sparse_names and buckets:
            after = [other for other in order[position:] if other in sparse_names]
            assert name in (bucket_of[after[0]] if after else last).watched


@pytest.mark.parametrize(
    ("bucket_bytes", "expected"),
    [
        (1, [(["l4"], ["l5"]), (["l3"], []), (["l1"], ["l2", "l0"])]),
        (8000, [(["l4", "l3"], ["l5"]), (["l1"], ["l2", "l0"])]),
        (1 << 20, [(["l4", "l3", "l1"], ["l5", "l2", "l0"])]),
    ],
)
def test_buckets_by_example(bucket_bytes, expected):
    layers = layers_of([10, 1000, 10, 1000, 1000, 10])
    sparse = [layer for layer in layers if layer.size == 1000]
    assert named(make_buckets(layers, sparse, DLSConfig(bucket_bytes=bucket_bytes))) == expected


OWNERS = {"exchange": "sparse_allreduce"}


@pytest.mark.parametrize(
    ("senders", "options", "mebibytes"),
    [
        (1, {}, 32),
        (4096, {}, 32),  # payloads are gathered: entries grow as hops do
        (1, OWNERS, 32),
        (64, OWNERS, 32),
        (65, OWNERS, 32.5),
        (128, OWNERS, 64),
        (1024, OWNERS, 512),
        (1 << 20, OWNERS, 1024),
        (1024, OWNERS | {"bucket_bytes": 32 << 20}, 32),  # what is given stands
        (4, {"bucket_bytes": 3 << 30}, 3072),
    ],
)
def test_where_owners_add_up_buckets_grow_with_the_ranks_unless_a_size_is_given(
    senders, options, mebibytes
):
    assert bucket_bytes_of(DLSConfig(**options), senders) == mebibytes * (1 << 20)


def test_global_puts_all_into_one():
    layers = layers_of([1000, 10, 1000, 1000])
    sparse = [layer for layer in layers if layer.size == 1000]
    config = DLSConfig(strategy="global", bucket_bytes=1)
    assert named(make_buckets(layers, sparse, config)) == [(["l3", "l2", "l0"], ["l1"])]
    assert make_buckets(layers, [], config) == ()


def test_global_refuses_what_cannot_be_in_one():
    config = DLSConfig(strategy="global")
    for layers in (layers_of([9, 9], [4, 8]), layers_of([MAX_ENTRIES - 5, 6])):
        with pytest.raises(DLSError, match="'l1' and 'l0' cannot travel together"):
            make_buckets(layers, layers, config)
        assert len(make_buckets(layers, layers, DLSConfig(bucket_bytes=1 << 60))) == 2
    layers = layers_of([MAX_ENTRIES - 5, 5])
    assert len(make_buckets(layers, layers, config)) == 1


def test_who_is_watched_does_not_change_what_travels():
    """Payloads have the same length, and buckets the same name."""
    (layer,) = layers_of([1000])
    plain, watching = (make_bucket([layer], DLSConfig(), names) for names in ((), ("a", "b")))
    assert watching.watched == ("a", "b")
    assert plain.id == watching.id
    assert plain.offsets.tolist() == watching.offsets.tolist()
