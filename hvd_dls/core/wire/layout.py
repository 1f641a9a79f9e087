"""Where things stand in the payload of a bucket, little-endian; parts begin at multiples of 8.

    header   HEADER, 40 bytes
    records  RECORD, 8 bytes for each layer
    sketches 96 bytes of counts for each layer that has one: see ``encode_counts``
    watched  one byte for each watched layer: its status
    values   room for C
    indices  Elias–Fano: lower part, upper part (elias_fano.py), counted through the whole bucket;
             or plain: room for C uint32, counted in each layer

C is the payload's capacity: the entries of all its layers, also those that take no part in a step.
The length follows from bucket and capacity alone.  Where ranks agree on the entries of each layer,
their payloads are equally long, and so are those of different steps while the sum stays.  Whatever
is not used is zero; but see ``refused`` for what owners hand out of a step that does not count.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from hvd_dls.core.balancing.layers import LayerSpec
from hvd_dls.core.balancing.sketch import WINDOW
from hvd_dls.core.wire import elias_fano
from hvd_dls.core.wire.values import WIRE_DTYPES
from hvd_dls.errors import DLSError

VERSION = 6
MAX_ENTRIES = (1 << 32) - 1  # of one bucket

VALUE_CODES = {"float32": 1, "float64": 2, "float16": 3, "bfloat16": 4}
INDEX_CODES = {"elias-fano": 1, "plain": 2}

HEADER = np.dtype(
    [
        ("magic", "S3"),  # b"DLS"
        ("version", "u1"),
        ("bucket", "<u4"),  # CRC-32 of its layers' names and sizes
        ("size", "<u4"),  # entries of the bucket
        ("entries", "<u4"),  # entries in this payload
        ("capacity", "<u4"),  # entries there is room for
        ("values", "u1"),  # one of VALUE_CODES
        ("indices", "u1"),  # one of INDEX_CODES
        ("low_bits", "u1"),  # of Elias–Fano; 0 if plain
        ("abandoned", "u1"),  # one of Abandoned; unless NO, the payload holds nothing
        ("layers", "<u4"),
        ("watched", "<u4"),  # layers that go dense
        ("step", "<u4"),  # number of the step, modulo 2**32
        ("attempt", "<u4"),  # how often the rank has abandoned this step before
    ]
)
RECORD = np.dtype(
    [
        ("entries", "<u4"),  # in this payload
        ("sketch_base", "<u2"),  # first bin of the sketch
        ("exponent", "i1"),  # of the values' scale; 0 but for float16
        ("status", "u1"),  # SENT, NOT_FINITE or ABSENT
    ]
)
COUNTS = np.dtype(("<u2", WINDOW))  # of a sketch


class Status(IntEnum):
    """What a rank says of a layer; of a watched one, SENT means that it was finite."""

    SENT = 1
    NOT_FINITE = 2
    ABSENT = 3


class Abandoned(IntEnum):
    """Whether, and why, a rank takes no part in a step."""

    NO = 0
    GIVEN_UP = 1  # by this rank, or by one that it sends for
    OUT_OF_STEP = 2  # the ranks that it sends for are not all in the same one


SENT: Literal[Status.SENT] = Status.SENT
NOT_FINITE: Literal[Status.NOT_FINITE] = Status.NOT_FINITE
ABSENT: Literal[Status.ABSENT] = Status.ABSENT


@dataclass(frozen=True)
class Bucket:
    """Layers that travel together.

    Attributes:
        layers: at least one, all of one work dtype, together fewer than 2**32 entries.
        values: how they travel: "float64" for float64 layers; else "float32", "float16" or
            "bfloat16".
        code: of the indices: "elias-fano", or "plain" for networks so fast that coding costs more
            than it saves.
        watched: names of layers that go dense; the payload tells whether their gradients were
            there and finite.
        sketches: numbers of the layers that have sketches, ascending; None: all.

    Raises:
        DLSError: something else.
    """

    layers: tuple[LayerSpec, ...]
    values: str = "float32"
    code: str = "elias-fano"
    watched: tuple[str, ...] = ()
    sketches: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        dtypes = {layer.work_dtype.name for layer in self.layers}
        if len(dtypes) != 1:
            raise DLSError(f"a bucket needs layers of one work dtype, found {sorted(dtypes)}")
        accepted = ["float64"] if "float64" in dtypes else ["float32", "float16", "bfloat16"]
        if self.values not in accepted:
            raise DLSError(
                f"bucket {self.name!r} of {dtypes.pop()} layers: values={self.values!r}, "
                f"accepted are {accepted}"
            )
        if self.code not in INDEX_CODES:
            raise DLSError(
                f"bucket {self.name!r}: code={self.code!r}, accepted are {list(INDEX_CODES)}"
            )
        if self.size > MAX_ENTRIES:
            raise DLSError(
                f"bucket {self.name!r} has {self.size} entries; at most {MAX_ENTRIES} are supported"
            )

    @property
    def name(self) -> str:
        """Its layer, or its first and its last one."""
        first, last = self.layers[0].name, self.layers[-1].name
        return first if len(self.layers) == 1 else f"{first}..{last}"

    @cached_property
    def id(self) -> int:
        """CRC-32 of its layers' stable names and sizes."""
        return zlib.crc32("".join(f"{x.stable_name}\0{x.size}\0" for x in self.layers).encode())

    @cached_property
    def offsets(self) -> np.ndarray:
        """(L + 1,) int64: where each layer begins in the bucket; the last one is its size."""
        return np.cumsum([0, *(layer.size for layer in self.layers)], dtype=np.int64)

    @cached_property
    def size(self) -> int:
        """Number of entries."""
        return sum(layer.size for layer in self.layers)

    @cached_property
    def sketched(self) -> np.ndarray:
        """(T,) int64: numbers of the layers that have sketches, ascending."""
        numbers = range(len(self.layers)) if self.sketches is None else self.sketches
        return np.array(numbers, np.int64)


