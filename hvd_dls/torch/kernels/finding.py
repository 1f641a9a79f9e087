# mypy: allow-untyped-defs, no-check-untyped-defs
"""Finding the k largest of residual + gradient on a GPU: the kernel.

The core's algorithm (``core/selection/find_loops.py``): one pass adds, compares with a bound that
is a little below the last threshold, and keeps the few entries that reach it, the candidates
(``candidates``: of one layer as it ran on a GPU, of many the way that has yet to).  The
k-th largest of these is found digit by digit, by histograms.  Everything is exact, and ties go to
the lower index, so the result has the same bits as the core's.  Magnitudes are compared as
integers: the bits without the sign, where Inf and NaN are larger than all numbers.

All of it is one launch, of one layer or of many, since launches take the host longer than a GPU
takes for most layers.  A layer is divided into parts of adjacent entries, a program each; what
programs tell each other (histograms and how much each one writes) they add up in memory, and then
wait for each other.  So all must run at the same time: the launch is a cooperative one.

No shape and no launch depends on data.  What can go wrong is counted and told to the host: fewer
than k candidates (the bound was too high), or more in a part than there is room for.
"""

from __future__ import annotations

from enum import IntEnum

import triton
import triton.language as tl

from hvd_dls.core.balancing.sketch import BELOW, LAST_BASE, MANTISSA_SHIFT, WINDOW
from hvd_dls.torch.kernels.candidates import BITS, by_scan, by_words, sums

UNFINITE = 2040  # bins from here on are those of Inf and NaN
DIGITS, VALUES = 4, 256  # digits of a magnitude, and their values

# Where in ``out``, behind k values and k indices, the host is told what.
THRESHOLD, CANDIDATES, FULLEST, NOT_FINITE, BOTH, SAMPLED = 0, 1, 2, 3, 4, 8
SENT = SAMPLED + WINDOW
TOLD = SENT + WINDOW
WIDE = 64  # the next power of two above WINDOW

# What programs share, in their workspace: how many have come to a point where they wait for each
# other, histograms of each digit, and of each program how many candidates are above the threshold
# and equal to it.  ``out`` follows.
MET = 0
HISTOGRAMS = 16
SHARES = HISTOGRAMS + DIGITS * VALUES
PROGRAMS = 1024  # at most
WORKSPACE = SHARES + 2 * PROGRAMS


class Field(IntEnum):
    """What ``find_all`` is told of a layer."""

    RESIDUAL = 0  # address
    GRADIENT = 1  # address
    N = 2
    K = 3
    LOW = 4  # as for ``find``, and the next three
    STRIDE = 5
    EACH = 6
    ROOM = 7
    PLACE = 8  # where its candidates have their places
    MARKS = 9  # where its words are
    WORK = 10  # where its workspace is
    OUT = 11  # where what is told of it is
    FIRST = 12  # of its programs
    COUNT = 13  # of these


_FIELDS = tl.constexpr(len(Field))
_RESIDUAL, _GRADIENT = tl.constexpr(int(Field.RESIDUAL)), tl.constexpr(int(Field.GRADIENT))
_N, _K, _LOW = tl.constexpr(int(Field.N)), tl.constexpr(int(Field.K)), tl.constexpr(int(Field.LOW))
_STRIDE, _EACH = tl.constexpr(int(Field.STRIDE)), tl.constexpr(int(Field.EACH))
_ROOM, _PLACE = tl.constexpr(int(Field.ROOM)), tl.constexpr(int(Field.PLACE))
_MARKS = tl.constexpr(int(Field.MARKS))
_WORK, _OUT = tl.constexpr(int(Field.WORK)), tl.constexpr(int(Field.OUT))
_FIRST, _COUNT = tl.constexpr(int(Field.FIRST)), tl.constexpr(int(Field.COUNT))
_DIGITS, _VALUES, _WIDE = tl.constexpr(DIGITS), tl.constexpr(VALUES), tl.constexpr(WIDE)
_SHIFT, _UNFINITE = tl.constexpr(MANTISSA_SHIFT), tl.constexpr(UNFINITE)
_NO_SIGN, _BITS = tl.constexpr(0x7FFFFFFF), tl.constexpr(BITS)
_BELOW, _LAST_BASE, _WINDOW = tl.constexpr(BELOW), tl.constexpr(LAST_BASE), tl.constexpr(WINDOW)
_THRESHOLD, _CANDIDATES = tl.constexpr(THRESHOLD), tl.constexpr(CANDIDATES)
_FULLEST, _NOT_FINITE, _BOTH = tl.constexpr(FULLEST), tl.constexpr(NOT_FINITE), tl.constexpr(BOTH)
_SAMPLED, _SENT = tl.constexpr(SAMPLED), tl.constexpr(SENT)
_MET, _HISTOGRAMS, _SHARES = tl.constexpr(MET), tl.constexpr(HISTOGRAMS), tl.constexpr(SHARES)
_PROGRAMS, _WORKSPACE = tl.constexpr(PROGRAMS), tl.constexpr(WORKSPACE)


