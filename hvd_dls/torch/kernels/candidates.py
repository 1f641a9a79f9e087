# mypy: allow-untyped-defs, no-check-untyped-defs
"""The pass over a layer: which entries of residual + gradient reach a bound, in ascending order.

In two ways, with the same result.  ``by_scan`` counts through each block to know where its
candidates go; that keeps the threads of a program waiting for each other more than for memory.
``by_words`` only marks them in the pass, a bit an entry, which no thread needs another block's
count for, and looks for the marks afterwards, in 1/32 of the memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

BITS = 32  # entries of a word

_NO_SIGN, _BITS = tl.constexpr(0x7FFFFFFF), tl.constexpr(BITS)
_EXPONENT, _BIAS = tl.constexpr(23), tl.constexpr(127)  # of a float32


@triton.jit
def sums(residual, gradient, at, inside):
    """Bits of the sums at some indices, as int32; those of 0 where not inside."""
    old = tl.load(residual + at, mask=inside, other=0.0)
    new = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    return (old + new).to(tl.int32, bitcast=True)


@triton.jit
def by_scan(
    residual, gradient, n, low, begin, end, room, where, what,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes a program's candidates, as many as there is room for.

    Args:
        residual: (n,) float32.
        gradient: (n,) float32, float16 or bfloat16.
        n: entries of the layer.
        low: bits of the bound.
        begin: the program's first block.
        end: the first block after it.
        room: how many candidates can be written.
        where: (room,) int32, their indices.
        what: (room,) int32, bits of the sums.

    Returns:
        How many there are.
    """
    count = 0
    for block in range(begin, end):
        at = block * BLOCK + tl.arange(0, BLOCK)
        value = sums(residual, gradient, at, at < n)
        hit = (at < n) & ((value & _NO_SIGN) >= low)
        place = count + tl.cumsum(hit.to(tl.int32), 0) - 1
        tl.store(where + place, at, mask=hit & (place < room))
        tl.store(what + place, value, mask=hit & (place < room))
        count += tl.sum(hit.to(tl.int32), 0)
    return count


@triton.jit
def by_words(
    residual, gradient, n, low, begin, end, room, where, what, words,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """As ``by_scan``; ``words`` has an int32 for each 32 entries of the program's blocks."""
    row, bit = tl.arange(0, BLOCK // _BITS), tl.arange(0, _BITS)
    for block in range(begin, end):
        at = block * BLOCK + row[:, None] * _BITS + bit[None, :]
        magnitude = sums(residual, gradient, at, at < n) & _NO_SIGN
        hit = (at < n) & (magnitude >= low)
        word = tl.sum(tl.where(hit, 1 << bit[None, :], 0), 1)
        tl.store(words + (block - begin) * (BLOCK // _BITS) + row, word)
    tl.debug_barrier()  # words are read by other threads than wrote them

    count, length = 0, (end - begin) * (BLOCK // _BITS)
    for start in range(0, length, TILE):
        own = start + tl.arange(0, TILE)
        word = tl.load(words + own, mask=own < length, other=0)
        held = ones(word)
        place = count + tl.cumsum(held, 0) - held
        at = begin * BLOCK + own * _BITS
        for _ in range(tl.max(held, 0)):
            tl.store(where + place, at + lowest(word), mask=(word != 0) & (place < room))
            word = word & (word - 1)
            place += 1
        count += tl.sum(held, 0)
    tl.debug_barrier()

    for start in range(0, tl.minimum(count, room), TILE):
        own = start + tl.arange(0, TILE)
        inside = own < tl.minimum(count, room)
        at = tl.load(where + own, mask=inside, other=0)
        tl.store(what + own, sums(residual, gradient, at, inside), mask=inside)
    return count


@triton.jit
def ones(word):
    """How many bits of each int32 are set."""
    rest = word.to(tl.uint32, bitcast=True)
    rest = rest - ((rest >> 1) & 0x55555555)
    rest = (rest & 0x33333333) + ((rest >> 2) & 0x33333333)
    rest = (rest + (rest >> 4)) & 0x0F0F0F0F
    rest += rest >> 8
    return ((rest + (rest >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def lowest(word):
    """The place of the lowest bit that is set in each int32; anything where none is."""
    alone = (word & -word).to(tl.uint32, bitcast=True).to(tl.float32)  # exact: a power of two
    return (alone.to(tl.int32, bitcast=True) >> _EXPONENT) - _BIAS