class Parts(NamedTuple):
    """Views of one payload or, with a leading dimension, of all ranks'."""

    header: np.ndarray  # (1,)
    records: np.ndarray  # (L,)
    counts: np.ndarray  # (T, WINDOW)
    watched: np.ndarray  # (W,), a few more where a word is not full
    values: np.ndarray  # (C,), a few more where a word is not full
    lower: np.ndarray  # uint64; all of the indices, uint32, if plain
    upper: np.ndarray  # uint64; empty if plain


def payload_bytes(bucket: Bucket, capacity: int) -> int:
    """Length of a payload in bytes, a multiple of 8."""
    return _ends(bucket, capacity)[-1]


def _ends(bucket: Bucket, capacity: int) -> list[int]:
    """Where each part of a payload ends, in bytes."""
    values = -(-capacity * WIRE_DTYPES[bucket.values].itemsize // 8) * 8
    lower, upper = elias_fano.lengths(bucket.size, capacity)
    if bucket.code == "plain":
        lower, upper = -(-capacity * 4 // 8) * 8, 0
    ends = [HEADER.itemsize]
    watched = -(-len(bucket.watched) // 8) * 8
    records = RECORD.itemsize * len(bucket.layers)
    counts = COUNTS.itemsize * len(bucket.sketched)
    for length in (records, counts, watched, values, lower, upper):
        ends.append(ends[-1] + length)
    return ends


def parts_of(bucket: Bucket, capacity: int, payload: np.ndarray) -> Parts:
    """The parts of a payload: (..., payload_bytes) uint8, aligned to 8 bytes."""
    ends = _ends(bucket, capacity)
    words = np.dtype("<u8")
    return Parts(
        payload[..., : ends[0]].view(HEADER),
        payload[..., ends[0] : ends[1]].view(RECORD),
        payload[..., ends[1] : ends[2]].view("<u2").reshape(*payload.shape[:-1], -1, WINDOW),
        payload[..., ends[2] : ends[3]],
        payload[..., ends[3] : ends[4]].view(WIRE_DTYPES[bucket.values]),
        payload[..., ends[4] : ends[5]].view("<u4" if bucket.code == "plain" else words),
        payload[..., ends[5] : ends[6]].view(words),
    )


def room_of(bucket: Bucket, capacity: int, payload: np.ndarray) -> np.ndarray:
    """What is behind records, sketches and watched layers: the room of values and indices."""
    return payload[_ends(bucket, capacity)[3] :]


class Clock(NamedTuple):
    """When a payload was made: the step, and how often it had been abandoned before."""

    step: int
    attempt: int


START = Clock(0, 0)


def header_of(bucket: Bucket, capacity: int, entries: int = 0, clock: Clock = START) -> np.ndarray:
    """The header of a payload with so many entries: () HEADER."""
    header = np.zeros((), HEADER)
    header["magic"] = b"DLS"
    header["version"] = VERSION
    header["bucket"] = bucket.id
    header["size"] = bucket.size
    header["entries"] = entries
    header["capacity"] = capacity
    header["values"] = VALUE_CODES[bucket.values]
    header["indices"] = INDEX_CODES[bucket.code]
    header["low_bits"] = _low_bits(bucket, capacity)
    header["layers"] = len(bucket.layers)
    header["watched"] = len(bucket.watched)
    header["step"] = clock.step & 0xFFFFFFFF
    header["attempt"] = clock.attempt
    return header


def _low_bits(bucket: Bucket, capacity: int) -> int:
    return 0 if bucket.code == "plain" else elias_fano.low_bits(bucket.size, capacity)
