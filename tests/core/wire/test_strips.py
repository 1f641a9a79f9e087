"""All regions' payloads at once: the same bytes, and the same contents, as one by one."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_dls.core.wire import elias_fano
from hvd_dls.core.wire.dealing import Dealing
from hvd_dls.core.wire.layout import ABSENT, NOT_FINITE, SENT, Clock
from hvd_dls.core.wire.pack import pack
from hvd_dls.core.wire.regions import regions_of
from hvd_dls.core.wire.strips import Frame, Strip, pieces_of
from hvd_dls.core.wire.unpack import unpack
from hvd_dls.errors import PayloadError
from tests.core.payloads import BOTH, CODES, KINDS, bucket_of, found_in
from tests.core.strategies import seeds

NOW = Clock(2**32 + 7, 3)


@pytest.fixture(scope="module", params=BOTH, ids=lambda compiled: "numba" if compiled else "numpy")
def code_by(request):
    """Elias–Fano with numba, and without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elias_fano, "HAVE_NUMBA", request.param)
        yield


@st.composite
def cases(draw):
    """Regions of a bucket, room in each of them, and what was found of their pieces."""
    rng = np.random.default_rng(draw(seeds))
    kind, code = draw(st.sampled_from(KINDS)), draw(st.sampled_from(CODES))
    sizes = rng.integers(1, draw(st.sampled_from([3, 40, 700])), draw(st.integers(1, 5)))
    bucket = replace(bucket_of(sizes.tolist(), kind, code), watched=("bias", "norm"))
    owners = min(draw(st.integers(1, 9)), bucket.size)
    regions = regions_of(Dealing(bucket, owners))
    density, share = draw(st.sampled_from([0.0, 0.02, 0.3, 1.0])), draw(st.sampled_from([0, 0.3]))
    found, room = [], []
    for region in regions:
        own = [
            [None, ABSENT][rng.integers(2)]
            if rng.random() < share
            else found_in(piece, rng.binomial(piece.size, density), rng)
            for piece in region.sent.layers
        ]
        found.append(own)
        entries = sum(len(f.indices) for f in own if f is not None and f is not ABSENT)
        room.append(min(max(entries + int(rng.integers(4)), 1), region.size))
    return regions, np.array(room), found


def of_pieces(found, name, dtype):
    """A field of what was found of all pieces, one after the other."""
    sent = [f for own in found for f in own if f is not None and f is not ABSENT]
    return np.concatenate([np.empty(0, dtype), *(getattr(f, name) for f in sent)])


@given(case=cases())
def test_what_owners_get_is_written_as_one_by_one(code_by, case):
    regions, room, found = case
    told = {"norm": NOT_FINITE}
    one_by_one = [
        pack(region.sent, int(n), own, told if region.sent.watched else {}, NOW)
        for region, n, own in zip(regions, room, found, strict=True)
    ]
    flat = [f for own in found for f in own]
    status = [NOT_FINITE if f is None else ABSENT if f is ABSENT else SENT for f in flat]
    entries = [0 if f is None or f is ABSENT else len(f.indices) for f in flat]
    written = Strip(Frame([r.sent for r in regions]), room).write(
        np.array(entries),
        of_pieces(found, "indices", np.uint32),
        of_pieces(found, "values", regions[0].sent.layers[0].work_dtype),
        np.array(status, np.uint8),
        told,
        NOW,
    )
    assert written.payloads.tobytes() == b"".join(each.payload.tobytes() for each in one_by_one)
    kept = [k for each in one_by_one for k in each.kept if k is not None]
    if written.kept is None:
        assert not kept
    else:
        assert written.kept.tobytes() == b"".join(k.tobytes() for k in kept)


@given(case=cases(), changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255))))
def test_what_owners_hand_out_is_read_as_one_by_one_or_not_at_all(code_by, case, changes):
    regions, room, found = case
    payloads = np.concatenate(
        [
            pack(region.handed_out, int(n), own, clock=NOW).payload
            for region, n, own in zip(regions, room, found, strict=True)
        ]
    )
    for where, by in changes:
        payloads[where % len(payloads)] ^= by
    strip = Strip(Frame([r.handed_out for r in regions]), room)
    read = strip.read(payloads, NOW)
    ends = strip.bounds
    try:
        one_by_one = [
            unpack(region.handed_out, int(n), payloads[ends[i] : ends[i + 1]], [i])
            for i, (region, n) in enumerate(zip(regions, room, strict=True))
        ]
    except PayloadError:
        assert read is None
        return
    if not all(each.all_of(Clock(NOW.step & 0xFFFFFFFF, NOW.attempt)) for each in one_by_one):
        assert read is None
        return
    assert read is not None
    for mine, theirs in zip(read, pieces_of(one_by_one), strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.tobytes() == theirs.tobytes()
