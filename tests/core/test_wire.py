"""The payload on its way: layout, round trip, and what becomes of damaged ones."""

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_dls.core.layers import layer_spec
from hvd_dls.core.select import Selection
from hvd_dls.core.sketch import WINDOW, Sketch, edges
from hvd_dls.core.wire import HEADER, MAX_ENTRIES, VERSION, pack, payload_bytes, unpack
from hvd_dls.errors import DLSError, PayloadError
from tests.core.strategies import seeds

HEADER_BYTES, SKETCH_BYTES = 32, 4 * 48


def make(size, k, itemsize=4, seed=0, name="layer"):
    """A layer of so many entries, and k of them with a sketch."""
    rng = np.random.default_rng(seed)
    layer = layer_spec(name, (size, 1), itemsize=itemsize)
    indices = np.sort(rng.choice(size, k, replace=False))
    values = rng.standard_normal(k).astype(layer.work_dtype)
    sketch = Sketch(1000, rng.integers(0, 1 << 32, WINDOW, dtype=np.uint32))
    return layer, Selection(indices, values, float(np.abs(values).min())), sketch


SIZES = [(1, 1), (5, 2), (1024, 1024), (65_535, 3), (65_536, 3), (65_537, 3), (70_000, 70_000)]


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize(("size", "k"), SIZES)
def test_payloads_come_back_as_they_were_packed(size, k, itemsize):
    made = [make(size, k, itemsize, seed) for seed in range(3)]
    layer = made[0][0]
    gathered = np.concatenate([pack(layer, k, taken, sketch) for _, taken, sketch in made])
    for (_, taken, sketch), payload in zip(made, unpack(layer, k, gathered, 3), strict=True):
        assert not payload.not_finite
        assert payload.threshold == taken.threshold
        assert payload.sketch.base == sketch.base
        assert np.array_equal(payload.sketch.counts, sketch.counts)
        assert np.array_equal(payload.indices, taken.indices)
        assert payload.values.dtype == layer.work_dtype
        assert np.array_equal(payload.values, taken.values)
        assert np.shares_memory(payload.values, gathered)


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize(("size", "k"), SIZES)
def test_length_is_header_sketch_values_and_indices_in_whole_words(size, k, itemsize):
    layer, taken, sketch = make(size, k, itemsize)
    value, index = 8 if itemsize == 8 else 4, 2 if size <= 65_536 else 4
    length = HEADER_BYTES + SKETCH_BYTES + k * (value + index)
    assert payload_bytes(layer, k) == (length + 7) // 8 * 8
    assert len(pack(layer, k, taken, sketch)) == payload_bytes(layer, k)
    assert len(pack(layer, k, None, None)) == payload_bytes(layer, k)


def test_layout_is_pinned_byte_by_byte():
    """A change here needs a new VERSION: other ranks may run another release."""
    layer = layer_spec("conv1.weight", (300, 1))
    taken = Selection(np.array([7, 258, 299]), np.array([1.5, -2.0, 0.75], np.float32), 0.75)
    payload = pack(layer, 3, taken, Sketch(1003, np.arange(48, dtype=np.uint32))).tobytes()
    assert VERSION == 1
    assert HEADER.itemsize == HEADER_BYTES
    assert payload[0:3] == b"DLS"
    assert payload[3] == 1
    assert payload[4:8] == struct.pack("<I", zlib.crc32(b"conv1.weight"))
    assert payload[8:12] == struct.pack("<I", 300)
    assert payload[12:16] == struct.pack("<I", 3)
    assert payload[16:24] == struct.pack("<d", 0.75)
    assert payload[24:26] == struct.pack("<H", 1003)
    assert payload[26] == 4  # bytes per value
    assert payload[27] == 2  # bytes per index
    assert payload[28] == 0  # not finite
    assert payload[29:32] == bytes(3)
    assert payload[32:224] == struct.pack("<48I", *range(48))
    assert payload[224:236] == struct.pack("<3f", 1.5, -2.0, 0.75)
    assert payload[236:242] == struct.pack("<3H", 7, 258, 299)
    assert payload[242:] == bytes(6)


def test_a_gradient_that_is_not_finite_sends_only_that():
    layer, taken, sketch = make(100, 4)
    gathered = np.concatenate([pack(layer, 4, taken, sketch), pack(layer, 4, None, None)])
    first, second = unpack(layer, 4, gathered, 2)
    assert (first.not_finite, second.not_finite) == (False, True)
    assert not second.values.any()
    assert not second.sketch.counts.any()


# Damage -----------------------------------------------------------------------------------------


