"""A bucket's payload on its way: layout, round trip, and what becomes of damaged ones."""

import struct
import zlib
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_dls.core import elias_fano
from hvd_dls.core.jit import HAVE_NUMBA
from hvd_dls.core.layers import LayerSpec, layer_spec
from hvd_dls.core.layout import HEADER, RECORD, Bucket, parts_of
from hvd_dls.core.payload import (
    ABSENT,
    MAX_ENTRIES,
    NOT_FINITE,
    SENT,
    VERSION,
    pack,
    payload_bytes,
    unpack,
)
from hvd_dls.core.sketch import LAST_BASE, WINDOW, Sketch, edges
from hvd_dls.core.values import decode_counts, encode_counts
from hvd_dls.errors import DLSError, PayloadError
from tests.core.strategies import seeds

KINDS = ["float32", "float64", "float16", "bfloat16"]
CODES = ["elias-fano", "plain"]
BOTH = [True, False] if HAVE_NUMBA else [False]


class Found(NamedTuple):
    indices: np.ndarray
    values: np.ndarray
    sketch: Sketch


def bucket_of(sizes, kind="float32", code="elias-fano", name="layer"):
    itemsize = 8 if kind == "float64" else 4
    layers = (layer_spec(f"{name}{i}", (n, 1), itemsize=itemsize) for i, n in enumerate(sizes))
    return Bucket(tuple(layers), kind, code)


def found_in(layer: LayerSpec, k, rng):
    indices = np.sort(rng.choice(layer.size, k, replace=False)).astype(np.uint32)
    values = (rng.standard_normal(k) * 2.0 ** rng.integers(-60, 60)).astype(layer.work_dtype)
    counts = rng.integers(0, 2 ** rng.integers(1, 32), WINDOW).astype(np.uint32)
    return Found(indices, values, Sketch(int(rng.integers(LAST_BASE + 1)), counts))


def found_by_ranks(bucket, k, ranks=2, seed=0, others=(None, ABSENT), share=0.0):
    """What each rank found of each layer; a share of it is one of the others."""
    rng = np.random.default_rng(seed)
    return [
        [
            others[rng.integers(len(others))] if rng.random() < share else found_in(layer, n, rng)
            for layer, n in zip(bucket.layers, k, strict=True)
        ]
        for _ in range(ranks)
    ]


def gather(bucket, capacity, k, ranks):
    return np.concatenate([pack(bucket, capacity, k, found).payload for found in ranks])


def check(bucket, found, kept, payload):
    for position in range(len(bucket.layers)):
        one, (indices, values) = found[position], payload.entries(position)
        if one is None or one is ABSENT:
            assert payload.status[position] == (NOT_FINITE if one is None else ABSENT)
            assert len(indices) == len(values) == 0
            assert kept[position] is None
            continue
        assert payload.status[position] == SENT
        assert indices.dtype == np.uint32
        assert np.array_equal(indices, one.indices)
        assert values.dtype == one.values.dtype
        left = 0 if kept[position] is None else kept[position]
        assert np.array_equal(values + left, one.values)
        assert (kept[position] is None) == (bucket.values in ("float32", "float64"))
        base, counts = payload.sketch(position)
        assert base == one.sketch.base
        assert np.array_equal(counts, decode_counts(encode_counts(one.sketch.counts)))


# Round trip -------------------------------------------------------------------------------------


@st.composite
def buckets(draw):
    """A bucket, k of its layers and a capacity."""
    rng = np.random.default_rng(draw(seeds))
    count = draw(st.sampled_from([1, 2, 3, 10, 160]))
    sizes = np.exp(rng.uniform(0, draw(st.sampled_from([0, 3, 8])), count)).astype(int)
    density = draw(st.sampled_from([0, 0.001, 0.01, 0.1, 1]))
    k = np.ceil(density * sizes).astype(int)
    capacity = int(k.sum()) + draw(st.sampled_from([0, 1, 5, 1000]))
    kind, code = draw(st.sampled_from(KINDS)), draw(st.sampled_from(CODES))
    return bucket_of(sizes, kind, code), k, capacity


