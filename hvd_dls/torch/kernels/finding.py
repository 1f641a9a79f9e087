# mypy: allow-untyped-defs, no-check-untyped-defs
"""Finding the k largest of residual + gradient on a GPU: the kernels.

The core's algorithm (``core/selection/find_loops.py``): one pass adds, compares with a bound that
is a little below the last threshold, and keeps the few entries that reach it, the candidates.  The
k-th largest of these is found digit by digit, by histograms.  Everything is exact, and ties go to
the lower index, so the result has the same bits as the core's.  Magnitudes are compared as
integers: the bits without the sign, where Inf and NaN are larger than all numbers.

No shape and no launch depends on data.  What can go wrong is counted and told to the host: fewer
than k candidates (the bound was too high), or more in a block than it has room for.

A layer of few entries takes one program and one launch (``find_alone``), since launches take longer
there than the work; larger ones take a program for each block and a kernel for each stage.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hvd_dls.core.balancing.sketch import BELOW, LAST_BASE, MANTISSA_SHIFT, WINDOW

FIRST, REST = 2048, 1024  # values of the first digit, which is the sketch's bin, and of the others
UNFINITE = 2040  # first digits from here on are those of Inf and NaN

# What ``out`` holds behind k values and k indices, and where: see ``Told``.
THRESHOLD, CANDIDATES, FULLEST, NOT_FINITE, BOTH, SAMPLED = 0, 1, 2, 3, 4, 8
REACHED = SAMPLED + WINDOW
TOLD = REACHED + WINDOW
WIDE = 64  # the next power of two above WINDOW

# Where what the stages hand on is in their workspace; ``out`` follows.
SAMPLE = 0
HISTOGRAM_1 = SAMPLE + FIRST
HISTOGRAM_2 = HISTOGRAM_1 + FIRST
HISTOGRAM_3 = HISTOGRAM_2 + REST
DIGITS = HISTOGRAM_3 + REST  # digit and what is wanted of it, for each of three digits
WORKSPACE = DIGITS + 8

_FIRST, _REST = tl.constexpr(FIRST), tl.constexpr(REST)
_SHIFT, _HALF = tl.constexpr(MANTISSA_SHIFT), tl.constexpr(10)
_NO_SIGN = tl.constexpr(0x7FFFFFFF)
_UNFINITE = tl.constexpr(UNFINITE)
_BELOW, _LAST_BASE, _WINDOW = tl.constexpr(BELOW), tl.constexpr(LAST_BASE), tl.constexpr(WINDOW)
_THRESHOLD, _CANDIDATES = tl.constexpr(THRESHOLD), tl.constexpr(CANDIDATES)
_FULLEST, _NOT_FINITE, _BOTH = tl.constexpr(FULLEST), tl.constexpr(NOT_FINITE), tl.constexpr(BOTH)
_SAMPLED, _REACHED, _WIDE = tl.constexpr(SAMPLED), tl.constexpr(REACHED), tl.constexpr(WIDE)
_SMALL = tl.constexpr(256)
_SAMPLE, _DIGITS = tl.constexpr(SAMPLE), tl.constexpr(DIGITS)
_WORKSPACE = tl.constexpr(WORKSPACE)
_HISTOGRAM_1, _HISTOGRAM_2 = tl.constexpr(HISTOGRAM_1), tl.constexpr(HISTOGRAM_2)
_HISTOGRAM_3 = tl.constexpr(HISTOGRAM_3)


# What stages share --------------------------------------------------------------------------------


@triton.jit
def _sums(residual, gradient, at, n):
    """Bits of the sums at some indices, as int32; those of 0 beyond the layer."""
    inside = at < n
    old = tl.load(residual + at, mask=inside, other=0.0)
    new = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    return (old + new).to(tl.int32, bitcast=True)


@triton.jit
def _digit(histogram, wanted, VALUES: tl.constexpr):
    """The digit of the ``wanted``-th largest, and how many are wanted of those that have it."""
    value = tl.arange(0, VALUES)
    reached = tl.sum(histogram, 0) - tl.cumsum(histogram, 0) + histogram  # by so many, each value
    digit = tl.maximum(tl.sum((reached >= wanted).to(tl.int32), 0) - 1, 0)
    return digit, wanted - tl.sum(tl.where(value == digit + 1, reached, 0), 0)


@triton.jit
def _tell(told, threshold, sample, histogram):
    """Writes what the host makes a sketch of: counts in the window around the threshold.

    The last one of the candidates' counts is of all beyond, too.
    """
    base = tl.minimum(tl.maximum((threshold >> _SHIFT) - _BELOW, 0), _LAST_BASE)
    place = tl.arange(0, _FIRST) - base
    within = (place >= 0) & (place < _WINDOW)
    tl.store(told + _SAMPLED + place, sample, mask=within)
    tl.store(told + _REACHED + place, histogram, mask=within & (place < _WINDOW - 1))
    beyond = tl.sum(tl.where(place >= _WINDOW - 1, histogram, 0), 0)
    tl.store(told + _REACHED + _WINDOW - 1, beyond)
    unfinite = tl.sum(tl.where(tl.arange(0, _FIRST) >= _UNFINITE, histogram, 0), 0)
    tl.store(told + _NOT_FINITE, unfinite)
    tl.store(told + _THRESHOLD, threshold)


# One program for the whole layer ------------------------------------------------------------------


@triton.jit(do_not_specialize=["k", "low", "stride", "room"])
def find_alone(
    residual,  # (n,) float32
    gradient,  # (n,) float32, float16 or bfloat16
    n,
    k,
    low,  # bits of the bound
    stride,  # of the sample
    room,  # candidates
    where,  # (room,) int32, their indices
    what,  # (room,) int32, bits of their values
    out,  # (2 * k + TOLD,) int32
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """All of ``find`` for a small layer."""
    count = 0
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = _sums(residual, gradient, at, n)
        hit = (at < n) & ((value & _NO_SIGN) >= low)
        place = count + tl.cumsum(hit.to(tl.int32), 0) - 1
        tl.store(where + place, at, mask=hit & (place < room))
        tl.store(what + place, value, mask=hit & (place < room))
        count += tl.sum(hit.to(tl.int32), 0)
    tl.debug_barrier()  # candidates are read by other threads than wrote them
    held = tl.minimum(count, room)

    # Here digits have 8 bits: the fewer bins, the faster are histograms within a program.
    threshold, ties, known = 0, k, 31
    for _ in range(4):
        lower = tl.maximum(known - 8, 0)
        histogram = tl.zeros([_SMALL], tl.int32)
        for start in range(0, held, TILE):
            at = start + tl.arange(0, TILE)
            magnitude = tl.load(what + at, mask=at < held, other=0) & _NO_SIGN
            same = (at < held) & ((magnitude >> known) == threshold)
            digit = ((magnitude - (threshold << known)) >> lower) & (_SMALL - 1)
            histogram += tl.histogram(digit, _SMALL, mask=same)
        digit, ties = _digit(histogram, ties, _SMALL)
        threshold = (threshold << (known - lower)) + digit
        known = lower
    edge = threshold >> _SHIFT
    base = tl.minimum(tl.maximum(edge - _BELOW, 0), _LAST_BASE)

    written, equal, both, unfinite = 0, 0, 0, 0
    reached = tl.zeros([_WIDE], tl.int32)
    for start in range(0, held, TILE):
        at = start + tl.arange(0, TILE)
        value = tl.load(what + at, mask=at < held, other=0)
        index = tl.load(where + at, mask=at < held, other=0)
        magnitude = value & _NO_SIGN
        bins = magnitude >> _SHIFT
        tie = (at < held) & (magnitude == threshold)
        among = equal + tl.cumsum(tie.to(tl.int32), 0)
        taken = (at < held) & ((magnitude > threshold) | (tie & (among <= ties)))
        place = written + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(out + place, value, mask=taken & (place < k))
        tl.store(out + k + place, index, mask=taken & (place < k))
        written += tl.sum(taken.to(tl.int32), 0)
        equal += tl.sum(tie.to(tl.int32), 0)
        both += tl.sum((taken & (bins == edge) & (index % stride == 0)).to(tl.int32), 0)
        unfinite += tl.sum((taken & (bins >= _UNFINITE)).to(tl.int32), 0)
        reached += tl.histogram(tl.minimum(bins - base, _WINDOW - 1), _WIDE, mask=taken)
    sample = tl.zeros([_WIDE], tl.int32)
    for start in range(0, n, BLOCK * stride):
        at = start + tl.arange(0, BLOCK) * stride
        bins = (_sums(residual, gradient, at, n) & _NO_SIGN) >> _SHIFT
        sampled = (at < n) & (bins >= base) & (bins <= edge)
        sample += tl.histogram(tl.where(sampled, bins - base, 0), _WIDE, mask=sampled)
    told = out + 2 * k
    place = tl.arange(0, _WIDE)
    tl.store(told + _SAMPLED + place, sample, mask=place < _WINDOW)
    tl.store(told + _REACHED + place, reached, mask=place < _WINDOW)
    tl.store(told + _THRESHOLD, threshold)
    tl.store(told + _CANDIDATES, count)
    tl.store(told + _FULLEST, count)
    tl.store(told + _NOT_FINITE, unfinite)
    tl.store(told + _BOTH, both)


# A program for each block -------------------------------------------------------------------------


@triton.jit(do_not_specialize=["low", "stride", "k"])
def scan(
    residual,
    gradient,
    n,
    low,
    stride,
    counts,  # (blocks,) int32, candidates of each block, those without room too
    where,  # (blocks, ROOM) int32
    what,  # (blocks, ROOM) int32
    work,  # (WORKSPACE + 2 * k + TOLD,) int32, zeros: the stages', and ``out``
    k,
    BLOCK: tl.constexpr,
    ROOM: tl.constexpr,
):
    """Candidates of each block, and the sample's histogram."""
    told = work + _WORKSPACE + 2 * k
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    value = _sums(residual, gradient, at, n)
    magnitude = value & _NO_SIGN
    hit = (at < n) & (magnitude >= low)
    place = tl.cumsum(hit.to(tl.int32), 0) - 1
    kept = hit & (place < ROOM)
    tl.store(where + block * ROOM + place, at, mask=kept)
    tl.store(what + block * ROOM + place, value, mask=kept)
    count = tl.sum(hit.to(tl.int32), 0)
    tl.store(counts + block, count)
    tl.atomic_add(told + _CANDIDATES, count, sem="relaxed")
    if count > ROOM:
        tl.atomic_max(told + _FULLEST, count, sem="relaxed")
    sampled = (at < n) & (at % stride == 0)
    one = tl.full([BLOCK], 1, tl.int32)
    tl.atomic_add(work + _SAMPLE + (magnitude >> _SHIFT), one, mask=sampled, sem="relaxed")


