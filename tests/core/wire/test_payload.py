"""A bucket's payload on its way: layout, round trip, and what cannot be packed."""

import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_dls.core.balancing.layers import layer_spec
from hvd_dls.core.balancing.sketch import WINDOW, Sketch
from hvd_dls.core.jit import HAVE_NUMBA
from hvd_dls.core.wire import elias_fano
from hvd_dls.core.wire.layout import (
    ABSENT,
    COUNTS,
    HEADER,
    MAX_ENTRIES,
    NOT_FINITE,
    RECORD,
    SENT,
    START,
    VERSION,
    Bucket,
    Clock,
    Status,
    payload_bytes,
)
from hvd_dls.core.wire.pack import pack, pack_abandoned
from hvd_dls.core.wire.unpack import unpack
from hvd_dls.errors import DLSError
from tests.core.payloads import (
    CODES,
    KINDS,
    Found,
    bucket_of,
    buckets,
    check,
    found_by_ranks,
    gather,
)
from tests.core.strategies import seeds

# Round trip -------------------------------------------------------------------------------------


@given(buckets(), st.sampled_from([1, 2, 3]), st.sampled_from([0, 0.3, 1]), seeds)
def test_payloads_come_back_as_they_were_packed(made, world_size, share, seed):
    bucket, k = made
    ranks = found_by_ranks(bucket, k, world_size, seed, share=share)
    packed = [pack(bucket, k, found) for found in ranks]
    for payload, _ in packed:
        assert payload.dtype == np.uint8
        assert payload.shape == (payload_bytes(bucket, int(k.sum())),)
    gathered = np.concatenate([payload for payload, _ in packed])
    payloads = unpack(bucket, k, gathered, world_size)
    for found, (_, kept), payload in zip(ranks, packed, payloads, strict=True):
        check(bucket, found, kept, payload)


@pytest.mark.skipif(not HAVE_NUMBA, reason="numba is not installed")
@given(buckets(), seeds)
def test_without_numba_the_bytes_are_the_same(made, seed):
    bucket, k = made
    ranks = found_by_ranks(bucket, k, 2, seed, share=0.2)
    gathered = gather(bucket, k, ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elias_fano, "HAVE_NUMBA", False)
        assert np.array_equal(gathered, gather(bucket, k, ranks))
        payloads = unpack(bucket, k, gathered, 2)
    for one, other in zip(payloads, unpack(bucket, k, gathered, 2), strict=True):
        assert np.array_equal(one.indices, other.indices)
        assert np.array_equal(one.values, other.values)


@pytest.mark.parametrize("code", CODES)
def test_buffers_that_are_read_only_or_not_aligned_are_read_too(code):
    bucket, k = bucket_of([300, 5], "float16", code), [7, 5]
    ranks = found_by_ranks(bucket, k)
    packed = [pack(bucket, k, found) for found in ranks]
    gathered = np.concatenate([payload for payload, _ in packed])
    shifted = np.zeros(len(gathered) + 3, np.uint8)[3:]
    shifted[:] = gathered
    frozen = np.frombuffer(gathered.tobytes(), np.uint8)
    strided = np.repeat(gathered, 2)[::2]
    for buffer in (shifted, frozen, strided):
        for found, (_, kept), payload in zip(
            ranks, packed, unpack(bucket, k, buffer, 2), strict=True
        ):
            check(bucket, found, kept, payload)


def test_whole_values_and_plain_indices_are_views():
    bucket, k = bucket_of([300, 5], "float32", "plain"), [7, 5]
    gathered = gather(bucket, k, found_by_ranks(bucket, k))
    for payload in unpack(bucket, k, gathered, 2):
        assert np.shares_memory(payload.values, gathered)
        assert np.shares_memory(payload.indices, gathered)


