"""The pass over a layer in both ways: the same candidates, in ascending order."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("horovod.torch")
triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from hvd_dls.torch.kernels.candidates import BITS, by_scan, by_words, lowest, ones  # noqa: E402
from tests.torch.kernels.test_kernels import DEVICE, pytestmark, some  # noqa: E402, F401

BLOCK, TILE = 256, 32
BEGIN, END = 1, 4  # blocks of the program that is looked at
GUARD = 7  # what must stay as it is behind the room


@triton.jit
def _both(
    residual, gradient, n, low, begin, end, room, scanned, marked, words, counts,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    there = by_scan(residual, gradient, n, low, begin, end, room, scanned, scanned + room, BLOCK)
    tl.store(counts, there)
    there = by_words(
        residual, gradient, n, low, begin, end, room, marked, marked + room, words, BLOCK, TILE
    )
    tl.store(counts + 1, there)


@triton.jit
def _bits(words, many, places, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(many + at, ones(tl.load(words + at)))
    tl.store(places + at, lowest(tl.load(words + at)))


def candidates(residual, gradient, low, room):
    """Counts, indices and values that both ways write, and what stands behind them."""
    n = len(residual)
    there = [torch.from_numpy(array).to(DEVICE) for array in (residual, gradient)]
    scanned, marked = (
        torch.full((2 * room + GUARD,), -1, dtype=torch.int32, device=DEVICE) for _ in range(2)
    )
    words = torch.full((BLOCK * (END - BEGIN) // BITS + GUARD,), -1, dtype=torch.int32)
    words, counts = words.to(DEVICE), torch.zeros(2, dtype=torch.int32, device=DEVICE)
    end = min(END, triton.cdiv(n, BLOCK))
    _both[(1,)](*there, n, low, BEGIN, end, room, scanned, marked, words, counts, BLOCK, TILE)
    assert (words[-GUARD:] == -1).all()
    return counts.tolist(), scanned.cpu().numpy(), marked.cpu().numpy()


@some
@given(
    n=st.integers(BEGIN * BLOCK + 1, (END + 1) * BLOCK),
    density=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    room=st.sampled_from([1, 40, BLOCK * (END - BEGIN)]),
    low=st.sampled_from([0, 1, 0x3F800000, 0x7F7FFFFF]),
    seed=st.integers(0, 1000),
)
@example(n=END * BLOCK, density=1.0, room=BLOCK * (END - BEGIN), low=0x3F800000, seed=0)
def test_both_ways_write_what_reaches_the_bound(n, density, room, low, seed):
    rng = np.random.default_rng(seed)
    residual = np.zeros(n, np.float32)
    large = rng.random(n) < density
    residual[large] = rng.choice(np.float32([2, -2, 1, -1, np.inf, -np.nan, -3e38]), large.sum())
    gradient = np.where(large, 0, rng.choice(np.float32([0, -0.0, 0.5, 1e-45]), n))
    gradient = gradient.astype(np.float32)
    counts, scanned, marked = candidates(residual, gradient, low, room)

    bits = (residual + gradient).view(np.int32)
    own = slice(BEGIN * BLOCK, END * BLOCK)
    expected = BEGIN * BLOCK + np.flatnonzero((bits[own] & 0x7FFFFFFF) >= low)
    assert counts == [len(expected)] * 2
    written = expected[:room]
    for array in (scanned, marked):
        where, what, rest = np.split(array, [room, 2 * room])
        assert np.array_equal(where[: len(written)], written)
        assert np.array_equal(what[: len(written)], bits[written])
        assert (where[len(written) :] == -1).all()
        assert (what[len(written) :] == -1).all()
        assert (rest == -1).all()


def test_bits_of_words():
    rng = np.random.default_rng(0)
    few = [0, 1, -1, -(2**31), 2**31 - 1, -2, 0x55555555]
    words = np.array([*few, *rng.integers(-(2**31), 2**31, 1024 - len(few))], np.int32)
    there = torch.from_numpy(words).to(DEVICE)
    many, places = torch.zeros_like(there), torch.zeros_like(there)
    _bits[(1,)](there, many, places, len(words))
    text = [f"{word & 0xFFFFFFFF:032b}" for word in words.tolist()]
    assert many.tolist() == [bits.count("1") for bits in text]
    lowest_of = [31 - bits.rindex("1") for bits in text if "1" in bits]
    assert places[there != 0].tolist() == lowest_of
