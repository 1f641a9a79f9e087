# mypy: allow-untyped-defs, no-check-untyped-defs
"""Booking a step, as compiled loops: the residual takes the gradient in, and ranks add up."""

from __future__ import annotations

import numpy as np

from hvd_dls.core.bits import element, rounded, widened
from hvd_dls.core.jit import jit

BLOCK, WIDEST = 8192, 65536  # entries settled at once: where there are many to add up, and few
FEW = 64  # that a rank sent of a block
END = 1 << 32  # beyond all indices


@jit
def note(table, start, stop):
    """Where each rank's entries lie, and which of them are from start to stop."""
    lists = np.empty((len(table), 5), np.int64)
    for rank in range(len(table)):
        lists[rank, 0], lists[rank, 1] = table[rank, 0], table[rank, 1]
        lists[rank, 2] = _first_at(table[rank, 0], table[rank, 2], stop)
        # Of the current block: from, to.
        lists[rank, 3] = lists[rank, 4] = _first_at(table[rank, 0], table[rank, 2], start)
    return lists


@jit
def _first_at(address, count, least):
    """As ``_first``, of so many entries from an address on."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if element(address, middle, np.uint32(0)) < least:
            low = middle + 1
        else:
            high = middle
    return low


@jit
def _width(lists, n):
    """How many entries of a layer to settle at once: more where ranks sent few."""
    entries = 0
    for rank in range(len(lists)):
        entries += lists[rank, 2] - lists[rank, 3]
    width = BLOCK
    while width < WIDEST and entries * width < FEW * len(lists) * n:
        width *= 2
    return width


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
def settle(residual, gradient, begin, stop, indices, kept, table, scale, out, total):
    """From begin to stop; returns whether all of that was in order.

    Block by block, so that what several steps touch is in the cache.  ``begin`` is a multiple of
    BLOCK, and ``stop``, too, or END.  ``total`` holds WIDEST zeros before and after.
    """
    lists = note(table, begin, stop)
    end = min(stop, len(residual))
    width = _width(lists, end - begin)
    sent, end_of_sent = _first(indices, begin), _first(indices, stop)
    zero = residual.dtype.type(0)
    plain = zero * scale == 0 and not np.signbit(scale)  # zero times the scale is +0
    for start in range(begin, end, width):
        to = min(start + width, end)
        own, new = residual[start:to], gradient[start:to]
        for i in range(len(own)):
            own[i] += widened(new[i])
        while sent < end_of_sent and np.uint64(indices[sent] - start) < np.uint64(len(own)):
            own[indices[sent] - start] = kept[sent] if len(kept) else zero
            sent += 1
        _sum_block(start, lists, scale, plain, out[start:to], total)
    return _in_order(lists) and sent == end_of_sent


@jit
def sum_up(begin, stop, table, scale, out, total):
    """The sums alone, of a layer whose residual is another rank's: as ``settle``."""
    lists = note(table, begin, stop)
    end = min(stop, len(out))
    width = _width(lists, end - begin)
    zero = total.dtype.type(0)
    plain = zero * scale == 0 and not np.signbit(scale)
    for start in range(begin, end, width):
        _sum_block(start, lists, scale, plain, out[start : min(start + width, end)], total)
    return _in_order(lists)


@jit
def _sum_block(start, lists, scale, plain, result, total):
    """Adds up, in rank order, what all ranks sent of the block that begins at ``start``."""
    zero_index, zero = np.uint32(0), total.dtype.type(0)
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
    result[:] = 0
    if plain:  # what has been written, or is zero anyway, need not be looked at again
        for rank in range(len(lists)):
            for i in range(lists[rank, 3], lists[rank, 4]):
                at = np.uint64(element(lists[rank, 0], i, zero_index) - start)
                if total[at] != zero:
                    result[at] = rounded(total[at] * scale, result[0])
                    total[at] = zero
        return
    # The product comes from the total, so that it may be written once per rank.
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
