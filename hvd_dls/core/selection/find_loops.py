# mypy: allow-untyped-defs, no-check-untyped-defs
"""Finding the k largest of residual + gradient, as compiled loops.

Every entry is read once.  64 sums at a time are made in registers and compared with a bound; what
comes out is one 64-bit mask, and only its ones are looked at.  They go into a buffer of candidates;
when that is full, its k-th largest becomes the bound and only the k largest stay.  So one pass
suffices whatever the bound was at the start, unless it was too high.

Magnitudes are compared as unsigned integers (the bits without the sign), where Inf and NaN are
larger than all numbers: whether everything is finite is seen from the largest candidates.
"""

from __future__ import annotations

import numpy as np

from hvd_dls.core.balancing.sketch import BELOW, LAST_BASE, WINDOW, edges
from hvd_dls.core.bits import (
    LANES,
    lowest_one,
    magnitude,
    number,
    reaching,
    sums_reaching,
    widened,
)
from hvd_dls.core.jit import jit

CHUNK = 2048  # entries between two looks at the room left: a chunk stays in the first-level cache
BINS = LAST_BASE + WINDOW
DIGITS = 2048
_EDGES = edges(0, BINS)
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)


@jit
def find(residual, gradient, k, bound, stride, where, what, room, tables, indices, values, counts):
    """Writes indices, values and counts; returns the sketch's base (-1: not finite), threshold."""
    n = len(residual)
    for attempt in range(3):  # the bound as given; if that was too high, the sample's; 0
        if attempt == 1:
            bound = next_bound(tables[0], k, stride)
        elif attempt == 2:
            bound = 0.0
        count = scan(residual, gradient, 0, n, k, bound, stride, where, what, room, tables)
        if count >= k:
            break
    return finish(where, what, count, k, stride, tables, indices, values, counts)


@jit
def scan(residual, gradient, start, stop, k, bound, stride, where, what, room, tables):
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
    for first in range(start, stop, CHUNK):
        last = min(first + CHUNK, stop)
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
    few = np.uint64(DIGITS if count > 4096 else 128)  # clearing and looking through takes time too
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
def finish(where, what, count, k, stride, tables, indices, values, counts):
    """Picks the k largest candidates and makes the sketch; returns as ``find`` does."""
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
    for first in range(0, k, CHUNK):
        some, their = indices[first : first + CHUNK], values[first : first + CHUNK]
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
def places(values, least, where):
    """Writes ``passes.reaching``; returns how many there are."""
    low, count = magnitude(least), 0
    whole = len(values) - len(values) % LANES
    for first in range(0, whole, LANES):
        mask = reaching(values, first, low)
        while mask != 0:
            where[count] = first + lowest_one(mask)
            count += 1
            mask &= mask - np.uint64(1)
    for i in range(whole, len(values)):
        if magnitude(values[i]) >= low:
            where[count] = i
            count += 1
    return count


@jit
def finite(values):
    """See ``passes.finite``."""
    good = True
    for i in range(len(values)):
        good &= np.isfinite(widened(values[i]))
    return good


@jit
def _bin(value):
    """``sketch.bin_of`` of a magnitude."""
    return min(np.int64(magnitude(np.float32(value)) >> np.uint64(20)), BINS - 1)


@jit
def next_bound(bins, k, stride):
    """The highest edge of a bin above which lie 2 k entries or more, judging by the sample."""
    above = 0
    for i in range(BINS - 1, 0, -1):
        above += bins[i] * stride
        if above >= 2 * k + 16 * stride:
            return _EDGES[i]
    return _EDGES[0]
