# mypy: allow-untyped-defs
"""Booking a step of many layers on a GPU: two launches for all of a bucket's layers.

What all ranks sent of a bucket is copied to the device as it came, rank by rank; where in it each
layer's entries are, a table says.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from hvd_dls.core.received import Received
from hvd_dls.torch.kernels.finding_all import KINDS, aligned
from hvd_dls.torch.kernels.launching import on
from hvd_dls.torch.kernels.settling import BLOCK, LANES, TILE, bisect, block


class Field(IntEnum):
    """What the kernels are told of a layer."""

    RESIDUAL = 0  # addresses
    GRADIENT = 1
    TOTAL = 2
    OUT = 3
    N = 4
    SCALE = 5  # bits of a float32
    FIRST = 6  # of its slots


_FIELDS = tl.constexpr(len(Field))
_RESIDUAL, _GRADIENT = tl.constexpr(int(Field.RESIDUAL)), tl.constexpr(int(Field.GRADIENT))
_TOTAL, _OUT = tl.constexpr(int(Field.TOTAL)), tl.constexpr(int(Field.OUT))
_N, _SCALE, _FIRST = (
    tl.constexpr(int(Field.N)),
    tl.constexpr(int(Field.SCALE)),
    tl.constexpr(int(Field.FIRST)),
)


@triton.jit(do_not_specialize=["slots", "lists", "steps"])
def begins_all(
    indices,  # uint32 as int32, ascending within each list and layer
    bounds,  # (layers, lists, 2) int32: where a layer's entries begin and end in each list
    table,  # (layers, FIELDS) int64: see ``Field``
    layer_of,  # (slots,) int32: each layer has a slot for each of its blocks, and one more
    starts,  # (lists, slots) int32
    slots,
    lists,
    steps,  # of the bisection
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Finds where the entries of each slot's block begin in each list."""
    own = tl.program_id(0)
    slot = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = slot < slots
    layer = tl.load(layer_of + slot, mask=inside, other=0)
    first = tl.load(table + layer * _FIELDS + _FIRST, mask=inside, other=0).to(tl.int32)
    pair = bounds + (layer * lists + own) * 2
    low = tl.load(pair, mask=inside, other=0)
    high = tl.load(pair + 1, mask=inside, other=0)
    low = bisect(indices, low, high, (slot - first) * BLOCK, steps)
    tl.store(starts + own * slots + slot, low, mask=inside)


