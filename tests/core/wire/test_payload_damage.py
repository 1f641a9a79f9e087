"""What becomes of damaged payloads."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_dls.core.balancing.sketch import LAST_BASE, WINDOW, edges
from hvd_dls.core.wire import elias_fano
from hvd_dls.core.wire.layout import ABSENT, NOT_FINITE, SENT, Status, parts_of, payload_bytes
from hvd_dls.core.wire.unpack import unpack
from hvd_dls.errors import PayloadError
from tests.core.payloads import BOTH, CODES, KINDS, bucket_of, found_by_ranks, gather
from tests.core.strategies import seeds

K = [5, 3, 2]


def damaged(code="elias-fano", kind="float16"):
    """Payloads of three ranks, and the parts of rank 1's, to be damaged: 8 entries, room for 10."""
    bucket = replace(bucket_of([70_000, 300, 10], kind, code), watched=("bias0", "bias1"))
    ranks = found_by_ranks(bucket, K, 3)
    ranks[1][2] = ABSENT
    gathered = gather(bucket, K, ranks)
    return bucket, gathered, parts_of(bucket, sum(K), gathered.reshape(3, -1)[1])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("magic", b"XYZ", "magic is b'XYZ', expected b'DLS'"),
        ("version", 1, "version is 1, expected 6"),
        ("bucket", 1, "bucket is 1, expected"),
        ("size", 70_299, "size is 70299, expected 70310"),
        ("entries", 9, "entries is 9, expected 8"),
        ("capacity", 9, "capacity is 9, expected 10"),
        ("values", 4, "values is 4, expected 3"),
        ("indices", 2, "indices is 2, expected 1"),
        ("low_bits", 13, "low_bits is 13, expected 12"),
        ("layers", 4, "layers is 4, expected 3"),
        ("abandoned", 3, "abandoned is 3, expected 0, 1 or 2"),
        ("watched", 3, "watched is 3, expected 2"),
    ],
)
def test_a_wrong_header_is_refused_by_bucket_rank_and_field(field, value, message):
    bucket, gathered, parts = damaged()
    parts.header[field] = value
    with pytest.raises(
        PayloadError, match=f"bucket 'layer0..layer2', payload of rank 1: {message}"
    ):
        unpack(bucket, K, gathered, 3)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("status", 0, "status is 0, expected 1, 2 or 3"),
        ("status", 4, "status is 4, expected 1, 2 or 3"),
        ("status", ABSENT, "entries is 3, expected 0"),
        ("status", NOT_FINITE, "entries is 3, expected 0"),
        ("entries", 4, "entries is 4, expected 3"),
        ("sketch_base", LAST_BASE + 1, "sketch_base is 1993, expected at most 1992"),
        ("exponent", 1, "exponent is 1, expected 0"),
    ],
)
def test_a_wrong_record_is_refused_by_layer_rank_and_field(field, value, message):
    bucket, gathered, parts = damaged(kind="float32")
    parts.records[field][1] = value
    with pytest.raises(PayloadError, match=f"layer 'layer1', payload of rank 1: {message}"):
        unpack(bucket, K, gathered, 3)