@given(st.sampled_from([0, 1, 3, 8, 9, 20]), st.sampled_from([1, 2, 4]), seeds)
def test_the_status_of_each_rank_s_watched_layers_comes_back(n_watched, world_size, seed):
    rng = np.random.default_rng(seed)
    watched = tuple(f"bias{i}" for i in range(n_watched))
    bucket, k = replace(bucket_of([300, 5]), watched=watched), [7, 5]
    ranks = found_by_ranks(bucket, k, world_size, seed, share=0.3)
    told = [dict(zip(watched, rng.choice(Status, n_watched), strict=True)) for _ in ranks]
    said = [
        {n: s for n, s in of_rank.items() if s != SENT or rng.random() < 0.5} for of_rank in told
    ]
    packed = [pack(bucket, k, found, each) for found, each in zip(ranks, said, strict=True)]
    gathered = np.concatenate([payload for payload, _ in packed])
    payloads = unpack(bucket, k, gathered, world_size)
    assert [p.watched.tolist() for p in payloads] == [list(of_rank.values()) for of_rank in told]
    for found, (_, kept), payload in zip(ranks, packed, payloads, strict=True):
        check(bucket, found, kept, payload)


clocks = st.builds(
    Clock,
    st.one_of(st.integers(0, 20), st.integers(2**32 - 3, 2**32 - 1)),
    st.one_of(st.integers(0, 3), st.just(2**32 - 1)),
)


@given(st.lists(clocks, min_size=1, max_size=4), seeds)
def test_each_rank_s_clock_comes_back_and_changes_nothing_else(of_ranks, seed):
    bucket, k = replace(bucket_of([300, 5]), watched=("bias",)), [7, 5]
    ranks = found_by_ranks(bucket, k, len(of_ranks), seed, share=0.3)
    payloads = [
        pack(bucket, k, found, clock=clock).payload
        for found, clock in zip(ranks, of_ranks, strict=True)
    ]
    unpacked = unpack(bucket, k, np.concatenate(payloads), len(ranks))
    assert [payload.clock for payload in unpacked] == of_ranks
    for payload, found in zip(payloads, ranks, strict=True):
        changed = np.flatnonzero(payload != pack(bucket, k, found).payload)
        assert set(changed) <= set(range(32, 40))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("code", CODES)
def test_a_rank_that_has_given_the_step_up_says_so_in_a_payload_of_the_usual_length(kind, code):
    bucket, k = replace(bucket_of([300, 5], kind, code), watched=("a", "b")), [7, 5]
    (found,) = found_by_ranks(bucket, k, 1)
    good, gone = pack(bucket, k, found), pack_abandoned(bucket, k, Clock(3, 1))
    assert gone.shape == good.payload.shape
    there, away = unpack(bucket, k, np.concatenate([good.payload, gone]), 2)
    check(bucket, found, good.kept, there)
    assert (there.abandoned, away.abandoned) == (False, True)
    assert away.clock == (3, 1)
    check(bucket, [ABSENT] * 2, [None] * 2, away)
    assert away.watched.tolist() == [ABSENT] * 2


def test_steps_count_modulo_2_to_the_32():
    bucket, k = bucket_of([5]), [2]
    (found,) = found_by_ranks(bucket, k, 1)
    gathered = pack(bucket, k, found, clock=Clock(2**32 + 7, 1)).payload
    assert unpack(bucket, k, gathered, 1)[0].clock == Clock(7, 1)
    assert unpack(bucket, k, pack(bucket, k, found).payload, 1)[0].clock == START == (0, 0)


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
    length = 40 + 2 * 104 + words(width * capacity) + (indices if capacity else 0)
    assert payload_bytes(bucket, capacity) == length
    for k in ([capacity, 0], [max(capacity - 1, 0), min(capacity, 1)]):
        (found,) = found_by_ranks(bucket, k, 1)
        for sent in (found, [None, ABSENT], [ABSENT, found[1]]):
            assert len(pack(bucket, k, sent).payload) == length


