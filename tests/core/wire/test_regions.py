"""Regions of a bucket, and what ranks send to their owners, sound and damaged."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_dls.core.wire.dealing import Dealing, places_of
from hvd_dls.core.wire.layout import ABSENT, parts_of
from hvd_dls.core.wire.pack import pack
from hvd_dls.core.wire.regions import regions_of
from hvd_dls.core.wire.unpack import unpack
from hvd_dls.errors import DLSError, PayloadError
from tests.core.payloads import CODES, KINDS, bucket_of, found_in
from tests.core.strategies import seeds


@given(
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=6),
    owners=st.integers(1, 9),
)
def test_regions_are_not_empty_and_cover_each_entry_once(sizes, owners):
    bucket = replace(bucket_of(sizes), watched=("bias",))
    if bucket.size < owners:
        with pytest.raises(DLSError, match="cannot be split among"):
            Dealing(bucket, owners)
        return
    dealing = Dealing(bucket, owners)
    regions, seen, number = regions_of(dealing), [], 0
    for region in regions:
        assert region.size == region.handed_out.size > 0
        for piece in region.sent.layers:
            places = dealing.places(number)
            assert len(places) == piece.size > 0
            assert (np.diff(places) > 0).all()
            layer = int(dealing.layers[number])
            assert np.array_equal(places_of(sizes[layer], dealing.label(number)), places)
            seen += [(layer, int(place)) for place in places]
            number += 1
    assert sorted(seen) == [(layer, i) for layer, size in enumerate(sizes) for i in range(size)]
    assert [region.sent.watched for region in regions] == [("bias",)] + [()] * (owners - 1)
    assert len({region.sent.id for region in regions}) == owners
    sketched = {
        int(dealing.layers[dealing.first[owner] + position])
        for owner, region in enumerate(regions)
        for position in region.handed_out.sketched
    }
    assert sketched == set(range(len(sizes)))  # of each layer some piece has one


@given(
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=6),
    owners=st.integers(1, 9),
    seed=seeds,
)
def test_each_entry_is_found_in_its_piece_and_back(sizes, owners, seed):
    bucket = bucket_of(sizes)
    dealing = Dealing(bucket, min(owners, bucket.size))
    rng = np.random.default_rng(seed)
    layers = rng.integers(0, len(sizes), 200)
    indices = rng.integers(0, np.array(sizes)[layers]).astype(np.uint32)
    pieces, numbers = dealing.pieces_of(layers, indices)
    assert numbers.dtype == np.uint32
    assert np.array_equal(dealing.layers[pieces], layers)
    assert (numbers < dealing.sizes[pieces]).all()
    assert np.array_equal(dealing.indices_of(pieces, numbers), indices)
    for piece, number, index in zip(pieces[:20], numbers[:20], indices[:20], strict=True):
        assert dealing.places(piece)[number] == index


@pytest.mark.parametrize("owners", [4, 16, 64])
def test_rows_and_columns_are_spread_over_all_owners(owners):
    """Of a matrix whose width is a multiple of everything: no owner gets a column for itself."""
    bucket = bucket_of([1024 * 1024])
    dealing = Dealing(bucket, owners)
    matrix = np.arange(1024 * 1024, dtype=np.uint32).reshape(1024, 1024)
    for line in (matrix[7], matrix[:, 7], matrix[::64, ::64].ravel()):
        pieces, _ = dealing.pieces_of(np.zeros(len(line), np.int64), line)
        counts = np.bincount(pieces, minlength=owners)
        mean = len(line) / owners
        assert counts.max() < mean + 6 * np.sqrt(mean)


@pytest.mark.parametrize("label", ["4/4", "-1/3", "5", "0/0", "0/99999", "a/b"])
def test_what_is_no_piece_is_refused(label):
    with pytest.raises((ValueError, ZeroDivisionError)):
        places_of(1000, label)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_entries_comes_back_while_there_is_room(kind, code):
    bucket = replace(bucket_of([500, 30, 700], kind, code), sketches=())
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
    bucket = replace(bucket_of([500, 30, 700], "float16"), sketches=())
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
    bucket = replace(bucket_of([500, 30]), sketches=())
    rng = np.random.default_rng(0)
    payload = pack(bucket, 6, [found_in(x, 3, rng) for x in bucket.layers]).payload
    parts = parts_of(bucket, 6, payload)
    parts.records["entries"] = [30, 3]
    with pytest.raises(PayloadError, match="payload of rank 0: entries is 33, expected at most 6"):
        unpack(bucket, 6, payload, 1)