@triton.jit(do_not_specialize=["slots", "lists"])
def settle_all(
    table,  # as for ``begins_all``, as all of these
    layer_of,
    indices,
    values,  # float32, as the indices: first what stays in the residuals, then of each rank
    starts,
    slots,
    lists,
    GRADIENT: tl.constexpr,  # types of all gradients and sums
    OUT: tl.constexpr,
    ALIGNED: tl.constexpr,  # whether all arrays begin at 16 bytes, and have 16 * m entries
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """As ``settling.settle``, of several layers: this is one block."""
    slot = tl.program_id(0)
    row = table + tl.load(layer_of + slot).to(tl.int64) * _FIELDS
    residual = tl.load(row + _RESIDUAL).to(tl.pointer_type(tl.float32))
    gradient = tl.load(row + _GRADIENT).to(tl.pointer_type(GRADIENT))
    total = tl.load(row + _TOTAL).to(tl.pointer_type(tl.float32))
    out = tl.load(row + _OUT).to(tl.pointer_type(OUT))
    n = tl.load(row + _N).to(tl.int32)
    if ALIGNED:
        residual, gradient = tl.multiple_of(residual, 16), tl.multiple_of(gradient, 16)
        total, out = tl.multiple_of(total, 16), tl.multiple_of(out, 16)
        n = tl.multiple_of(n, 16)
    scale = tl.load(row + _SCALE).to(tl.int32).to(tl.float32, bitcast=True)
    own = slot - tl.load(row + _FIRST).to(tl.int32)
    if own * BLOCK < n:  # not a layer's last slot, which only says where its last block ends
        block(
            residual, gradient, total, out, n, own, indices, values, starts, slot, slots, lists,
            scale, True, BLOCK, LANES,
        )  # fmt: skip


class _Booking(NamedTuple):
    """What ``put_off`` is given."""

    residual: Tensor
    gradient: Tensor
    indices: np.ndarray
    kept: np.ndarray | None
    received: Received
    scale: float
    out: Tensor


class Bookings:
    """Layers of a device that are to be settled before the step ends."""

    def __init__(self) -> None:
        self._waiting: dict[Any, list[_Booking]] = defaultdict(list)

    def put_off(
        self,
        residual: Tensor,
        gradient: Tensor,
        indices: np.ndarray,
        kept: np.ndarray | None,
        received: Received,
        scale: float,
        out: Tensor,
    ) -> None:
        """As ``core.passes.settle``, later; nothing of it may change before."""
        booking = _Booking(residual, gradient, indices, kept, received, scale, out)
        bucket = id(received.ranks)  # the same of all its layers
        self._waiting[bucket, gradient.dtype, out.dtype].append(booking)

    def launch(self) -> None:
        """Settles all that was put off."""
        waiting, self._waiting = self._waiting, defaultdict(list)
        for bookings in waiting.values():
            device = bookings[0].out.device
            with on(device):
                _launch(bookings, device)


def _launch(bookings: Sequence[_Booking], device: torch.device) -> None:
    """Launches the kernels for layers of one bucket whose arrays have the same types."""
    sizes = np.array([len(booking.out) for booking in bookings])
    own = np.array([len(booking.indices) for booking in bookings])
    begin, end, bounds = _bounds(bookings, own)
    slots_of = -(-sizes // BLOCK) + 1
    slots = int(slots_of.sum())
    table = np.empty((len(bookings), len(Field)), np.int64)
    totals = _totals(bookings, sizes, device)
    for field, tensors in (
        (Field.RESIDUAL, [booking.residual for booking in bookings]),
        (Field.GRADIENT, [booking.gradient for booking in bookings]),
        (Field.TOTAL, totals),
        (Field.OUT, [booking.out for booking in bookings]),
    ):
        table[:, field] = [tensor.data_ptr() for tensor in tensors]
    table[:, Field.N] = sizes
    scales = np.array([booking.scale for booking in bookings], np.float32)
    table[:, Field.SCALE] = scales.view(np.int32)
    table[:, Field.FIRST] = np.cumsum(slots_of) - slots_of
    layer_of = np.repeat(np.arange(len(bookings), dtype=np.int32), slots_of)

    nothing = [np.zeros(len(booking.indices), np.float32) for booking in bookings]
    kept = [
        zeros if booking.kept is None else booking.kept
        for booking, zeros in zip(bookings, nothing, strict=True)
    ]
    ranks = bookings[0].received.ranks
    parts = [slice(*pair) for pair in zip(begin.tolist(), end.tolist(), strict=True)]
    indices = [booking.indices for booking in bookings]
    indices += [of_rank[part] for (of_rank, _), part in zip(ranks, parts, strict=True)]
    values = kept + [of_rank[part] for (_, of_rank), part in zip(ranks, parts, strict=True)]
    there = _on_device(
        [
            [table.reshape(-1).view(np.int32)],
            [layer_of],
            [bounds.reshape(-1)],
            [array.view(np.int32) for array in indices],
            [array.view(np.int32) for array in values],
        ],
        device,
    )
    lists, longest = len(ranks) + 1, int((bounds[:, :, 1] - bounds[:, :, 0]).max())
    starts = torch.empty((lists, slots), dtype=torch.int32, device=device)
    begins_all[(lists, triton.cdiv(slots, TILE))](
        there[3], there[2], there[0].view(torch.int64), there[1], starts, slots, lists,
        longest.bit_length(), BLOCK, TILE,
    )  # fmt: skip
    settle_all[(slots,)](
        there[0].view(torch.int64), there[1], there[3], there[4].view(torch.float32), starts,
        slots, lists, KINDS[bookings[0].gradient.dtype], KINDS[bookings[0].out.dtype],
        aligned(table[:, : Field.N + 1]), BLOCK, LANES,
    )  # fmt: skip


def _bounds(
    bookings: Sequence[_Booking], own: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which part of each rank's entries is of these layers, and where in all lists each layer is.

    Returns:
        (P,) where the parts begin; (P,) where they end; (layers, P + 1, 2) int32: see
        ``begins_all``, the first list being this rank's own.
    """
    of_ranks = np.stack([booking.received.bounds for booking in bookings])
    begin, end = of_ranks[:, :, 0].min(axis=0), of_ranks[:, :, 1].max(axis=0)
    lengths = np.concatenate([[own.sum()], end - begin])
    place = np.cumsum(lengths) - lengths  # of each list
    bounds = np.empty((len(bookings), len(lengths), 2), np.int32)
    bounds[:, 0, 1] = np.cumsum(own)
    bounds[:, 0, 0] = bounds[:, 0, 1] - own
    bounds[:, 1:] = of_ranks + (place[1:] - begin)[:, None]
    return begin, end, bounds


def _totals(
    bookings: Sequence[_Booking], sizes: np.ndarray, device: torch.device
) -> Sequence[Tensor]:
    """Where sums are made: of 16 bits not where they are to be in the end."""
    outs = [booking.out for booking in bookings]
    if outs[0].dtype == torch.float32:
        return outs
    padded = sizes + -sizes % 16
    scratch = torch.empty(int(padded.sum()), device=device)
    return torch.split(scratch, padded.tolist())


def _on_device(parts: Sequence[Sequence[np.ndarray]], device: torch.device) -> list[Tensor]:
    """Arrays of int32, each part joined and beginning at 16 bytes; one copy, without waiting."""
    sizes = [sum(map(len, arrays)) for arrays in parts]
    padded = [size + -size % 4 for size in sizes]
    staged = torch.empty(sum(padded), dtype=torch.int32, pin_memory=device.type == "cuda")
    host, begin = staged.numpy(), 0
    for arrays, size, room in zip(parts, sizes, padded, strict=True):
        np.concatenate(arrays, out=host[begin : begin + size])
        begin += room
    return list(torch.split(staged.to(device, non_blocking=True), padded))