def test_layout_is_pinned_byte_by_byte():
    """A change here needs a new VERSION: other ranks may run another release."""
    layers = layer_spec("fc.weight", (4, 15)), layer_spec("fc.bias", (36,))
    bucket = Bucket(layers, "float16", watched=("bn.weight", "bn.bias"))
    counts = np.arange(48) + 2040
    found = Found(
        np.array([3, 9, 42], np.uint32),
        np.array([1.5, -2.0, 0.75], np.float32),
        Sketch(1003, counts),
    )
    told = {"bn.bias": NOT_FINITE}
    payload = pack(bucket, [3, 3], [found, None], told, Clock(70_000, 2)).payload.tobytes()
    assert VERSION == 6
    assert payload[0:3] == b"DLS"
    assert payload[3] == 6
    assert payload[4:8] == struct.pack("<I", zlib.crc32(b"fc.weight\x0060\x00fc.bias\x0036\x00"))
    assert payload[8:20] == struct.pack("<3I", 96, 3, 6)  # size, entries, capacity
    assert payload[20:24] == bytes([3, 1, 4, 0])  # float16, Elias–Fano, low bits, not abandoned
    assert payload[24:40] == struct.pack("<4I", 2, 2, 70_000, 2)  # layers, watched, step, attempt
    # 2.0 is scaled up to 2**14.
    assert payload[40:48] == struct.pack("<IHbB", 3, 1003, -13, SENT)
    assert payload[48:56] == struct.pack("<IHbB", 0, 0, 0, NOT_FINITE)
    codes = struct.unpack("<48H", payload[56:152])
    assert codes == (*range(2040, 2088),)  # mantissas 2**11 + m at exponent 1 follow on
    assert payload[152:248] == bytes(96)
    assert payload[248:256] == bytes([SENT, NOT_FINITE, 0, 0, 0, 0, 0, 0])  # bn.weight, bn.bias
    assert payload[256:272] == struct.pack("<8e", 1.5 * 2**13, -(2.0**14), 0.75 * 2**13, *[0] * 5)
    assert payload[272:280] == bytes([0x93, 0x0A, 0, 0, 0, 0, 0, 0])
    assert payload[280:288] == bytes([0b10011, 0, 0, 0, 0, 0, 0, 0])
    assert len(payload) == 288
    abandoned = pack_abandoned(bucket, [3, 3], Clock(70_000, 3)).tobytes()
    assert abandoned[20:24] == bytes([3, 1, 4, 1])
    assert abandoned[12:20] == struct.pack("<2I", 0, 6)


def test_status_numbers_are_pinned():
    assert (SENT, NOT_FINITE, ABSENT) == (1, 2, 3)
    assert HEADER.itemsize == 40
    assert (RECORD.itemsize, COUNTS.itemsize) == (8, 96)


def test_plain_indices_count_from_each_layers_own_zero():
    bucket, k = bucket_of([100, 200], code="plain"), [2, 2]
    indices = [np.array([1, 99], np.uint32), np.array([0, 199], np.uint32)]
    sketch = Sketch(0, np.zeros(WINDOW))
    found = [Found(i, np.ones(2, np.float32), sketch) for i in indices]
    payload = pack(bucket, k, found).payload
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
    records = 40 + 160 * 104
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
    assert payload_bytes(Bucket((huge,)), 1000) == 40 + 104 + 4000 + 2752 + 256


@pytest.mark.parametrize("code", CODES)
def test_what_cannot_be_packed_is_refused(code):
    bucket, k = bucket_of([100, 200], code=code), [2, 3]
    ((first, second),) = found_by_ranks(bucket, k, 1)
    with pytest.raises(DLSError, match="1 layers found, expected 2"):
        pack(bucket, k, [first])
    with pytest.raises(DLSError, match="'layer1': 2 entries found, expected 3"):
        pack(bucket, k, [first, first])
    with pytest.raises(DLSError, match=r"k of shape \(2,\), \[3, -1\]"):
        pack(bucket, [3, -1], [first, second])
    with pytest.raises(DLSError, match=r"k of shape \(1,\)"):
        pack(bucket, [2], [first, second])
    with pytest.raises(DLSError, match=r"k of shape \(1,\), \[5\]"):
        unpack(bucket, [5], np.zeros(payload_bytes(bucket, 5), np.uint8), 1)
    for indices in ([5, 5, 6], [5, 4, 6], [5, 6, 200]):
        wrong = second._replace(indices=np.array(indices, np.uint32))
        with pytest.raises(DLSError, match="'layer1': indices do not ascend within its 200 ent"):
            pack(bucket, k, [first, wrong])
