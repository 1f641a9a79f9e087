"""Payloads of ranks that chose for themselves how much they send, and so how long they are."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_dls.core.wire import elias_fano
from hvd_dls.core.wire.headers import headers_in, pack_header
from hvd_dls.core.wire.layout import ABSENT, SENT, Clock, Status, parts_of, payload_bytes
from hvd_dls.core.wire.pack import pack, pack_abandoned
from hvd_dls.core.wire.unpack import unpack, unpack_varying
from hvd_dls.errors import PayloadError
from tests.core.payloads import BOTH, CODES, KINDS, bucket_of, buckets, check, found_by_ranks
from tests.core.strategies import seeds


def entries(found):
    """k of each layer, as a rank that chose it would have it."""
    return np.array([0 if f is None or f is ABSENT else len(f.indices) for f in found])


def drawn(bucket, k, world_size, seed, share=0.2):
    """What each rank found: up to k entries of each layer."""
    rng = np.random.default_rng(seed)
    ranks = [rng.integers(0, np.asarray(k) + 1) for _ in range(world_size)]
    return [found_by_ranks(bucket, own, 1, int(rng.integers(99)), share=share)[0] for own in ranks]


def packed_by(bucket, ranks, told=None):
    told = told or [{}] * len(ranks)
    return [
        pack(bucket, entries(found), found, each, Clock(step, 3))
        for step, (found, each) in enumerate(zip(ranks, told, strict=True))
    ]


def joined(packed):
    return np.concatenate([payload for payload, _ in packed])


# Round trip -------------------------------------------------------------------------------------


@given(buckets(), st.sampled_from([1, 2, 5]), st.sampled_from([0, 0.3, 1]), seeds)
def test_payloads_of_any_length_come_back_as_they_were_packed(made, world_size, share, seed):
    bucket, k = made
    bucket = replace(bucket, watched=("bias0", "bias1"))
    told = np.random.default_rng(seed).choice(Status, (world_size, 2)).tolist()
    ranks = drawn(bucket, k, world_size, seed, share)
    packed = packed_by(bucket, ranks, [dict(zip(bucket.watched, t, strict=True)) for t in told])
    for found, (payload, _) in zip(ranks, packed, strict=True):
        assert len(payload) == payload_bytes(bucket, int(entries(found).sum()))
    payloads = unpack_varying(bucket, joined(packed), world_size)
    assert [payload.watched.tolist() for payload in payloads] == told
    assert [payload.clock for payload in payloads] == [(rank, 3) for rank in range(world_size)]
    for found, (_, kept), payload in zip(ranks, packed, payloads, strict=True):
        check(bucket, found, kept, payload)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_agree_are_read_like_those_that_have_to(kind, code):
    bucket, k = bucket_of([300, 5, 70_000], kind, code), [7, 5, 0]
    gathered = joined(packed_by(bucket, found_by_ranks(bucket, k, 3)))
    pairs = zip(unpack_varying(bucket, gathered, 3), unpack(bucket, k, gathered, 3), strict=True)
    for own, agreed in pairs:
        assert all(np.array_equal(x, y) for x, y in zip(own, agreed, strict=True))


@pytest.mark.parametrize("code", CODES)
def test_buffers_that_are_read_only_or_not_aligned_are_read_too(code):
    bucket = bucket_of([300, 5], "float16", code)
    ranks = drawn(bucket, [7, 5], 3, 0)
    packed = packed_by(bucket, ranks)
    gathered = joined(packed)
    shifted = np.zeros(len(gathered) + 3, np.uint8)[3:]
    shifted[:] = gathered
    frozen = np.frombuffer(gathered.tobytes(), np.uint8)
    strided = np.repeat(gathered, 2)[::2]
    for buffer in (shifted, frozen, strided):
        payloads = unpack_varying(bucket, buffer, 3)
        for found, (_, kept), payload in zip(ranks, packed, payloads, strict=True):
            check(bucket, found, kept, payload)


# Who sent them, and when ------------------------------------------------------------------------


@given(buckets(), st.sampled_from([1, 2, 5]), seeds)
def test_headers_are_read_whatever_the_lengths(made, world_size, seed):
    bucket, k = made
    ranks = drawn(bucket, k, world_size, seed)
    payloads = [payload for payload, _ in packed_by(bucket, ranks)]
    gone = pack_abandoned(bucket, k, Clock(7, 1))
    alone = pack_header(bucket, 3, Clock(8, 2))
    told, by_headers = headers_in(bucket, np.concatenate([*payloads, alone, gone]))
    assert told == [((rank, 3), False) for rank in range(world_size)] + [((7, 1), True)]
    assert by_headers == [((8, 2), False)]


def test_what_is_not_the_bucket_s_payloads_has_no_headers():
    bucket, gathered, _ = three_payloads()
    assert len(headers_in(bucket, gathered)[0]) == 3
    for wrong in (gathered[:-8], gathered[8:], np.append(gathered, gathered[:8]), gathered[:0]):
        assert headers_in(bucket, wrong) == ([], [])
    assert headers_in(bucket, gathered.astype(np.uint16)) == ([], [])
    assert headers_in(bucket_of([70_000, 301]), gathered) == ([], [])
    for byte in range(32):
        damaged = gathered.copy()
        damaged[byte] ^= 1
        assert headers_in(bucket, damaged) == ([], []) or 12 <= byte < 16 or byte == 23


@given(seeds, st.integers(0, 400))
def test_noise_has_no_headers(seed, length):
    noise = np.random.default_rng(seed).integers(256, size=length, dtype=np.uint8)
    assert headers_in(bucket_of([300, 40]), noise) == ([], [])


# Damage -----------------------------------------------------------------------------------------


def three_payloads(kind="float32", code="elias-fano"):
    """A bucket, three ranks' payloads, and where each of these begins and the last one ends."""
    bucket = replace(bucket_of([70_000, 300], kind, code), watched=("bias0",))
    own = [found_by_ranks(bucket, k, 1, k[0])[0] for k in ([5, 3], [9, 0], [0, 300])]
    payloads = [payload for payload, _ in packed_by(bucket, own)]
    return bucket, np.concatenate(payloads), np.cumsum([0, *map(len, payloads)])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("magic", b"XYZ", "magic is b'XYZ', expected b'DLS'"),
        ("version", 2, "version is 2, expected 6"),
        ("bucket", 1, "bucket is 1, expected"),
        ("size", 70_299, "size is 70299, expected 70300"),
        ("entries", 8, "entries is 8, expected 9"),
        ("capacity", 8, "capacity is 8, expected 9"),
        ("capacity", 2**32 - 1, "capacity is 4294967295, expected 9"),
        ("values", 4, "values is 4, expected 1"),
        ("indices", 2, "indices is 2, expected 1"),
        ("low_bits", 1, "low_bits is 1, expected 12"),
        ("layers", 3, "layers is 3, expected 2"),
        ("abandoned", 3, "abandoned is 3, expected 0, 1 or 2"),
        ("watched", 2, "watched is 2, expected 1"),
    ],
)
def test_a_wrong_header_is_refused_by_bucket_rank_and_field(field, value, message):
    bucket, gathered, starts = three_payloads()
    parts_of(bucket, 9, gathered[starts[1] : starts[2]]).header[field] = value
    with pytest.raises(PayloadError, match=f"'layer0..layer1', payload of rank 1: {message}"):
        unpack_varying(bucket, gathered, 3)