@triton.jit
def _candidates(counts, what, blocks, TILE: tl.constexpr, ROOM: tl.constexpr):
    """A tile of all blocks' slots: bits of magnitudes, and which slots are taken."""
    slot = tl.program_id(0) * TILE + tl.arange(0, TILE)
    block = slot // ROOM
    count = tl.load(counts + block, mask=block < blocks, other=0)
    taken = (slot % ROOM) < count
    return tl.load(what + slot, mask=taken, other=0) & _NO_SIGN, taken


@triton.jit
def _count(histogram, own, VALUES: tl.constexpr):
    value = tl.arange(0, VALUES)
    tl.atomic_add(histogram + value, own, mask=own > 0, sem="relaxed")


@triton.jit(do_not_specialize=["blocks"])
def first_digits(counts, what, blocks, work, TILE: tl.constexpr, ROOM: tl.constexpr):
    """Histogram of the candidates' first digits."""
    magnitude, taken = _candidates(counts, what, blocks, TILE, ROOM)
    own = tl.histogram(magnitude >> _SHIFT, _FIRST, mask=taken)
    _count(work + _HISTOGRAM_1, own, _FIRST)


@triton.jit(do_not_specialize=["blocks", "k"])
def second_digits(counts, what, blocks, work, k, TILE: tl.constexpr, ROOM: tl.constexpr):
    """The k-th largest candidate's first digit; second digits of those that share it."""
    histogram = tl.load(work + _HISTOGRAM_1 + tl.arange(0, _FIRST))
    first, wanted = _digit(histogram, k, _FIRST)
    if tl.program_id(0) == 0:
        tl.store(work + _DIGITS, first)
        tl.store(work + _DIGITS + 1, wanted)
    magnitude, taken = _candidates(counts, what, blocks, TILE, ROOM)
    same = taken & ((magnitude >> _SHIFT) == first)
    own = tl.histogram((magnitude >> _HALF) & (_REST - 1), _REST, mask=same)
    _count(work + _HISTOGRAM_2, own, _REST)


