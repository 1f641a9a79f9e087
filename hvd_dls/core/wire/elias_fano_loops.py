# mypy: allow-untyped-defs, no-check-untyped-defs
"""Elias–Fano, as compiled loops: see ``elias_fano`` for the code and the arguments."""

from __future__ import annotations

import numpy as np

from hvd_dls.core.bits import lowest_one, word_at
from hvd_dls.core.jit import jit

_GOOD, _TOO_FEW, _TOO_MANY, _IN_USE = -1, -2, -3, -4  # as in ``elias_fano``


@jit
def encode(indices, starts, offsets, low, lower, upper):
    """See ``elias_fano.encode``."""
    width = np.uint64(low)
    mask = (np.uint64(1) << width) - np.uint64(1)
    word, filled, at = np.uint64(0), np.uint64(0), 0
    for segment in range(len(starts) - 1):
        previous = offsets[segment] - 1
        for j in range(starts[segment], starts[segment + 1]):
            number = offsets[segment] + np.int64(indices[j])
            if number <= previous or number >= offsets[segment + 1]:
                return segment
            previous = number
            bit = (number >> low) + j
            upper[bit >> 6] |= np.uint64(1) << np.uint64(bit & 63)
            rest = np.uint64(number) & mask
            word |= rest << filled
            filled += width
            if filled >= np.uint64(64):
                lower[at] = word
                at += 1
                filled -= np.uint64(64)
                word = rest >> (width - filled)
    if filled > np.uint64(0):
        lower[at] = word
    return _GOOD


@jit
def decode(lower, upper, starts, offsets, low, indices):
    """See ``elias_fano.decode``.

    All numbers first, in a loop without a branch that depends on the data, but for the end of a
    word; then what segment they are in.
    """
    count, ascending = _decode_numbers(lower, upper, low, indices)
    if count != len(indices):
        return _TOO_FEW if count < len(indices) else _TOO_MANY
    if not ascending:
        return _first_wrong(starts, offsets, indices)
    for segment in range(len(starts) - 1):
        begin, own = offsets[segment], indices[starts[segment] : starts[segment + 1]]
        if len(own) and (own[0] < begin or own[-1] >= offsets[segment + 1]):
            return segment
        if begin:
            for j in range(len(own)):
                own[j] -= np.uint32(begin)
    return _GOOD if _is_empty(lower, len(indices) * low) else _IN_USE


@jit
def _decode_numbers(lower, upper, low, indices):
    """Writes all numbers; returns how many, or len(indices) + 1, and whether they ascend."""
    one, zero, count = np.uint64(1), np.uint64(0), np.uint64(len(indices))
    width, last, address = np.uint64(low), zero, np.uint64(upper.ctypes.data)
    if low:  # else any word will do, of which no bit is taken
        last, address = np.uint64(8 * len(lower) - 8), np.uint64(lower.ctypes.data)
    mask = (one << width) - one
    j, beyond, previous, ascending = zero, zero, np.int64(-1), True
    for at in range(len(upper)):
        word, start = upper[at], np.uint64(64 * at)
        while word != zero:
            if j == count:
                return np.int64(count) + 1, ascending
            bit = j * width
            byte = min(bit >> np.uint64(3), last)
            rest = (word_at(address + byte) >> (bit - (byte << np.uint64(3)))) & mask
            number = ((start + np.uint64(lowest_one(word)) - j) << width) | rest
            beyond |= number >> np.uint64(32)
            ascending &= np.int64(number) > previous
            previous = np.int64(number)
            indices[j] = np.uint32(number)
            word &= word - one
            j += one
    return np.int64(j), ascending and beyond == zero


@jit
def _first_wrong(starts, offsets, indices):
    """The first segment whose numbers do not ascend or leave its range."""
    for segment in range(len(starts) - 1):
        previous = offsets[segment] - 1
        for j in range(starts[segment], starts[segment + 1]):
            number = np.int64(indices[j])
            if number <= previous or number >= offsets[segment + 1]:
                return segment
            previous = number
    return len(starts) - 2  # a number of more than 32 bits


@jit
def decode_all(lower, upper, starts, offsets, low, indices, codes):
    """See ``elias_fano.decode_all``."""
    for row in range(len(starts)):
        into = indices[row, : starts[row, -1]]
        codes[row] = decode(lower[row], upper[row], starts[row], offsets, low, into)


@jit
def _is_empty(lower, bit):
    """Whether all bits from this one on are zero."""
    at = bit >> 6
    if at == len(lower):
        return True
    rest = lower[at] >> np.uint64(bit & 63)
    for word in lower[at + 1 :]:
        rest |= word
    return rest == np.uint64(0)


@jit
def encode_side_by_side(numbers, starts, low, lower_at, upper_at, words):
    """See ``elias_fano.encode_side_by_side``."""
    for row in range(len(low)):
        width = np.uint64(low[row])
        mask = (np.uint64(1) << width) - np.uint64(1)
        word, filled, at = np.uint64(0), np.uint64(0), lower_at[row]
        first, upper = starts[row], words[upper_at[row] :]
        for j in range(first, starts[row + 1]):
            number = numbers[j]
            bit = (number >> low[row]) + j - first
            upper[bit >> 6] |= np.uint64(1) << np.uint64(bit & 63)
            rest = np.uint64(number) & mask
            word |= rest << filled
            filled += width
            if filled >= np.uint64(64):
                words[at] = word
                at += 1
                filled -= np.uint64(64)
                word = rest >> (width - filled)
        if filled > np.uint64(0):
            words[at] = word


@jit
def decode_side_by_side(words, lower_at, upper_at, end, low, starts, numbers):
    """See ``elias_fano.decode_side_by_side``."""
    good = True
    for row in range(len(low)):
        lower, upper = words[lower_at[row] : upper_at[row]], words[upper_at[row] : end[row]]
        own = numbers[starts[row] : starts[row + 1]]
        count, ascending = _decode_numbers(lower, upper, low[row], own)
        good &= count == len(own) and ascending and _is_empty(lower, len(own) * low[row])
    return good