def damaged(field=None, offset=None, value=None):
    """Payloads of three ranks, that of rank 1 with a header field or a byte changed."""
    layer, taken, sketch = make(70_000, 5)
    payloads = np.stack([pack(layer, 5, taken, sketch)] * 3)
    if field:
        payloads[1, :HEADER_BYTES].view(HEADER)[field] = value
    else:
        payloads[1].view(np.uint32)[offset // 4] = value
    return layer, payloads.ravel()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("magic", b"XYZ", "magic is b'XYZ', expected b'DLS'"),
        ("version", 9, "version is 9, expected 1"),
        ("layer", 1, "layer is 1, expected"),
        ("size", 69_999, "size is 69999, expected 70000"),
        ("k", 6, "k is 6, expected 5"),
        ("value_bytes", 8, "value_bytes is 8, expected 4"),
        ("index_bytes", 2, "index_bytes is 2, expected 4"),
        ("sketch_base", 255 * 8 - WINDOW + 1, "sketch_base is 1993, expected at most 1992"),
    ],
)
def test_a_wrong_header_is_refused_by_layer_rank_and_field(field, value, message):
    layer, gathered = damaged(field, value=value)
    with pytest.raises(PayloadError, match=f"layer 'layer', payload of rank 1: {message}"):
        unpack(layer, 5, gathered, 3)


def test_an_index_beyond_the_layer_is_refused():
    layer, gathered = damaged(offset=HEADER_BYTES + SKETCH_BYTES + 5 * 4, value=70_000)
    with pytest.raises(PayloadError, match=r"'layer', payload of rank 1: index 70000 .* 70000"):
        unpack(layer, 5, gathered, 3)


@pytest.mark.parametrize("change", ["size", "dtype", "name", "k"])
def test_a_payload_of_another_layer_is_refused(change):
    layer, taken, sketch = make(70_000, 5)
    payload = pack(layer, 5, taken, sketch)
    size, itemsize, name, k = 70_000, 4, "layer", 5
    size += change == "size"
    itemsize += 4 * (change == "dtype")
    name += "2" * (change == "name")
    k += change == "k"
    with pytest.raises(PayloadError, match=f"layer '{name}'"):
        unpack(layer_spec(name, (size, 1), itemsize=itemsize), k, payload, 1)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_another_number_of_payloads_than_ranks_is_refused(world_size):
    layer, gathered = damaged("reserved", value=0)
    with pytest.raises(PayloadError, match=rf"{len(gathered)} items .* {world_size} payloads"):
        unpack(layer, 5, gathered, world_size)


def test_a_buffer_of_another_type_is_refused():
    layer, gathered = damaged("reserved", value=0)
    with pytest.raises(PayloadError, match="float32"):
        unpack(layer, 5, gathered.astype(np.float32), 3)


def refused_or_well_formed(layer, k, gathered):
    try:
        payloads = unpack(layer, k, gathered, 2)
    except PayloadError:
        return "refused"
    assert len(payloads) == 2
    for payload in payloads:
        assert payload.values.shape == payload.indices.shape == (k,)
        assert payload.indices.max() < layer.size
        assert payload.sketch.counts.shape == (WINDOW,)
        assert np.isfinite(edges(payload.sketch.base, payload.sketch.base + WINDOW)).all()
    return "well formed"


def test_every_flipped_bit_is_refused_or_changes_only_contents():
    layer, taken, sketch = make(300, 7)
    gathered = np.tile(pack(layer, 7, taken, sketch), 2)
    refused = set()
    for byte in range(len(gathered) // 2):
        for bit in range(8):
            gathered[byte] ^= np.uint8(1 << bit)
            if refused_or_well_formed(layer, 7, gathered) == "refused":
                refused.add(byte)
            gathered[byte] ^= np.uint8(1 << bit)
    indices = HEADER_BYTES + SKETCH_BYTES + 7 * 4
    identity = {*range(16), 26, 27}  # magic, version, layer, size, k, bytes per value and index
    assert identity <= refused <= identity | {24, 25} | set(range(indices, indices + 7 * 2))


@given(
    st.sampled_from([(1, 1, 4), (300, 7, 2), (65_536, 5, 4), (65_537, 5, 4), (200, 9, 8)]),
    st.lists(st.tuples(st.integers(0, 500), st.integers(0, 255)), max_size=20),
    st.one_of(st.none(), st.integers(0, 600)),
    seeds,
)
def test_whatever_is_damaged_is_refused_or_well_formed(shape, changes, length, seed):
    size, k, itemsize = shape
    layer, taken, sketch = make(size, k, itemsize, seed)
    gathered = np.tile(pack(layer, k, taken, sketch), 2)
    for byte, value in changes:
        gathered[byte % len(gathered)] = value
    refused_or_well_formed(layer, k, gathered[:length])


def test_layers_beyond_32_bit_counts_are_refused_by_name():
    with pytest.raises(DLSError, match=f"'huge' has {MAX_ENTRIES + 1} entries; at most"):
        payload_bytes(layer_spec("huge", (MAX_ENTRIES + 1, 1)), 1)