@triton.jit
def _meet(met, all_of_them):
    """Waits until all of a layer's programs have come here, which so many then have in all.

    What they wrote before can be read then.
    """
    tl.debug_barrier()
    tl.atomic_add(met, 1, sem="acq_rel")
    while tl.atomic_add(met, 0, sem="acq_rel") < all_of_them:
        pass
    tl.debug_barrier()


@triton.jit
def _shared_histogram(shared, own, SIZE: tl.constexpr):
    value = tl.arange(0, SIZE)
    tl.atomic_add(shared + value, own, mask=own > 0, sem="relaxed")


@triton.jit
def _digit(histogram, wanted):
    """The digit of the ``wanted``-th largest, and how many are wanted of those that have it."""
    value = tl.arange(0, _VALUES)
    reached = tl.sum(histogram, 0) - tl.cumsum(histogram, 0) + histogram  # by so many, each value
    digit = tl.maximum(tl.sum((reached >= wanted).to(tl.int32), 0) - 1, 0)
    return digit, wanted - tl.sum(tl.where(value == digit + 1, reached, 0), 0)


@triton.jit
def _find(
    residual, gradient, n, k, low, stride, each, room, where, what, words, work, out,
    program, programs, WORDS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What one of a layer's programs does: see ``find``."""
    told = out + 2 * k
    where += program * room
    what += program * room

    # The pass over the layer: this program's candidates, in ascending order.
    begin, end = program * each, tl.minimum((program + 1) * each, tl.cdiv(n, BLOCK))
    if WORDS:
        words += begin * (BLOCK // _BITS)
        count = by_words(
            residual, gradient, n, low, begin, end, room, where, what, words, BLOCK, TILE
        )
    else:
        count = by_scan(residual, gradient, n, low, begin, end, room, where, what, BLOCK)
    tl.atomic_add(told + _CANDIDATES, count, sem="relaxed")
    tl.atomic_max(told + _FULLEST, count, sem="relaxed")
    held = tl.minimum(count, room)
    tl.debug_barrier()  # candidates are read by other threads than wrote them

    # The threshold: the k-th largest of all programs' candidates.
    threshold, ties, known = 0, k, 31
    for digit in range(_DIGITS):
        lower = tl.maximum(known - 8, 0)
        histogram = tl.zeros([_VALUES], tl.int32)
        for start in range(0, held, TILE):
            at = start + tl.arange(0, TILE)
            magnitude = tl.load(what + at, mask=at < held, other=0) & _NO_SIGN
            same = (at < held) & ((magnitude >> known) == threshold)
            of_this = ((magnitude - (threshold << known)) >> lower) & (_VALUES - 1)
            histogram += tl.histogram(of_this, _VALUES, mask=same)
        shared = work + _HISTOGRAMS + digit * _VALUES
        _shared_histogram(shared, histogram, _VALUES)
        _meet(work + _MET, programs * (digit + 1))
        histogram = tl.load(shared + tl.arange(0, _VALUES), cache_modifier=".cg")
        found, ties = _digit(histogram, ties)
        threshold = (threshold << (known - lower)) + found
        known = lower
    edge = threshold >> _SHIFT
    base = tl.minimum(tl.maximum(edge - _BELOW, 0), _LAST_BASE)

    # Where this program writes: behind those before it.
    above, equal = 0, 0
    for start in range(0, held, TILE):
        at = start + tl.arange(0, TILE)
        magnitude = tl.load(what + at, mask=at < held, other=0) & _NO_SIGN
        above += tl.sum(((at < held) & (magnitude > threshold)).to(tl.int32), 0)
        equal += tl.sum(((at < held) & (magnitude == threshold)).to(tl.int32), 0)
    tl.store(work + _SHARES + program, above)
    tl.store(work + _SHARES + _PROGRAMS + program, equal)
    _meet(work + _MET, programs * (_DIGITS + 1))
    other = tl.arange(0, _PROGRAMS)
    shares = work + _SHARES + other
    above = tl.sum(tl.load(shares, mask=other < program, other=0, cache_modifier=".cg"), 0)
    shares += _PROGRAMS
    equal = tl.sum(tl.load(shares, mask=other < program, other=0, cache_modifier=".cg"), 0)

    written, both, unfinite = above + tl.minimum(equal, ties), 0, 0
    sent = tl.zeros([_WIDE], tl.int32)
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
        of_window = tl.where(taken, tl.minimum(bins - base, _WINDOW - 1), 0)
        sent += tl.histogram(of_window, _WIDE, mask=taken)

    # The sketch: what is sent, and a sample of all.
    sample = tl.zeros([_WIDE], tl.int32)
    step = programs * BLOCK
    for start in range(program * BLOCK, tl.cdiv(n, stride), step):
        at = (start + tl.arange(0, BLOCK)) * stride
        bins = (sums(residual, gradient, at, at < n) & _NO_SIGN) >> _SHIFT
        sampled = (at < n) & (bins >= base) & (bins <= edge)
        sample += tl.histogram(tl.where(sampled, bins - base, 0), _WIDE, mask=sampled)
    _shared_histogram(told + _SAMPLED, sample, _WIDE)
    _shared_histogram(told + _SENT, sent, _WIDE)
    tl.atomic_add(told + _BOTH, both, sem="relaxed")
    tl.atomic_add(told + _NOT_FINITE, unfinite, sem="relaxed")
    if program == 0:
        tl.store(told + _THRESHOLD, threshold)


@triton.jit(do_not_specialize=["k", "low", "stride", "room", "each"])
def find(
    residual,  # (n,) float32
    gradient,  # (n,) float32, float16 or bfloat16
    n,
    k,
    low,  # bits of the bound
    stride,  # of the sample
    each,  # blocks of a program
    room,  # candidates of a program
    where,  # (programs, room) int32, their indices
    what,  # (programs, room) int32, bits of their values
    work,  # (WORKSPACE + 2 * k + TOLD,) int32, zeros
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Writes values and indices of the k largest, ascending, and what the host is told."""
    _find(
        residual, gradient, n, k, low, stride, each, room, where, what, where, work,
        work + _WORKSPACE, tl.program_id(0), tl.num_programs(0), False, BLOCK, TILE,
    )  # fmt: skip


@triton.jit
def find_all(
    table,  # (layers, FIELDS) int64: see ``Field``
    layer_of,  # (programs,) int64: which layer a program works on
    where,  # int32, all layers' candidates, as for ``find``
    what,
    words,  # int32: a bit for each entry of all layers' blocks
    work,  # int32, zeros: all layers' workspaces, then what is told of all layers
    KIND: tl.constexpr,  # type of all gradients
    ALIGNED: tl.constexpr,  # whether all arrays begin at 16 bytes, and have 16 * m entries
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """As ``find``, of several layers, each with programs of its own, which only wait for these."""
    row = table + tl.load(layer_of + tl.program_id(0)) * _FIELDS
    residual = tl.load(row + _RESIDUAL).to(tl.pointer_type(tl.float32))
    gradient = tl.load(row + _GRADIENT).to(tl.pointer_type(KIND))
    n = tl.load(row + _N).to(tl.int32)
    if ALIGNED:
        residual, gradient = tl.multiple_of(residual, 16), tl.multiple_of(gradient, 16)
        n = tl.multiple_of(n, 16)
    k, low = tl.load(row + _K).to(tl.int32), tl.load(row + _LOW).to(tl.int32)
    stride, each = tl.load(row + _STRIDE).to(tl.int32), tl.load(row + _EACH).to(tl.int32)
    room, place = tl.load(row + _ROOM).to(tl.int32), tl.load(row + _PLACE)
    program = tl.program_id(0) - tl.load(row + _FIRST).to(tl.int32)
    programs = tl.load(row + _COUNT).to(tl.int32)
    _find(
        residual, gradient, n, k, low, stride, each, room, where + place, what + place,
        words + tl.load(row + _MARKS), work + tl.load(row + _WORK), work + tl.load(row + _OUT),
        program, programs, True, BLOCK, TILE,
    )  # fmt: skip
