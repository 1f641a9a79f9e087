"""Regions of a bucket, and what ranks send to their owners, sound and damaged."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_dls.core.wire.layout import ABSENT, parts_of
from hvd_dls.core.wire.pack import pack
from hvd_dls.core.wire.regions import bounds_of, regions_of
from hvd_dls.core.wire.unpack import unpack
from hvd_dls.errors import DLSError, PayloadError
from tests.core.payloads import CODES, KINDS, bucket_of, found_in
from tests.core.strategies import seeds


@given(
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=6),
    owners=st.integers(1, 9),
    seed=seeds,
)
def test_regions_are_not_empty_and_cover_each_entry_once(sizes, owners, seed):
    bucket = replace(bucket_of(sizes), watched=("bias",))
    k = np.random.default_rng(seed).integers(0, np.array(sizes) + 1)
    if bucket.size < owners:
        with pytest.raises(DLSError, match="cannot be split among"):
            bounds_of(bucket, owners, k)
        return
    regions = regions_of(bucket, bounds_of(bucket, owners, k))
    seen = []
    for region in regions:
        assert region.size == region.sent.size > 0
        pieces = zip(region.layers, region.begins, region.sent.layers, strict=True)
        for layer, begin, piece in pieces:
            seen += [(layer, begin + i) for i in range(piece.size)]
    assert seen == [(layer, i) for layer, size in enumerate(sizes) for i in range(size)]
    assert [region.sent.watched for region in regions] == [("bias",)] + [()] * (owners - 1)
    assert len({region.sent.id for region in regions}) == owners


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_entries_comes_back_while_there_is_room(kind, code):
    bucket = replace(bucket_of([500, 30, 700], kind, code), sketches=False)
    rng = np.random.default_rng(1)
    ranks = [[found_in(layer, n, rng) for layer, n in zip(bucket.layers, k, strict=True)]
             for k in ([5, 0, 2], [0, 0, 0], [3, 3, 6])]  # fmt: skip
    ranks[1][2] = ABSENT
    packed = [pack(bucket, 12, found) for found in ranks]
    payloads = unpack(bucket, 12, np.concatenate([each.payload for each in packed]), 3)
    for found, each, payload in zip(ranks, packed, payloads, strict=True):
        for position, one in enumerate(found):
            if one is ABSENT:
                assert payload.status[position] == ABSENT
                continue
            indices, values = payload.entries(position)
            kept = each.kept[position]
            assert np.array_equal(indices, one.indices)
            assert np.array_equal(values + (0 if kept is None else kept), one.values)
    with pytest.raises(DLSError, match="12 entries found, room is for 11"):
        pack(bucket, 11, ranks[2])


@given(seed=seeds, changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255))))
def test_whatever_is_damaged_is_refused_or_still_sound(seed, changes):
    bucket = replace(bucket_of([500, 30, 700], "float16"), sketches=False)
    rng = np.random.default_rng(seed)
    gathered = np.concatenate(
        [pack(bucket, 12, [found_in(x, 3, rng) for x in bucket.layers]).payload for _ in range(2)]
    )
    for where, by in changes:
        gathered[where % len(gathered)] ^= by
    try:
        payloads = unpack(bucket, 12, gathered, 2)
    except PayloadError:
        return
    for payload in payloads:
        for position, layer in enumerate(bucket.layers):
            indices, values = payload.entries(position)
            assert np.isfinite(values).all()
            assert (np.diff(indices.astype(int)) > 0).all()
            assert (indices < layer.size).all()


def test_more_entries_than_there_is_room_for_are_refused_by_rank():
    bucket = replace(bucket_of([500, 30]), sketches=False)
    rng = np.random.default_rng(0)
    payload = pack(bucket, 6, [found_in(x, 3, rng) for x in bucket.layers]).payload
    parts = parts_of(bucket, 6, payload)
    parts.records["entries"] = [30, 3]
    with pytest.raises(PayloadError, match="payload of rank 0: entries is 33, expected at most 6"):
        unpack(bucket, 6, payload, 1)