@pytest.mark.parametrize("entries", [1, 8, 10, 70_000, 70_001, 2**32 - 1])
def test_another_number_of_entries_is_refused(entries):
    bucket, gathered, starts = three_payloads()
    parts = parts_of(bucket, 9, gathered[starts[1] : starts[2]])
    parts.records["entries"][0] = entries
    with pytest.raises(PayloadError, match=f"rank 1: capacity is 9, expected {entries}"):
        unpack_varying(bucket, gathered, 3)
    parts.header["capacity"] = parts.header["entries"] = entries
    with pytest.raises(PayloadError, match=r"payload of rank 1|bytes|items"):
        unpack_varying(bucket, gathered, 3)


@pytest.mark.parametrize("code", CODES)
def test_the_last_rank_s_contents_are_refused_by_layer_and_rank(code):
    bucket, gathered, starts = three_payloads(code=code)
    last = parts_of(bucket, 300, gathered[starts[2] :])
    last.values[7] = np.nan
    with pytest.raises(PayloadError, match="'layer1', payload of rank 2: value 7 is nan"):
        unpack_varying(bucket, gathered, 3)


def test_every_truncation_is_refused():
    bucket, gathered, _ = three_payloads()
    for length in range(len(gathered)):
        with pytest.raises(PayloadError):
            unpack_varying(bucket, gathered[:length], 3)


