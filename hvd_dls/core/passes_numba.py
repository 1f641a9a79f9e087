# mypy: allow-untyped-defs, no-check-untyped-defs
"""The passes as compiled loops.

``find`` reads every entry once.  64 sums at a time are made in registers and compared with a bound;
what comes out is one 64-bit mask, and only its ones are looked at.  They go into a buffer of
candidates; when that is full, its k-th largest becomes the bound and only the k largest stay.  So
one pass suffices whatever the bound was at the start, unless it was too high.

Magnitudes are compared as unsigned integers (the bits without the sign), where Inf and NaN are
larger than all numbers: whether everything is finite is seen from the largest candidates.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from hvd_dls.core.bits import (
    LANES,
    element,
    lowest_one,
    magnitude,
    number,
    reaching,
    rounded,
    sums_reaching,
    widened,
)
from hvd_dls.core.jit import jit
from hvd_dls.core.passes_numpy import sample_stride
from hvd_dls.core.sketch import BELOW, LAST_BASE, WINDOW, Sketch, edges

_MARGIN = 0.7  # part of the last threshold above which candidates are looked for
_CHUNK = 2048  # entries between two looks at the room left: a chunk stays in the first-level cache
_BLOCK = 8192  # entries settled at once
_BINS = LAST_BASE + WINDOW
_DIGITS = 2048
_EDGES = edges(0, _BINS)
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)


_nothing: dict[str, np.ndarray] = {"f": np.empty(0, np.float32), "d": np.empty(0, np.float64)}


class _Scratch(threading.local):
    """Memory that all calls in a thread share; what is in it lasts for one call."""

    def __init__(self) -> None:
        # Histogram of the sample; of digits, to find the k-th largest; bins of a chunk's entries.
        self.tables = np.zeros((3, max(_BINS, _DIGITS, _CHUNK)), np.uint32)
        self._indices = np.empty(0, np.uint32)
        self._values = dict(_nothing)
        self.totals = {"f": np.zeros(_BLOCK, np.float32), "d": np.zeros(_BLOCK, np.float64)}

    def candidates(self, dtype: np.dtype[Any], room: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices and values, at least ``room`` of each."""
        if len(self._indices) < room:
            self._indices = np.empty(room, np.uint32)
        if len(self._values[dtype.char]) < room:
            self._values[dtype.char] = np.empty(room, dtype)
        return self._indices, self._values[dtype.char]


_scratch = _Scratch()


def _numbered(array: np.ndarray) -> np.ndarray:
    """float16 as int16, see ``bits``."""
    return array.view(np.int16) if array.dtype.char == "e" else array


# Find -------------------------------------------------------------------------------------------


def find(
    residual: np.ndarray, gradient: np.ndarray, k: int, last_threshold: float
) -> tuple[np.ndarray, np.ndarray, float, Sketch] | None:
    """See ``passes.find``."""
    n, dtype = len(residual), residual.dtype
    gradient, bound, stride = _numbered(gradient), _MARGIN * last_threshold, sample_stride(n)
    room = min(2 * k, n) + _CHUNK
    where, what = _scratch.candidates(dtype, room + LANES)
    indices, values = np.empty(k, np.uint32), np.empty(k, dtype)
    counts, tables = np.empty(WINDOW, np.uint32), _scratch.tables
    base, threshold = _find(
        residual, gradient, k, bound, stride, where, what, room, tables, indices, values, counts
    )
    return None if base < 0 else (indices, values, threshold, Sketch(base, counts))


@jit
def _find(residual, gradient, k, bound, stride, where, what, room, tables, indices, values, counts):
    """Writes indices, values and counts; returns the sketch's base (-1: not finite), threshold."""
    n = len(residual)
    for attempt in range(3):  # the bound as given; if that was too high, the sample's; 0
        if attempt == 1:
            bound = _EDGES[_bin_with(tables[0], k, stride)]
        elif attempt == 2:
            bound = 0.0
        count = _scan(residual, gradient, 0, n, k, bound, stride, where, what, room, tables)
        if count >= k:
            break
    return _finish(where, what, count, k, stride, tables, indices, values, counts)