@pytest.mark.parametrize(("position", "value"), [(0, 0), (1, 4), (0, 255), (2, 1), (7, 128)])
def test_a_wrong_status_of_a_watched_layer_is_refused_by_bucket_and_rank(position, value):
    bucket, gathered, parts = damaged()
    parts.watched[position] = value
    found = [1, 1, 0, 0, 0, 0, 0, 0]
    found[position] = value
    message = f"payload of rank 1: watched is {found}, expected 1, 2 or 3, 2 times"
    with pytest.raises(PayloadError, match=re.escape(message)):
        unpack(bucket, K, gathered, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_values_that_are_not_finite_are_refused(kind):
    bucket, gathered, parts = damaged(kind=kind)
    word = {"float32": 0x7FC00000, "float64": 0x7FF0 << 48, "float16": 0x7E00, "bfloat16": 0x7F80}
    parts.values.view(f"u{parts.values.itemsize}")[6] = word[kind]
    with pytest.raises(PayloadError, match=r"'layer1', payload of rank 1: value 1 is (nan|inf)"):
        unpack(bucket, K, gathered, 3)


def test_a_scale_that_makes_values_infinite_is_refused():
    bucket, gathered, parts = damaged()
    parts.records["exponent"] = 127
    with pytest.raises(PayloadError, match=r"'layer0', payload of rank 1: value 0 is -?inf"):
        unpack(bucket, K, gathered, 3)


@pytest.mark.parametrize("index", [300, 2**32 - 1, 0])
def test_a_plain_index_beyond_its_layer_or_not_ascending_is_refused(index):
    bucket, gathered, parts = damaged("plain")
    parts.lower[7] = index
    with pytest.raises(PayloadError, match="'layer1', payload of rank 1: indices do not ascend wi"):
        unpack(bucket, K, gathered, 3)


@pytest.mark.parametrize("compiled", BOTH)
def test_elias_fano_indices_of_another_layer_are_refused(monkeypatch, compiled):
    monkeypatch.setattr(elias_fano, "HAVE_NUMBA", compiled)
    bucket, gathered, parts = damaged()
    low = int(parts.header["low_bits"][0])
    lower, upper = np.zeros_like(parts.lower), np.zeros_like(parts.upper)
    indices = np.array([0, 1, 2, 3, 70_000, 70_001, 70_002, 70_003], np.uint32)
    whole = (np.array([0, 8]), np.array([0, 70_310]))
    assert elias_fano.encode(indices, *whole, low, lower, upper) == elias_fano.GOOD
    parts.lower[:], parts.upper[:] = lower, upper
    with pytest.raises(PayloadError, match="'layer0', payload of rank 1: indices do not ascend wi"):
        unpack(bucket, K, gathered, 3)


@pytest.mark.parametrize("compiled", BOTH)
@pytest.mark.parametrize(("bits", "number"), [(0, "fewer"), (1 << 63, "more")])
def test_another_number_of_elias_fano_indices_is_refused(monkeypatch, compiled, bits, number):
    monkeypatch.setattr(elias_fano, "HAVE_NUMBA", compiled)
    bucket, gathered, parts = damaged()
    parts.upper[-1] |= np.uint64(bits)
    if number == "fewer":
        parts.upper[:] = 0
    message = f"rank 1: number of indices is {number} than 8, expected 8"
    with pytest.raises(PayloadError, match=message):
        unpack(bucket, K, gathered, 3)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("room", ["values", "indices"])
def test_whatever_is_not_used_must_be_zero(code, room):
    bucket, gathered, parts = damaged(code)
    part = parts.values if room == "values" else parts.lower
    part[-1] |= part.dtype.type(1) << part.dtype.type(8 * part.itemsize - 1)
    with pytest.raises(PayloadError, match=f"room for further {room} is in use, expected zero"):
        unpack(bucket, K, gathered, 3)


@pytest.mark.parametrize("change", ["size", "kind", "name", "k", "code"])
def test_a_payload_of_another_bucket_is_refused(change):
    _, gathered, _ = damaged()
    other = bucket_of(
        [70_000, 300 + (change == "size"), 10],
        "bfloat16" if change == "kind" else "float16",
        "plain" if change == "code" else "elias-fano",
        "other" if change == "name" else "layer",
    )
    k = [5 - (change == "k"), 3 + (change == "k"), 2]
    with pytest.raises(PayloadError):
        unpack(other, k, gathered, 3)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_another_number_of_payloads_than_ranks_is_refused(world_size):
    bucket, gathered, _ = damaged()
    message = rf"gathered {len(gathered)} items of uint8, expected {world_size} payloads of"
    with pytest.raises(PayloadError, match=message):
        unpack(bucket, K, gathered, world_size)


def test_a_buffer_of_another_type_is_refused():
    bucket, gathered, _ = damaged()
    with pytest.raises(PayloadError, match="float32"):
        unpack(bucket, K, gathered.astype(np.float32), 3)


def refused_or_well_formed(bucket, k, gathered):
    """What both coders make of a buffer."""
    answers = []
    for compiled in BOTH:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(elias_fano, "HAVE_NUMBA", compiled)
            try:
                answers.append(unpack(bucket, k, gathered, 2))
            except PayloadError:
                answers.append(None)
    assert len({answer is None for answer in answers}) == 1
    if answers[0] is None:
        return "refused"
    for payload, *others in zip(*answers, strict=True):
        for other in others:
            assert np.array_equal(payload.indices, other.indices)
        assert np.isfinite(payload.values).all()
        assert len(payload.watched) == len(bucket.watched)
        assert np.isin(payload.watched, Status).all()
        for position, layer in enumerate(bucket.layers):
            indices, values = payload.entries(position)
            expected = k[position] if payload.status[position] == SENT else 0
            assert len(indices) == len(values) == expected
            assert (np.diff(indices.astype(int)) > 0).all()
            assert (indices < layer.size).all()
            base, counts = int(payload.bases[position]), payload.counts[position]
            assert counts.shape == (WINDOW,)
            assert (counts >= 0).all()
            assert np.isfinite(edges(base, base + WINDOW)).all()
    return "well formed"


@pytest.mark.parametrize("code", CODES)
def test_every_flipped_bit_is_refused_or_changes_only_contents(code):
    """With room for ten entries, of which nine are there."""
    bucket = replace(bucket_of([300, 40, 5], "bfloat16", code), watched=("b0", "b1", "b2"))
    k, (first, second) = [7, 2, 1], found_by_ranks(bucket_of([300, 40, 5]), [7, 2, 1])
    gathered = gather(bucket, k, [[*first[:2], ABSENT], second])
    refused, refused_bits = set(), set()
    for byte in range(payload_bytes(bucket, 10)):
        for bit in range(8):
            gathered[byte] ^= np.uint8(1 << bit)
            if refused_or_well_formed(bucket, k, gathered) == "refused":
                refused.add(byte)
                refused_bits.update([(byte, bit)] if byte == 23 else [])
            gathered[byte] ^= np.uint8(1 << bit)
    records, counts, watched = [40 + 8 * layer for layer in range(3)], 40 + 8 * 3, 40 + 104 * 3
    values, indices = watched + 8, watched + 8 + 24
    must = {*range(23), *range(24, 32), *range(watched, values), *range(values + 2 * 9, indices)}
    must.update(start + byte for start in records for byte in (0, 1, 2, 3, 6, 7))
    contents = {*range(counts, watched), *range(32, 40)}  # and step and attempt
    assert refused_bits == {(23, bit) for bit in range(2, 8)}  # abandoned: 0, 1 or 2
    assert must <= refused
    assert not refused & contents
    assert refused.isdisjoint(range(values, values + 2 * 9, 2))  # lower bytes of bfloat16


@given(
    st.sampled_from([((300, 40), (7, 2)), ((1,), (1,)), ((70_000, 9, 5), (3, 0, 5))]),
    st.sampled_from(KINDS),
    st.sampled_from(CODES),
    st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 255)), max_size=20),
    st.one_of(st.none(), st.integers(0, 1000)),
    seeds,
)
def test_whatever_is_damaged_is_refused_or_well_formed(shape, kind, code, changes, length, seed):
    (sizes, k), rng = shape, np.random.default_rng(seed)
    bucket = replace(bucket_of(sizes, kind, code), watched=("bias0", "bias1"))
    gathered = gather(bucket, k, found_by_ranks(bucket, k, 2, seed, share=0.2))
    for byte, value in changes:
        gathered[byte % len(gathered)] = value
    refused_or_well_formed(bucket, k, gathered[:length])
    # Only behind header, records and what is watched, where there is more to find.
    gathered = gather(bucket, k, found_by_ranks(bucket, k, 2, seed))
    body = gathered.reshape(2, -1)[0, 40 + 104 * len(sizes) + 8 :]
    body[rng.integers(len(body), size=2)] ^= rng.integers(256, size=2, dtype=np.uint8)
    refused_or_well_formed(bucket, k, gathered)


@given(seeds)
def test_garbage_behind_good_records_is_refused_or_well_formed(seed):
    rng = np.random.default_rng(seed)
    bucket, k = bucket_of([200, 3, 1], "float32"), [60, 0, 1]
    gathered = gather(bucket, k, found_by_ranks(bucket, k, 2, seed))
    parts = parts_of(bucket, 61, gathered.reshape(2, -1)[0])
    parts.upper[:] = rng.integers(2**64, size=len(parts.upper), dtype=np.uint64)
    parts.lower[:] = rng.integers(2**64, size=len(parts.lower), dtype=np.uint64)
    refused_or_well_formed(bucket, k, gathered)
