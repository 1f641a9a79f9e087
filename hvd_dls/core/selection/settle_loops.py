# mypy: allow-untyped-defs, no-check-untyped-defs
"""Booking a step, as compiled loops: the residual takes the gradient in, and ranks add up."""

from __future__ import annotations

import numpy as np

from hvd_dls.core.jit import jit
from hvd_dls.core.selection.bits import element, rounded, widened

BLOCK = 8192  # entries settled at once
END = 1 << 32  # beyond all indices


@jit
def note(lists, rank, entries, values, start, stop):
    """Where a rank's entries lie, as addresses: the same type for any number of ranks."""
    lists[rank, 0] = entries.ctypes.data
    lists[rank, 1] = values.ctypes.data
    lists[rank, 2] = _first(entries, stop)
    lists[rank, 3] = lists[rank, 4] = _first(entries, start)  # of the current block: from, to


@jit
def _first(entries, least):
    """Position of the first entry from ``least`` on: by halving, if they ascend."""
    low, high = 0, len(entries)
    while low < high:
        middle = (low + high) // 2
        if entries[middle] < least:
            low = middle + 1
        else:
            high = middle
    return low


@jit
def settle(residual, gradient, begin, stop, indices, kept, lists, scale, out, total):
    """From begin to stop; returns whether all of that was in order.

    Block by block, so that what several steps touch is in the cache.  ``begin`` is a multiple of
    BLOCK, and ``stop``, too, or END.  ``total`` holds zeros before and after.
    """
    sent, end_of_sent = _first(indices, begin), _first(indices, stop)
    zero = residual.dtype.type(0)
    plain = zero * scale == 0 and not np.signbit(scale)  # zero times the scale is +0
    for start in range(begin, min(stop, len(residual)), BLOCK):
        own, new = residual[start : start + BLOCK], gradient[start : start + BLOCK]
        for i in range(len(own)):
            own[i] += widened(new[i])
        while sent < end_of_sent and np.uint64(indices[sent] - start) < np.uint64(len(own)):
            own[indices[sent] - start] = kept[sent] if len(kept) else zero
            sent += 1
        _sum_block(start, lists, scale, plain, out, total)
    return _in_order(lists) and sent == end_of_sent


@jit
def sum_up(begin, stop, lists, scale, out, total):
    """The sums alone, of a layer whose residual is another rank's: as ``settle``."""
    zero = total.dtype.type(0)
    plain = zero * scale == 0 and not np.signbit(scale)
    for start in range(begin, min(stop, len(out)), BLOCK):
        _sum_block(start, lists, scale, plain, out, total)
    return _in_order(lists)


@jit
def _sum_block(start, lists, scale, plain, out, total):
    """Adds up, in rank order, what all ranks sent of the block that begins at ``start``."""
    zero_index, zero = np.uint32(0), total.dtype.type(0)
    result = out[start : start + BLOCK]
    length, touched = len(result), 0
    for rank in range(len(lists)):
        i = lists[rank, 3] = lists[rank, 4]
        entries, values, end = lists[rank, 0], lists[rank, 1], lists[rank, 2]
        while i < end:
            at = np.uint64(element(entries, i, zero_index) - start)
            if at >= np.uint64(length):
                break
            total[at] += element(values, i, zero)
            i += 1
        lists[rank, 4] = i
        touched += i - lists[rank, 3]
    if plain and touched > length // 16:
        for i in range(length):
            result[i] = rounded(total[i] * scale, result[0])
            total[i] = zero
        return
    # The product comes from the total, so that it may be written once per rank.
    result[:] = 0
    for rank in range(len(lists)):
        for i in range(lists[rank, 3], lists[rank, 4]):
            at = np.uint64(element(lists[rank, 0], i, zero_index) - start)
            result[at] = rounded(total[at] * scale, result[0])
    for rank in range(len(lists)):
        for i in range(lists[rank, 3], lists[rank, 4]):
            total[np.uint64(element(lists[rank, 0], i, zero_index) - start)] = zero


@jit
def _in_order(lists):
    """Whether all entries were met."""
    good = True
    for rank in range(len(lists)):
        good &= lists[rank, 2] == lists[rank, 4]
    return good