@jit
def _scan(residual, gradient, start, stop, k, bound, stride, where, what, room, tables):
    """Collects candidates from start to stop: indices in ``where`` and values in ``what``.

    Fills the sample's histogram; returns the number of candidates.  The k largest of all that
    reach the bound are among them.
    """
    bins = tables[0]
    bins[:] = 0
    what[0] = bound
    low = magnitude(what[0])
    count = 0
    sampled = start + (-start) % stride
    for first in range(start, stop, _CHUNK):
        last = min(first + _CHUNK, stop)
        if count + last - first > room:
            low, ties = _kth(what, count, k, k // 4, tables[1])
            count = _keep(where, what, count, low, ties, where, what)
            if ties < count:
                low += np.uint64(1)  # a tie that comes later has the higher index
        i = first
        while i + LANES <= last:
            mask = sums_reaching(residual, gradient, i, low)
            while mask != 0:
                j = i + lowest_one(mask)
                where[count] = j
                what[count] = residual[j] + widened(gradient[j])
                count += 1
                mask &= mask - np.uint64(1)
            i += LANES
        for j in range(i, last):
            value = residual[j] + widened(gradient[j])
            if magnitude(value) >= low:
                where[count] = j
                what[count] = value
                count += 1
        if stride < 8:  # faster by vectors, even of entries that are not in the sample
            old, new, own = residual[first:last], gradient[first:last], tables[2]
            for i in range(last - first):
                own[i] = _bin(old[i] + widened(new[i]))
            for i in range(sampled - first, last - first, stride):
                bins[own[i]] += np.uint32(1)
                sampled += stride
        while sampled < last:
            bins[_bin(residual[sampled] + widened(gradient[sampled]))] += np.uint32(1)
            sampled += stride
    return count


@jit
def _kth(values, count, k, slack, digits):
    """A magnitude that at least k and at most k + slack of the values reach; or, with ties, more.

    The second result says how many of those that equal it to take, for exactly k in all; ``count``
    means all of them, k + slack at most.

    Digit by digit; the first digit spans what lies between the smallest and the largest.
    """
    low = high = magnitude(values[0])
    for i in range(1, count):
        own = magnitude(values[i])
        low, high = min(low, own), max(high, own)
    wanted, reached = k, count
    few = np.uint64(_DIGITS if count > 4096 else 128)  # clearing and looking through takes time too
    while low < high and reached > k + slack:
        shift = np.uint64(0)
        while (high - low) >> shift >= few:
            shift += np.uint64(1)
        digit = (high - low) >> shift
        digits[: digit + np.uint64(1)] = 0
        for first in range(0, count, LANES):
            mask = reaching(values, first, low) & ~reaching(values, first, high + np.uint64(1))
            if count - first < LANES:
                mask &= (np.uint64(1) << np.uint64(count - first)) - np.uint64(1)
            if mask == _ALL:
                for i in range(first, first + LANES):
                    digits[(magnitude(values[i]) - low) >> shift] += np.uint32(1)
                mask = np.uint64(0)
            while mask != 0:
                i = first + lowest_one(mask)
                digits[(magnitude(values[i]) - low) >> shift] += np.uint32(1)
                mask &= mask - np.uint64(1)
        while digits[digit] < wanted:
            wanted -= digits[digit]
            digit -= np.uint64(1)
        reached = k - wanted + digits[digit]
        low += digit << shift
        high = min(high, low + ((np.uint64(1) << shift) - np.uint64(1)))
    return low, (count if low < high else wanted)


@jit
def _keep(where, what, count, least, ties, to_where, to_what):
    """Copies, in order, the candidates above a magnitude and the first ``ties`` that equal it."""
    kept = 0
    for first in range(0, count, LANES):
        mask = reaching(what, first, least)
        if count - first < LANES:
            mask &= (np.uint64(1) << np.uint64(count - first)) - np.uint64(1)
        while mask != 0:
            i = first + lowest_one(mask)
            mask &= mask - np.uint64(1)
            if magnitude(what[i]) == least:
                if ties == 0:
                    continue
                ties -= 1
            to_where[kept] = where[i]
            to_what[kept] = what[i]
            kept += 1
    return kept


@jit
def _finish(where, what, count, k, stride, tables, indices, values, counts):
    """Picks the k largest candidates and makes the sketch; returns as ``_find`` does."""
    least, ties = _kth(what, count, k, -1, tables[1])
    _keep(where, what, count, least, ties, indices, values)
    largest = np.uint64(0)
    for i in range(k):
        largest = max(largest, magnitude(values[i]))
    if not np.isfinite(number(largest, values[0])):
        return -1, 0.0
    threshold = number(least, values[0])
    edge = _bin(threshold)
    base = min(max(edge - BELOW, 0), LAST_BASE)
    # What is sent counts exactly, each other entry sampled for ``stride``.  Bins above the
    # threshold's hold no others, and those below it nothing sent.  Bin 0: zeros, never counted.
    counts[:] = 0
    own = tables[2]
    divisor = _ALL // np.uint64(stride) + np.uint64(1)
    both = 0  # sent from the threshold's bin, and in the sample
    for first in range(0, k, _CHUNK):
        some, their = indices[first : first + _CHUNK], values[first : first + _CHUNK]
        for i in range(len(some)):
            own[i] = min(_bin(their[i]) - base, WINDOW - 1)
            # Whether the stride divides it, by a multiplication (Lemire 2019).
            sampled = np.uint64(some[i]) * divisor <= divisor - np.uint64(1)
            both += sampled & (own[i] == edge - base)
        for i in range(len(some)):
            counts[own[i]] += np.uint32(1)
    for i in range(max(base, 1), edge + 1):
        counts[i - base] += (tables[0, i] - (both if i == edge else 0)) * stride
    return base, np.float64(threshold)


@jit
def _bin(value):
    """``sketch.bin_of`` of a magnitude."""
    return min(np.int64(magnitude(np.float32(value)) >> np.uint64(20)), _BINS - 1)


@jit
def _bin_with(bins, k, stride):
    """The highest bin above whose lower edge lie 2 k entries or more, judging by the sample."""
    above = 0
    for i in range(_BINS - 1, 0, -1):
        above += bins[i] * stride
        if above >= 2 * k + 16 * stride:
            return i
    return 0


# Settle -----------------------------------------------------------------------------------------


def settle(
    residual: np.ndarray,
    gradient: np.ndarray,
    indices: np.ndarray,
    kept: np.ndarray | None,
    received: Sequence[tuple[np.ndarray, np.ndarray]],
    scale: float,
    out: np.ndarray,
) -> None:
    """See ``passes.settle``."""
    n, dtype = len(residual), residual.dtype
    gradient, out, factor = _numbered(gradient), _numbered(out), dtype.type(scale)
    left = _nothing[dtype.char] if kept is None else kept
    lists = np.empty((len(received), 5), np.int64)
    for rank, (entries, values) in enumerate(received):
        _note(lists, rank, entries, values)
    total = _scratch.totals[dtype.char]
    if not _settle(residual, gradient, indices, left, lists, factor, out, total):
        raise ValueError(f"indices must ascend and stay below {n}")


@jit
def _note(lists, rank, entries, values):
    """Where a rank's entries lie, as addresses: the same type for any number of ranks."""
    lists[rank, 0] = entries.ctypes.data
    lists[rank, 1] = values.ctypes.data
    lists[rank, 2] = len(entries)
    lists[rank, 3] = lists[rank, 4] = 0  # entries of the current block: from, to


@jit
def _settle(residual, gradient, indices, kept, lists, scale, out, total):
    """Block by block, so that what several steps touch is in the cache; whether all was in order.

    ``total`` holds zeros before and after.
    """
    n, sent = len(residual), 0
    zero_index, zero = np.uint32(0), residual.dtype.type(0)
    plain = zero * scale == 0 and not np.signbit(scale)  # zero times the scale is +0
    for start in range(0, n, _BLOCK):
        own, new = residual[start : start + _BLOCK], gradient[start : start + _BLOCK]
        result, length = out[start : start + _BLOCK], len(own)
        for i in range(length):
            own[i] += widened(new[i])
        while sent < len(indices) and np.uint64(indices[sent] - start) < np.uint64(length):
            own[indices[sent] - start] = kept[sent] if len(kept) else zero
            sent += 1
        touched = 0
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
            continue
        # The product comes from the total, so that it may be written once per rank.
        result[:] = 0
        for rank in range(len(lists)):
            for i in range(lists[rank, 3], lists[rank, 4]):
                at = np.uint64(element(lists[rank, 0], i, zero_index) - start)
                result[at] = rounded(total[at] * scale, result[0])
        for rank in range(len(lists)):
            for i in range(lists[rank, 3], lists[rank, 4]):
                total[np.uint64(element(lists[rank, 0], i, zero_index) - start)] = zero
    in_order = sent == len(indices)
    for rank in range(len(lists)):
        in_order &= lists[rank, 2] == lists[rank, 4]
    return in_order