def test_another_number_of_payloads_than_ranks_is_refused():
    bucket, gathered, starts = three_payloads()
    with pytest.raises(PayloadError, match=f"gathered {starts[3]} bytes, expected {starts[2]} fr"):
        unpack_varying(bucket, gathered, 2)
    with pytest.raises(PayloadError, match="payload of rank 3: 0 items of uint8, expected 256 byt"):
        unpack_varying(bucket, gathered, 4)
    with pytest.raises(PayloadError, match="gathered 1 bytes, expected 0 from 0 ranks"):
        unpack_varying(bucket, gathered[:1], 0)


@pytest.mark.parametrize("dtype", [np.float32, np.int8, np.uint16])
def test_a_buffer_of_another_type_is_refused(dtype):
    bucket, gathered, _ = three_payloads()
    with pytest.raises(PayloadError, match=np.dtype(dtype).name):
        unpack_varying(bucket, gathered.astype(dtype), 3)


def refused_or_well_formed(bucket, gathered, world_size=3):
    """What both coders make of a buffer."""
    answers = []
    for compiled in BOTH:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(elias_fano, "HAVE_NUMBA", compiled)
            try:
                answers.append(unpack_varying(bucket, gathered, world_size))
            except PayloadError:
                answers.append(None)
    assert len({answer is None for answer in answers}) == 1
    for payload in answers[0] or []:
        assert np.isin(payload.watched, Status).all()
        assert np.isfinite(payload.values).all()
        for position, layer in enumerate(bucket.layers):
            indices, values = payload.entries(position)
            assert len(indices) == len(values)
            assert len(indices) == 0 or payload.status[position] == SENT
            assert (np.diff(indices.astype(int)) > 0).all()
            assert (indices < layer.size).all()
    return "refused" if answers[0] is None else "well formed"


shapes = st.sampled_from([((300, 40), (7, 2)), ((1,), (1,)), ((70_000, 9, 5), (3, 0, 5))])


@given(
    shapes,
    st.sampled_from(KINDS),
    st.sampled_from(CODES),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=20),
    st.one_of(st.none(), st.integers(0, 2000)),
    seeds,
)
def test_whatever_is_damaged_is_refused_or_well_formed(shape, kind, code, changes, length, seed):
    (sizes, k), rng = shape, np.random.default_rng(seed)
    bucket = replace(bucket_of(sizes, kind, code), watched=("bias0", "bias1"))
    packed = packed_by(bucket, drawn(bucket, k, 3, seed))
    gathered = joined(packed)
    for byte, value in changes:
        gathered[byte % len(gathered)] = value
    refused_or_well_formed(bucket, gathered[:length])
    # Few bits of the first rank's header and records, which tell the length.
    gathered = joined(packed)
    head = rng.integers(payload_bytes(bucket, 0), size=2)
    gathered[head] ^= (1 << rng.integers(8, size=2)).astype(np.uint8)
    refused_or_well_formed(bucket, gathered)
    # Lengths and numbers of entries that fit together, but are not those of the contents.
    gathered = joined(packed)
    parts = parts_of(bucket, 0, gathered[: payload_bytes(bucket, 0)])
    parts.records["entries"] = rng.integers(0, np.array(sizes) + 2)
    parts.records["status"] = rng.choice([1, 1, 2, 3], len(sizes))
    parts.header["entries"] = parts.header["capacity"] = parts.records["entries"].sum()
    refused_or_well_formed(bucket, gathered)


@given(seeds, st.integers(0, 400))
def test_noise_is_refused(seed, length):
    noise = np.random.default_rng(seed).integers(256, size=length, dtype=np.uint8)
    assert refused_or_well_formed(bucket_of([300, 40]), noise) == "refused"


@pytest.mark.parametrize("code", CODES)
def test_every_flipped_bit_of_header_and_records_is_refused_or_well_formed(code):
    bucket = replace(bucket_of([300, 40], "bfloat16", code), watched=("bias0",))
    packed = packed_by(bucket, found_by_ranks(bucket, [7, 2], 2))
    gathered = joined(packed)
    for byte in range(payload_bytes(bucket, 0)):
        for bit in range(8):
            gathered[byte] ^= np.uint8(1 << bit)
            found = refused_or_well_formed(bucket, gathered, 2)
            if byte < 40:  # in the header, all but ``abandoned`` and the clock
                may_be = (byte == 23 and bit < 2) or byte >= 32
                assert found == ("well formed" if may_be else "refused")
            gathered[byte] ^= np.uint8(1 << bit)