@triton.jit(do_not_specialize=["blocks"])
def third_digits(counts, what, blocks, work, TILE: tl.constexpr, ROOM: tl.constexpr):
    """Its second digit; third digits of those that share both."""
    first, wanted = tl.load(work + _DIGITS), tl.load(work + _DIGITS + 1)
    histogram = tl.load(work + _HISTOGRAM_2 + tl.arange(0, _REST))
    second, wanted = _digit(histogram, wanted, _REST)
    upper = (first << _HALF) + second
    if tl.program_id(0) == 0:
        tl.store(work + _DIGITS + 2, upper)
        tl.store(work + _DIGITS + 3, wanted)
    magnitude, taken = _candidates(counts, what, blocks, TILE, ROOM)
    same = taken & ((magnitude >> _HALF) == upper)
    own = tl.histogram(magnitude & (_REST - 1), _REST, mask=same)
    _count(work + _HISTOGRAM_3, own, _REST)


@triton.jit(do_not_specialize=["blocks", "larger"])
def count_taken(
    counts,
    what,
    blocks,
    work,
    larger,  # (2, blocks) int32: candidates above the threshold, and those that equal it
    ROWS: tl.constexpr,
    ROOM: tl.constexpr,
):
    """The threshold, and how many candidates of each block are above it, and equal it."""
    upper, wanted = tl.load(work + _DIGITS + 2), tl.load(work + _DIGITS + 3)
    histogram = tl.load(work + _HISTOGRAM_3 + tl.arange(0, _REST))
    third, ties = _digit(histogram, wanted, _REST)
    threshold = (upper << _HALF) + third
    if tl.program_id(0) == 0:
        tl.store(work + _DIGITS + 4, threshold)
        tl.store(work + _DIGITS + 5, ties)
    block = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    count = tl.load(counts + block, mask=block < blocks, other=0)
    slot = tl.arange(0, ROOM)
    taken = slot[None, :] < count[:, None]
    at = block[:, None] * ROOM + slot[None, :]
    magnitude = tl.load(what + at, mask=taken, other=0) & _NO_SIGN
    above = tl.sum((taken & (magnitude > threshold)).to(tl.int32), 1)
    equal = tl.sum((taken & (magnitude == threshold)).to(tl.int32), 1)
    tl.store(larger + block, above, mask=block < blocks)
    tl.store(larger + blocks + block, equal, mask=block < blocks)