@given(buckets(), st.sampled_from([1, 2, 3]), st.sampled_from([0, 0.3, 1]), seeds)
def test_payloads_come_back_as_they_were_packed(made, world_size, share, seed):
    bucket, k, capacity = made
    ranks = found_by_ranks(bucket, k, world_size, seed, share=share)
    packed = [pack(bucket, capacity, k, found) for found in ranks]
    for payload, _ in packed:
        assert payload.dtype == np.uint8
        assert payload.shape == (payload_bytes(bucket, capacity),)
    gathered = np.concatenate([payload for payload, _ in packed])
    payloads = unpack(bucket, capacity, k, gathered, world_size)
    for found, (_, kept), payload in zip(ranks, packed, payloads, strict=True):
        check(bucket, found, kept, payload)


@pytest.mark.skipif(not HAVE_NUMBA, reason="numba is not installed")
@given(buckets(), seeds)
def test_without_numba_the_bytes_are_the_same(made, seed):
    bucket, k, capacity = made
    ranks = found_by_ranks(bucket, k, 2, seed, share=0.2)
    gathered = gather(bucket, capacity, k, ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elias_fano, "HAVE_NUMBA", False)
        assert np.array_equal(gathered, gather(bucket, capacity, k, ranks))
        payloads = unpack(bucket, capacity, k, gathered, 2)
    for one, other in zip(payloads, unpack(bucket, capacity, k, gathered, 2), strict=True):
        assert np.array_equal(one.indices, other.indices)
        assert np.array_equal(one.values, other.values)


@pytest.mark.parametrize("code", CODES)
def test_buffers_that_are_read_only_or_not_aligned_are_read_too(code):
    bucket, k = bucket_of([300, 5], "float16", code), [7, 5]
    ranks = found_by_ranks(bucket, k)
    packed = [pack(bucket, 12, k, found) for found in ranks]
    gathered = np.concatenate([payload for payload, _ in packed])
    shifted = np.zeros(len(gathered) + 3, np.uint8)[3:]
    shifted[:] = gathered
    frozen = np.frombuffer(gathered.tobytes(), np.uint8)
    strided = np.repeat(gathered, 2)[::2]
    for buffer in (shifted, frozen, strided):
        for found, (_, kept), payload in zip(
            ranks, packed, unpack(bucket, 12, k, buffer, 2), strict=True
        ):
            check(bucket, found, kept, payload)


def test_whole_values_and_plain_indices_are_views():
    bucket, k = bucket_of([300, 5], "float32", "plain"), [7, 5]
    gathered = gather(bucket, 12, k, found_by_ranks(bucket, k))
    for payload in unpack(bucket, 12, k, gathered, 2):
        assert np.shares_memory(payload.values, gathered)
        assert np.shares_memory(payload.indices, gathered)


