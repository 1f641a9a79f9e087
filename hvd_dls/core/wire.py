"""The payload a rank sends for one layer: header, sketch, values, indices; little-endian.

    offset  0  header (HEADER, 32 bytes)
           32  sketch: WINDOW counts, uint32
            .  k values, float32 or float64
            .  k indices, ascending, uint16 for layers of up to 65,536 entries, else uint32
            .  zeros up to a multiple of 8 bytes

The length follows from the layer's size, its type and k, all of which every rank knows: payloads of
different ranks have the same length and are simply concatenated by allgather.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np

from hvd_dls.core.layers import LayerSpec
from hvd_dls.core.select import Selection
from hvd_dls.core.sketch import LAST_BASE, WINDOW, Sketch
from hvd_dls.errors import DLSError, PayloadError

VERSION = 1
MAX_ENTRIES = 1 << 31  # of one layer; indices would fit 32 bits, other ranks' frameworks stop here

HEADER = np.dtype(
    [
        ("magic", "S3"),  # b"DLS"
        ("version", "u1"),
        ("layer", "<u4"),  # CRC-32 of the layer's name
        ("size", "<u4"),  # entries of the layer
        ("k", "<u4"),  # entries in this payload
        ("threshold", "<f8"),  # smallest magnitude sent
        ("sketch_base", "<u2"),  # first bin of the sketch
        ("value_bytes", "u1"),  # 4 or 8
        ("index_bytes", "u1"),  # 2 or 4
        ("not_finite", "u1"),  # 1: the gradient held NaN or Inf; nothing here counts
        ("reserved", "u1", 3),
    ]
)
_SKETCH_BYTES = 4 * WINDOW
_NO_SKETCH = Sketch(0, np.zeros(WINDOW, np.uint32))


class Payload(NamedTuple):
    """One rank's part of a gathered buffer; the arrays are views into it."""

    not_finite: bool
    threshold: float
    sketch: Sketch
    indices: np.ndarray  # (k,) uint16 or uint32
    values: np.ndarray  # (k,) of the layer's work dtype


def payload_bytes(layer: LayerSpec, k: int) -> int:
    """Length of a payload in bytes."""
    length = HEADER.itemsize + _SKETCH_BYTES + k * layer.work_dtype.itemsize
    return -(-(length + k * _index_dtype(layer).itemsize) // 8) * 8


def pack(
    layer: LayerSpec, k: int, selection: Selection | None, sketch: Sketch | None
) -> np.ndarray:
    """Writes one payload.

    Args:
        layer: whose entries these are.
        k: entries of the payload.
        selection: k entries with ascending indices; None if the gradient was not finite, for a
            payload of the same length that says so.
        sketch: of the layer's magnitudes; None only together with the selection.

    Returns:
        (payload_bytes(layer, k),) uint8.
    """
    payload = np.zeros(payload_bytes(layer, k), np.uint8)
    base, counts = sketch or _NO_SKETCH
    header = payload[: HEADER.itemsize].view(HEADER)[0]
    header["magic"] = b"DLS"
    header["version"] = VERSION
    header["layer"] = _layer_id(layer)
    header["size"] = layer.size
    header["k"] = k
    header["sketch_base"] = base
    header["value_bytes"] = layer.work_dtype.itemsize
    header["index_bytes"] = _index_dtype(layer).itemsize
    header["not_finite"] = selection is None
    if selection is not None:
        header["threshold"] = selection.threshold
        counts_out, values_out, indices_out = _parts(layer, k, payload)
        counts_out[:] = counts
        values_out[:] = selection.values
        indices_out[:] = selection.indices
    return payload


def unpack(layer: LayerSpec, k: int, gathered: np.ndarray, world_size: int) -> list[Payload]:
    """Reads all ranks' payloads of one layer, without copying.

    Args:
        layer: whose payloads these should be.
        k: entries every payload should have.
        gathered: (world_size * payload_bytes(layer, k),) uint8, payloads in rank order.
        world_size: number of ranks.

    Returns:
        One payload a rank.

    Raises:
        PayloadError: the buffer is not that; the message names layer, rank, what was found and
            what was expected.
    """
    length = payload_bytes(layer, k)
    if gathered.dtype != np.uint8 or gathered.shape != (world_size * length,):
        raise PayloadError(
            f"layer {layer.name!r}: gathered {gathered.size} items of {gathered.dtype}, expected "
            f"{world_size} payloads of {length} bytes"
        )
    return [
        _unpack_one(layer, k, gathered[rank * length : (rank + 1) * length], rank)
        for rank in range(world_size)
    ]


def _unpack_one(layer: LayerSpec, k: int, payload: np.ndarray, rank: int) -> Payload:
    header = payload[: HEADER.itemsize].view(HEADER)[0]
    expected = {
        "magic": b"DLS",
        "version": VERSION,
        "layer": _layer_id(layer),
        "size": layer.size,
        "k": k,
        "value_bytes": layer.work_dtype.itemsize,
        "index_bytes": _index_dtype(layer).itemsize,
    }
    for field, wanted in expected.items():
        if header[field] != wanted:
            raise PayloadError(
                f"layer {layer.name!r}, payload of rank {rank}: {field} is {header[field]}, "
                f"expected {wanted}; do all ranks run the same version and configuration?"
            )
    if header["sketch_base"] > LAST_BASE:
        raise PayloadError(
            f"layer {layer.name!r}, payload of rank {rank}: sketch_base is "
            f"{header['sketch_base']}, expected at most {LAST_BASE}"
        )
    counts, values, indices = _parts(layer, k, payload)
    if k and int(indices.max()) >= layer.size:
        raise PayloadError(
            f"layer {layer.name!r}, payload of rank {rank}: index {indices.max()} in a layer of "
            f"{layer.size} entries"
        )
    return Payload(
        bool(header["not_finite"]),
        float(header["threshold"]),
        Sketch(int(header["sketch_base"]), counts),
        indices,
        values,
    )


def _parts(
    layer: LayerSpec, k: int, payload: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Views of a payload's counts, values and indices."""
    counts_end = HEADER.itemsize + _SKETCH_BYTES
    values_end = counts_end + k * layer.work_dtype.itemsize
    indices_end = values_end + k * _index_dtype(layer).itemsize
    return (
        payload[HEADER.itemsize : counts_end].view("<u4"),
        payload[counts_end:values_end].view(layer.work_dtype.newbyteorder("<")),
        payload[values_end:indices_end].view(_index_dtype(layer)),
    )


def _index_dtype(layer: LayerSpec) -> np.dtype:
    if layer.size > MAX_ENTRIES:
        raise DLSError(
            f"layer {layer.name!r} has {layer.size} entries; at most {MAX_ENTRIES} are supported"
        )
    return np.dtype("<u2" if layer.size <= 1 << 16 else "<u4")


def _layer_id(layer: LayerSpec) -> int:
    return zlib.crc32(layer.name.encode())