@triton.jit(do_not_specialize=["blocks", "larger", "ends", "k", "stride"])
def write(
    counts,
    where,
    what,
    blocks,
    work,
    larger,
    ends,  # (2, blocks) int32, sums of ``larger`` up to each block, that one included
    k,
    stride,
    ROWS: tl.constexpr,
    ROOM: tl.constexpr,
):
    """Values and indices of the k largest, in ascending order of the indices; and what to tell."""
    threshold, ties = tl.load(work + _DIGITS + 4), tl.load(work + _DIGITS + 5)
    first = threshold >> _SHIFT
    out = work + _WORKSPACE
    told = out + 2 * k
    if tl.program_id(0) == 0:
        value = tl.arange(0, _FIRST)
        sample = tl.load(work + _SAMPLE + value)
        histogram = tl.load(work + _HISTOGRAM_1 + value)
        _tell(told, threshold, sample, histogram)
    block = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = block < blocks
    count = tl.load(counts + block, mask=inside, other=0)
    above_before = tl.load(ends + block, mask=inside, other=0)
    above_before -= tl.load(larger + block, mask=inside, other=0)
    equal_before = tl.load(ends + blocks + block, mask=inside, other=0)
    equal_before -= tl.load(larger + blocks + block, mask=inside, other=0)
    slot = tl.arange(0, ROOM)
    held = slot[None, :] < count[:, None]
    at = block[:, None] * ROOM + slot[None, :]
    value = tl.load(what + at, mask=held, other=0)
    index = tl.load(where + at, mask=held, other=0)
    magnitude = value & _NO_SIGN
    tie = held & (magnitude == threshold)
    among = equal_before[:, None] + tl.cumsum(tie.to(tl.int32), 1)
    taken = held & ((magnitude > threshold) | (tie & (among <= ties)))
    before = above_before + tl.minimum(equal_before, ties)
    place = before[:, None] + tl.cumsum(taken.to(tl.int32), 1) - 1
    tl.store(out + place, value, mask=taken & (place < k))
    tl.store(out + k + place, index, mask=taken & (place < k))
    of_edge = taken & ((magnitude >> _SHIFT) == first) & (index % stride == 0)
    both = tl.sum(of_edge.to(tl.int32))
    if both > 0:
        tl.atomic_add(told + _BOTH, both, sem="relaxed")