# Length and layout ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("capacity", [0, 1, 7, 250, 1000])
def test_length_is_that_of_its_parts_whatever_is_sent(kind, code, capacity):
    bucket = bucket_of([1000, 1], kind, code)

    def words(n_bytes):
        return (n_bytes + 7) // 8 * 8

    width = {"float32": 4, "float64": 8}.get(kind, 2)
    low = max(1001 // capacity, 1).bit_length() - 1 if capacity else 0
    indices = words((capacity * low + 7) // 8) + words((capacity + (1001 >> low) + 1 + 7) // 8)
    if code == "plain":
        indices = words(4 * capacity)
    length = 32 + 2 * 104 + words(width * capacity) + (indices if capacity else 0)
    assert payload_bytes(bucket, capacity) == length
    for k in ([0, 0], [capacity // 2, 0], [max(capacity - 1, 0), min(capacity, 1)]):
        (found,) = found_by_ranks(bucket, k, 1)
        for sent in (found, [None, ABSENT], [ABSENT, found[1]]):
            assert len(pack(bucket, capacity, k, sent).payload) == length


def test_layout_is_pinned_byte_by_byte():
    """A change here needs a new VERSION: other ranks may run another release."""
    bucket = Bucket((layer_spec("fc.weight", (4, 15)), layer_spec("fc.bias", (36,))), "float16")
    counts = np.arange(48) + 2040
    found = Found(
        np.array([3, 9, 42], np.uint32),
        np.array([1.5, -2.0, 0.75], np.float32),
        Sketch(1003, counts),
    )
    payload = pack(bucket, 6, [3, 1], [found, None]).payload.tobytes()
    assert VERSION == 2
    assert payload[0:3] == b"DLS"
    assert payload[3] == 2
    assert payload[4:8] == struct.pack("<I", zlib.crc32(b"fc.weight\x0060\x00fc.bias\x0036\x00"))
    assert payload[8:20] == struct.pack("<3I", 96, 3, 6)  # size, entries, capacity
    assert payload[20:24] == bytes([3, 1, 4, 0])  # float16, Elias–Fano, low bits
    assert payload[24:32] == struct.pack("<2I", 2, 0)  # layers
    # 2.0 is scaled up to 2**14.
    assert payload[32:40] == struct.pack("<IHbB", 3, 1003, -13, SENT)
    codes = struct.unpack("<48H", payload[40:136])
    assert codes == (*range(2040, 2088),)  # mantissas 2**11 + m at exponent 1 follow on
    assert payload[136:144] == struct.pack("<IHbB", 0, 0, 0, NOT_FINITE)
    assert payload[144:240] == bytes(96)
    assert payload[240:256] == struct.pack("<8e", 1.5 * 2**13, -(2.0**14), 0.75 * 2**13, *[0] * 5)
    assert payload[256:264] == bytes([0x93, 0x0A, 0, 0, 0, 0, 0, 0])
    assert payload[264:272] == bytes([0b10011, 0, 0, 0, 0, 0, 0, 0])
    assert len(payload) == 272


def test_status_numbers_are_pinned():
    assert (SENT, NOT_FINITE, ABSENT) == (1, 2, 3)
    assert HEADER.itemsize == 32
    assert RECORD.itemsize == 104


def test_plain_indices_count_from_each_layers_own_zero():
    bucket, k = bucket_of([100, 200], code="plain"), [2, 2]
    indices = [np.array([1, 99], np.uint32), np.array([0, 199], np.uint32)]
    sketch = Sketch(0, np.zeros(WINDOW))
    found = [Found(i, np.ones(2, np.float32), sketch) for i in indices]
    payload = pack(bucket, 4, k, found).payload
    assert payload[-16:].tobytes() == struct.pack("<4I", 1, 99, 0, 199)


@pytest.mark.parametrize(
    ("n", "density", "kind", "most"),
    [
        (25_000_000, 0.01, "float32", 5.3),
        (25_000_000, 0.01, "bfloat16", 3.3),
        (25_000_000, 0.001, "float32", 5.8),
        (25_000_000, 0.001, "float16", 3.8),
    ],
)
def test_bytes_an_entry_of_a_model_of_25_million_parameters_in_160_layers(n, density, kind, most):
    bucket = bucket_of([n // 160] * 160, kind)
    k = round(n * density)
    records = 32 + 160 * 104
    assert (payload_bytes(bucket, k) - records) / k <= most
    if density == 0.01:  # the records' share goes down with the number of entries
        assert payload_bytes(bucket, k) / k <= most


def test_a_bucket_is_known_by_names_and_sizes():
    ids = {
        bucket_of(sizes, name=name).id
        for sizes in ([1, 23], [12, 3], [1, 2, 3], [23, 1])
        for name in ("layer", "other")
    }
    assert len(ids) == 8
    assert bucket_of([5]).name == "layer0"
    assert bucket_of([5, 5, 5]).name == "layer0..layer2"
    assert bucket_of([5, 6, 7]).position("layer2") == 2
    assert bucket_of([5, 6, 7]).offsets.tolist() == [0, 5, 11, 18]


# Wrong use --------------------------------------------------------------------------------------


def test_buckets_that_cannot_be_are_refused():
    whole, half = layer_spec("whole", (5, 1)), layer_spec("double", (5, 1), itemsize=8)
    huge = layer_spec("huge", (MAX_ENTRIES, 1))
    with pytest.raises(DLSError, match=r"one work dtype, found \['float32', 'float64'\]"):
        Bucket((whole, half))
    with pytest.raises(DLSError, match=r"one work dtype, found \[\]"):
        Bucket(())
    with pytest.raises(DLSError, match=r"'double' of float64 layers: values='float16'.*'float64'"):
        Bucket((half,), "float16")
    with pytest.raises(DLSError, match="values='float64'"):
        Bucket((whole,), "float64")
    with pytest.raises(DLSError, match=r"code='gzip', accepted are \['elias-fano', 'plain'\]"):
        Bucket((whole,), code="gzip")
    with pytest.raises(DLSError, match=f"'huge..whole' has {MAX_ENTRIES + 5} entries; at most"):
        Bucket((huge, whole))
    assert payload_bytes(Bucket((huge,)), 1000) == 32 + 104 + 4000 + 2752 + 256


@pytest.mark.parametrize("code", CODES)
def test_what_cannot_be_packed_is_refused(code):
    bucket, k = bucket_of([100, 200], code=code), [2, 3]
    ((first, second),) = found_by_ranks(bucket, k, 1)
    with pytest.raises(DLSError, match="1 layers found, expected 2"):
        pack(bucket, 5, k, [first])
    with pytest.raises(DLSError, match="'layer1': 2 entries found, expected 3"):
        pack(bucket, 5, k, [first, first])
    with pytest.raises(DLSError, match=r"k of shape \(2,\) and sum 5 with a capacity of 4"):
        pack(bucket, 4, k, [first, second])
    with pytest.raises(DLSError, match=r"k of shape \(1,\)"):
        pack(bucket, 4, [2], [first, second])
    with pytest.raises(DLSError, match="sum 5 with a capacity of 4"):
        unpack(bucket, 4, k, np.zeros(payload_bytes(bucket, 4), np.uint8), 1)
    for indices in ([5, 5, 6], [5, 4, 6], [5, 6, 200]):
        wrong = second._replace(indices=np.array(indices, np.uint32))
        with pytest.raises(DLSError, match="'layer1': indices do not ascend within its 200 ent"):
            pack(bucket, 5, k, [first, wrong])


# Damage -----------------------------------------------------------------------------------------

K = [5, 3]


def damaged(code="elias-fano", kind="float16", capacity=10):
    """Payloads of three ranks, and the parts of rank 1's, to be damaged."""
    bucket = bucket_of([70_000, 300], kind, code)
    gathered = gather(bucket, capacity, K, found_by_ranks(bucket, K, 3))
    payload = gathered.reshape(3, -1)[1]
    return bucket, gathered, parts_of(bucket, capacity, payload)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("magic", b"XYZ", "magic is b'XYZ', expected b'DLS'"),
        ("version", 1, "version is 1, expected 2"),
        ("bucket", 1, "bucket is 1, expected"),
        ("size", 70_299, "size is 70299, expected 70300"),
        ("entries", 9, "entries is 9, expected 8"),
        ("capacity", 9, "capacity is 9, expected 10"),
        ("values", 4, "values is 4, expected 3"),
        ("indices", 2, "indices is 2, expected 1"),
        ("low_bits", 13, "low_bits is 13, expected 12"),
        ("layers", 3, "layers is 3, expected 2"),
        ("reserved", 1, "reserved is 1, expected 0"),
        ("reserved2", 1, "reserved2 is 1, expected 0"),
    ],
)
def test_a_wrong_header_is_refused_by_bucket_rank_and_field(field, value, message):
    bucket, gathered, parts = damaged()
    parts.header[field] = value
    with pytest.raises(
        PayloadError, match=f"bucket 'layer0..layer1', payload of rank 1: {message}"
    ):
        unpack(bucket, 10, K, gathered, 3)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("status", 0, "status is 0, expected 1, 2 or 3"),
        ("status", 4, "status is 4, expected 1, 2 or 3"),
        ("status", ABSENT, "entries is 3, expected 0"),
        ("entries", 4, "entries is 4, expected 3"),
        ("sketch_base", LAST_BASE + 1, "sketch_base is 1993, expected at most 1992"),
        ("exponent", 1, "exponent is 1, expected 0"),
    ],
)
def test_a_wrong_record_is_refused_by_layer_rank_and_field(field, value, message):
    bucket, gathered, parts = damaged(kind="float32")
    parts.records[field][1] = value
    with pytest.raises(PayloadError, match=f"layer 'layer1', payload of rank 1: {message}"):
        unpack(bucket, 10, K, gathered, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_values_that_are_not_finite_are_refused(kind):
    bucket, gathered, parts = damaged(kind=kind)
    word = {"float32": 0x7FC00000, "float64": 0x7FF0 << 48, "float16": 0x7E00, "bfloat16": 0x7F80}
    parts.values.view(f"u{parts.values.itemsize}")[6] = word[kind]
    with pytest.raises(PayloadError, match=r"'layer1', payload of rank 1: value 1 is (nan|inf)"):
        unpack(bucket, 10, K, gathered, 3)


def test_a_scale_that_makes_values_infinite_is_refused():
    bucket, gathered, parts = damaged()
    parts.records["exponent"] = 127
    with pytest.raises(PayloadError, match=r"'layer0', payload of rank 1: value 0 is -?inf"):
        unpack(bucket, 10, K, gathered, 3)


@pytest.mark.parametrize("index", [300, 2**32 - 1, 0])
def test_a_plain_index_beyond_its_layer_or_not_ascending_is_refused(index):
    bucket, gathered, parts = damaged("plain")
    parts.lower[7] = index
    with pytest.raises(PayloadError, match="'layer1', payload of rank 1: indices do not ascend wi"):
        unpack(bucket, 10, K, gathered, 3)


@pytest.mark.parametrize("compiled", BOTH)
def test_elias_fano_indices_of_another_layer_are_refused(monkeypatch, compiled):
    monkeypatch.setattr(elias_fano, "HAVE_NUMBA", compiled)
    bucket, gathered, parts = damaged()
    low = int(parts.header["low_bits"][0])
    lower, upper = np.zeros_like(parts.lower), np.zeros_like(parts.upper)
    indices = np.array([0, 1, 2, 3, 70_000, 70_001, 70_002, 70_003], np.uint32)
    whole = (np.array([0, 8]), np.array([0, 70_300]))
    assert elias_fano.encode(indices, *whole, low, lower, upper) == elias_fano.GOOD
    parts.lower[:], parts.upper[:] = lower, upper
    with pytest.raises(PayloadError, match="'layer0', payload of rank 1: indices do not ascend wi"):
        unpack(bucket, 10, K, gathered, 3)


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
        unpack(bucket, 10, K, gathered, 3)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("room", ["values", "indices"])
def test_whatever_is_not_used_must_be_zero(code, room):
    bucket, gathered, parts = damaged(code)
    part = parts.values if room == "values" else parts.lower
    part[-1] |= part.dtype.type(1) << part.dtype.type(8 * part.itemsize - 1)
    with pytest.raises(PayloadError, match=f"room for further {room} is in use, expected zero"):
        unpack(bucket, 10, K, gathered, 3)


@pytest.mark.parametrize("change", ["size", "kind", "name", "k", "code", "capacity"])
def test_a_payload_of_another_bucket_is_refused(change):
    _, gathered, _ = damaged()
    other = bucket_of(
        [70_000, 300 + (change == "size")],
        "bfloat16" if change == "kind" else "float16",
        "plain" if change == "code" else "elias-fano",
        "other" if change == "name" else "layer",
    )
    k, capacity = [5, 3 + (change == "k")], 10 + (change == "capacity")
    with pytest.raises(PayloadError):
        unpack(other, capacity, k, gathered, 3)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_another_number_of_payloads_than_ranks_is_refused(world_size):
    bucket, gathered, _ = damaged()
    message = rf"gathered {len(gathered)} items of uint8, expected {world_size} payloads of"
    with pytest.raises(PayloadError, match=message):
        unpack(bucket, 10, K, gathered, world_size)


def test_a_buffer_of_another_type_is_refused():
    bucket, gathered, _ = damaged()
    with pytest.raises(PayloadError, match="float32"):
        unpack(bucket, 10, K, gathered.astype(np.float32), 3)


def refused_or_well_formed(bucket, capacity, k, gathered):
    """What both coders make of a buffer."""
    answers = []
    for compiled in BOTH:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(elias_fano, "HAVE_NUMBA", compiled)
            try:
                answers.append(unpack(bucket, capacity, k, gathered, 2))
            except PayloadError:
                answers.append(None)
    assert len({answer is None for answer in answers}) == 1
    if answers[0] is None:
        return "refused"
    for payload, *others in zip(*answers, strict=True):
        for other in others:
            assert np.array_equal(payload.indices, other.indices)
        assert np.isfinite(payload.values).all()
        for position, layer in enumerate(bucket.layers):
            indices, values = payload.entries(position)
            expected = k[position] if payload.status[position] == SENT else 0
            assert len(indices) == len(values) == expected
            assert (np.diff(indices.astype(int)) > 0).all()
            assert (indices < layer.size).all()
            base, counts = payload.sketch(position)
            assert counts.shape == (WINDOW,)
            assert (counts >= 0).all()
            assert np.isfinite(edges(base, base + WINDOW)).all()
    return "well formed"


@pytest.mark.parametrize("code", CODES)
def test_every_flipped_bit_is_refused_or_changes_only_contents(code):
    bucket, k, capacity = bucket_of([300, 40], "bfloat16", code), [7, 2], 10
    gathered = gather(bucket, capacity, k, found_by_ranks(bucket, k, 2))
    refused = set()
    for byte in range(payload_bytes(bucket, capacity)):
        for bit in range(8):
            gathered[byte] ^= np.uint8(1 << bit)
            if refused_or_well_formed(bucket, capacity, k, gathered) == "refused":
                refused.add(byte)
            gathered[byte] ^= np.uint8(1 << bit)
    records = [32 + 104 * layer for layer in range(2)]
    values, indices = 32 + 2 * 104, 32 + 2 * 104 + 24
    must = {*range(32), *range(values + 2 * 9, indices)}
    must.update(start + byte for start in records for byte in (0, 1, 2, 3, 6, 7))
    contents = {byte for start in records for byte in range(start + 8, start + 104)}
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
    bucket, capacity = bucket_of(sizes, kind, code), sum(k) + seed % 3
    gathered = gather(bucket, capacity, k, found_by_ranks(bucket, k, 2, seed, share=0.2))
    for byte, value in changes:
        gathered[byte % len(gathered)] = value
    refused_or_well_formed(bucket, capacity, k, gathered[:length])
    # Only behind header and records, where there is more to find.
    gathered = gather(bucket, capacity, k, found_by_ranks(bucket, k, 2, seed))
    body = gathered.reshape(2, -1)[0, 32 + 104 * len(sizes) :]
    body[rng.integers(len(body), size=2)] ^= rng.integers(256, size=2, dtype=np.uint8)
    refused_or_well_formed(bucket, capacity, k, gathered)


@given(seeds)
def test_garbage_behind_good_records_is_refused_or_well_formed(seed):
    rng = np.random.default_rng(seed)
    bucket, k = bucket_of([200, 3, 1], "float32"), [60, 0, 1]
    gathered = gather(bucket, 61, k, found_by_ranks(bucket, k, 2, seed))
    parts = parts_of(bucket, 61, gathered.reshape(2, -1)[0])
    parts.upper[:] = rng.integers(2**64, size=len(parts.upper), dtype=np.uint64)
    parts.lower[:] = rng.integers(2**64, size=len(parts.lower), dtype=np.uint64)
    refused_or_well_formed(bucket, 61, k, gathered)
