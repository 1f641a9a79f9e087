"""Elias–Fano: an ascending sequence of whole numbers in about 2 + log2(n / C) bits each.

Each number is split: its low bits are stored as they are, side by side; of its upper bits only the
growth is, in unary: number j sets bit (number >> low bits) + j of a bit set.  The lengths follow
from the universe n and the capacity C alone, so payloads that hold different numbers of entries,
or on different ranks, are equally long.

Bits count from the least significant one of little-endian 64-bit words.

The sequence is cut into segments (a bucket's layers), each with its own range: segment s holds
numbers from ``offsets[s]`` up to below ``offsets[s + 1]``, and on this side of the coder they count
from zero in each.
"""

from __future__ import annotations

import numpy as np

from hvd_dls.core.jit import HAVE_NUMBA

if HAVE_NUMBA:
    from hvd_dls.core.wire import elias_fano_loops as loops

# What ``encode`` and ``decode`` return; any other answer is the number of the wrong segment.
GOOD, TOO_FEW, TOO_MANY, IN_USE = -1, -2, -3, -4

_WORD = np.dtype("<u8")


def low_bits(universe: int, capacity: int) -> int:
    """How many bits of a number are stored as they are: floor(log2(universe / capacity)) or 0."""
    return max(universe // capacity, 1).bit_length() - 1 if capacity else 0


def lengths(universe: int, capacity: int) -> tuple[int, int]:
    """Bytes of the lower and of the upper part, whole words each.

    Args:
        universe: the numbers are below this; 1 <= universe < 2**32.
        capacity: at most so many numbers; 0 takes no space.
    """
    if capacity == 0:
        return 0, 0
    low = low_bits(universe, capacity)
    upper = capacity + (universe >> low) + 1
    return -(-capacity * low // 64) * 8, -(-upper // 64) * 8


def all_lengths(
    universes: np.ndarray, capacities: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``low_bits`` and ``lengths`` of (R,) codes at once: int64; no capacity is 0."""
    low = np.frexp(np.maximum(universes // capacities, 1))[1].astype(np.int64) - 1
    upper = capacities + (universes >> low) + 1
    return low, -(-capacities * low // 64) * 8, -(-upper // 64) * 8


def encode(
    indices: np.ndarray,
    starts: np.ndarray,
    offsets: np.ndarray,
    low: int,
    lower: np.ndarray,
    upper: np.ndarray,
) -> int:
    """Writes numbers into the two parts of a code.

    Args:
        indices: (K,) uint32, in each segment ascending from its own zero.
        starts: (S + 1,) int64, where each segment begins in ``indices``; the last one is K.
        offsets: (S + 1,) int64, the range of each segment.
        low: see ``low_bits``.
        lower: uint64, zeros; length from ``lengths``, for a capacity of at least K.
        upper: likewise.

    Returns:
        GOOD, or the first segment whose numbers do not ascend or leave its range.
    """
    do = loops.encode if HAVE_NUMBA else _encode_numpy
    return int(do(indices, starts, offsets, low, lower, upper))


def decode(
    lower: np.ndarray,
    upper: np.ndarray,
    starts: np.ndarray,
    offsets: np.ndarray,
    low: int,
    indices: np.ndarray,
) -> int:
    """Reads the numbers of a code and checks that they could have been encoded.

    Args:
        lower: uint64, length from ``lengths`` for a capacity of at least K.
        upper: likewise.
        starts: (S + 1,) int64, see ``encode``.
        offsets: (S + 1,) int64, see ``encode``.
        low: see ``low_bits``.
        indices: (K,) uint32, overwritten with the numbers, in each segment from its own zero;
            void unless the answer is GOOD.

    Returns:
        GOOD; TOO_FEW or TOO_MANY numbers; the first segment with numbers that do not ascend or
        that leave its range; or IN_USE, if there is something behind the last number.
    """
    do = loops.decode if HAVE_NUMBA else _decode_numpy
    return int(do(lower, upper, starts, offsets, low, indices))


def decode_all(
    lower: np.ndarray,
    upper: np.ndarray,
    starts: np.ndarray,
    offsets: np.ndarray,
    low: int,
    indices: np.ndarray,
) -> np.ndarray:
    """``decode`` of several codes at once.

    Args:
        lower: as for ``decode``, a row for each code.
        upper: likewise.
        starts: likewise.
        offsets: the same for all.
        low: likewise.
        indices: a row for each code, at least as long as that has numbers.

    Returns:
        What ``decode`` returns for each.
    """
    codes = np.empty(len(starts), np.int64)
    if HAVE_NUMBA:
        loops.decode_all(lower, upper, starts, offsets, low, indices, codes)
    else:
        for row, start in enumerate(starts):
            into = indices[row, : start[-1]]
            codes[row] = _decode_numpy(lower[row], upper[row], start, offsets, low, into)
    return codes


def encode_side_by_side(
    numbers: np.ndarray,
    starts: np.ndarray,
    low: np.ndarray,
    lower_at: np.ndarray,
    upper_at: np.ndarray,
    words: np.ndarray,
) -> None:
    """``encode`` of several codes, of one segment each, into one array; checks nothing.

    Args:
        numbers: (K,) of all codes, in each ascending.
        starts: (R + 1,) where each code's begin.
        low: (R,), see ``low_bits``.
        lower_at: (R,) where each code's lower part begins.
        upper_at: likewise, the upper part.
        words: uint64, zeros there.
    """
    numbers = numbers.astype(np.int64, copy=False)
    if HAVE_NUMBA:
        loops.encode_side_by_side(numbers, starts, low, lower_at, upper_at, words)
        return
    row, at, width = _places(starts, low)
    bits = np.zeros(64 * len(words), np.uint8)
    bits[64 * upper_at[row] + (numbers >> width) + at] = 1
    for bit in range(int(low.max(initial=0))):
        own = width > bit
        bits[(64 * lower_at[row] + at * width + bit)[own]] = (numbers[own] >> bit) & 1
    words |= np.packbits(bits, bitorder="little").view(_WORD)


def decode_side_by_side(
    words: np.ndarray,
    parts: tuple[np.ndarray, np.ndarray, np.ndarray],
    low: np.ndarray,
    starts: np.ndarray,
    numbers: np.ndarray,
) -> bool:
    """Inverse of ``encode_side_by_side``.

    Args:
        words: uint64.
        parts: (R,) where each code's lower part begins, its upper part, and where that ends.
        low: (R,), see ``low_bits``.
        starts: (R + 1,) where each code's numbers are to begin.
        numbers: (K,) uint32, overwritten; void unless the answer is yes.

    Returns:
        Whether there are as many as there should be, in each code ascending, and nothing behind.
    """
    lower_at, upper_at, end = parts
    if HAVE_NUMBA:
        return bool(loops.decode_side_by_side(words, lower_at, upper_at, end, low, starts, numbers))
    row, at, width = _places(starts, low)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    # Which part each word is in: lower parts count -1, upper parts their code, all else nothing.
    kind = np.full(len(words) + 1, -2, np.int64)
    for code, (first, middle, last) in enumerate(zip(*map(np.ndarray.tolist, parts), strict=True)):
        kind[first:middle], kind[middle:last] = -1, code
    ones = np.flatnonzero(bits)
    of = kind[ones >> 6]
    ups = ones[of >= 0]
    if not np.array_equal(of[of >= 0], row):
        return False
    found = (ups - 64 * upper_at[row] - at) << width
    taken = 0
    for bit in range(int(low.max(initial=0))):
        own = width > bit
        rest = bits[(64 * lower_at[row] + at * width + bit)[own]].astype(np.int64)
        found[own] |= rest << bit
        taken += int(rest.sum())
    ascending = found[1:] > found[:-1]
    ascending |= row[1:] != row[:-1]
    if taken != np.count_nonzero(of == -1) or not ascending.all() or (found >> 32).any():
        return False
    numbers[:] = found
    return True


def _places(starts: np.ndarray, low: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each number its code, its place there, and how many low bits it has."""
    counts = np.diff(starts)
    row = np.repeat(np.arange(len(low)), counts)
    return row, np.arange(len(row)) - starts[row], low[row]


# With NumPy alone -------------------------------------------------------------------------------


def _encode_numpy(
    indices: np.ndarray,
    starts: np.ndarray,
    offsets: np.ndarray,
    low: int,
    lower: np.ndarray,
    upper: np.ndarray,
) -> int:
    numbers = np.repeat(offsets[:-1], np.diff(starts)) + indices
    wrong = _first_wrong(numbers, starts, offsets)
    if wrong != GOOD:
        return wrong
    bits = np.zeros(64 * len(upper), np.uint8)
    bits[(numbers >> low) + np.arange(len(numbers))] = 1
    upper.view(np.uint8)[:] = np.packbits(bits, bitorder="little")
    if low and len(numbers):
        as_bytes = numbers.astype("<u4").view(np.uint8).reshape(-1, 4)
        packed = np.packbits(np.unpackbits(as_bytes, 1, low, "little"), bitorder="little")
        lower.view(np.uint8)[: len(packed)] = packed
    return GOOD


def _decode_numpy(
    lower: np.ndarray,
    upper: np.ndarray,
    starts: np.ndarray,
    offsets: np.ndarray,
    low: int,
    indices: np.ndarray,
) -> int:
    n = len(indices)
    positions = np.flatnonzero(np.unpackbits(upper.view(np.uint8), bitorder="little"))
    if len(positions) != n:
        return TOO_FEW if len(positions) < n else TOO_MANY
    numbers = (positions - np.arange(n)) << low
    if low and n:
        bits = np.unpackbits(lower.view(np.uint8), count=n * low, bitorder="little")
        rest = np.zeros((n, 4), np.uint8)
        packed = np.packbits(bits.reshape(n, low), axis=1, bitorder="little")
        rest[:, : packed.shape[1]] = packed
        numbers |= rest.view("<u4")[:, 0]
    wrong = _first_wrong(numbers, starts, offsets)
    if wrong != GOOD:
        return wrong
    np.subtract(numbers, np.repeat(offsets[:-1], np.diff(starts)), out=indices, casting="unsafe")
    word, bit = divmod(n * low, 64)
    behind = lower[word:]
    in_use = len(behind) > 0 and bool(behind[0] >> np.uint64(bit) or behind[1:].any())
    return IN_USE if in_use else GOOD


def _first_wrong(numbers: np.ndarray, starts: np.ndarray, offsets: np.ndarray) -> int:
    """The first segment whose numbers do not ascend or leave its range, or GOOD."""
    segments = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    wrong = (numbers < offsets[segments]) | (numbers >= offsets[segments + 1])
    wrong[1:] |= numbers[1:] <= numbers[:-1]
    return int(segments[np.argmax(wrong)]) if wrong.any() else GOOD
