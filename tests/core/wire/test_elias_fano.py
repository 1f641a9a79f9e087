"""Elias–Fano: what goes in comes out, in the space promised, the same bytes from either coder."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_dls.core.jit import HAVE_NUMBA
from hvd_dls.core.wire import elias_fano
from hvd_dls.core.wire.elias_fano import GOOD, TOO_FEW, TOO_MANY, decode, encode, lengths, low_bits
from tests.core.strategies import densities, seeds

CODERS = [
    pytest.param(
        True, id="numba", marks=pytest.mark.skipif(not HAVE_NUMBA, reason="numba is not installed")
    ),
    pytest.param(False, id="numpy"),
]
BOTH = [True, False] if HAVE_NUMBA else [False]


@pytest.fixture(params=CODERS)
def coder(request, monkeypatch):
    """The test runs with the compiled loops and again without them."""
    monkeypatch.setattr(elias_fano, "HAVE_NUMBA", request.param)


def with_coder(compiled, do, *args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elias_fano, "HAVE_NUMBA", compiled)
        return do(*args)


class Numbers:
    """K numbers below n, cut into segments, and a code with room for so many."""

    def __init__(self, numbers, universe, capacity=None, cuts=()):
        self.numbers = np.asarray(numbers, dtype=np.int64)
        self.universe, self.capacity = universe, capacity or len(self.numbers)
        self.offsets = np.array([0, *sorted(cuts), universe])
        self.starts = np.searchsorted(self.numbers, self.offsets)
        owners = np.repeat(self.offsets[:-1], np.diff(self.starts))
        self.indices = (self.numbers - owners).astype(np.uint32)
        self.low = low_bits(universe, self.capacity)

    def code(self):
        lower, upper = (np.zeros(n // 8, np.uint64) for n in lengths(self.universe, self.capacity))
        assert encode(self.indices, self.starts, self.offsets, self.low, lower, upper) == GOOD
        return lower, upper

    def read(self, lower, upper):
        found = np.full(len(self.indices), 0xFFFFFFFF, np.uint32)
        return decode(lower, upper, self.starts, self.offsets, self.low, found), found


def drawn(seed, universe, density, slack=0, segments=1):
    rng = np.random.default_rng(seed)
    k = min(max(round(density * universe), 1), 50_000)
    numbers = np.unique(rng.integers(0, universe, k)) if density < 0.5 else np.arange(universe)
    if density < 1 and len(numbers) > k:
        numbers = np.sort(rng.choice(numbers, k, replace=False))
    cuts = rng.integers(0, universe + 1, segments - 1)
    return Numbers(numbers, universe, len(numbers) + slack, cuts)


sets = st.builds(
    drawn,
    seeds,
    st.sampled_from([1, 2, 63, 64, 65, 1000, 4096, 50_000]),
    densities,
    st.sampled_from([0, 1, 7, 1000]),
    st.sampled_from([1, 2, 5, 100]),
)


@given(sets)
def test_numbers_come_back_and_both_coders_write_the_same(drawn):
    codes = [with_coder(compiled, drawn.code) for compiled in BOTH]
    for lower, upper in codes:
        assert np.array_equal(lower, codes[0][0])
        assert np.array_equal(upper, codes[0][1])
        for compiled in BOTH:
            answer, found = with_coder(compiled, drawn.read, lower, upper)
            assert answer == GOOD
            assert np.array_equal(found, drawn.indices)


@pytest.mark.parametrize(
    ("numbers", "universe", "capacity"),
    [
        ([0], 1, 1),
        ([], 1, 1),
        ([], 1000, 5),
        ([0], 2**32 - 1, 1),
        ([2**32 - 2], 2**32 - 1, 1),
        ([2**32 - 3, 2**32 - 2], 2**32 - 1, 3),
        (range(1000), 1000, 1000),
        (range(1000), 1000, 3000),
        ([0, 2**31, 2**32 - 2], 2**32 - 1, 1000),
    ],
)
@pytest.mark.usefixtures("coder")
def test_the_ends_of_the_range(numbers, universe, capacity):
    whole = Numbers(numbers, universe, capacity)
    answer, found = whole.read(*whole.code())
    assert answer == GOOD
    assert np.array_equal(found, whole.indices)


def test_no_capacity_takes_no_space():
    assert lengths(1000, 0) == (0, 0)


def test_layout_is_pinned_bit_by_bit():
    """A change here needs a new VERSION of the payload."""
    # n / C = 16: four low bits of each number; of the upper ones 0, 0, 2, 5 at bits 0, 1, 4, 8.
    whole = Numbers([3, 9, 0x2A, 0x5F], 64 + 32, 6)
    assert whole.low == 4
    lower, upper = whole.code()
    assert lower.tobytes() == bytes([0x93, 0xFA, 0, 0, 0, 0, 0, 0])
    assert upper.tobytes() == bytes([0b10011, 1, 0, 0, 0, 0, 0, 0])


@given(st.integers(1, 2**32 - 1), st.integers(1, 2**32 - 1))
def test_length_is_what_elias_fano_promises(universe, capacity):
    low, (lower, upper) = low_bits(universe, capacity), lengths(universe, capacity)
    if capacity <= universe:
        assert low == math.floor(math.log2(universe / capacity))
        # 2 + log2(n / C) bits, a little more between powers of two, and words filled up.
        bound = capacity * (2 + math.log2(universe / capacity) + 0.0861) + 2 + 2 * 63
        assert 8 * (lower + upper) <= bound
    assert lower % 8 == upper % 8 == 0


@pytest.mark.parametrize(
    ("universe", "density", "most"),
    [(25_000_000, 0.01, 0.5), (25_000_000, 0.001, 0.56), (1_000_000, 0.1, 0.6), (10_000, 0.01, 2)],
)
def test_length_is_close_to_the_entropy(universe, density, most):
    k = round(universe * density)
    log_binomial = math.lgamma(universe + 1) - math.lgamma(k + 1) - math.lgamma(universe - k + 1)
    assert 8 * sum(lengths(universe, k)) / k <= log_binomial / math.log(2) / k + most


# What must not be encoded, or cannot have been -------------------------------------------------


@pytest.mark.parametrize(
    ("indices", "wrong"),
    [
        ([0, 1, 2, 3, 4], GOOD),
        ([1, 0, 2, 3, 4], 0),
        ([0, 0, 2, 3, 4], 0),
        ([0, 10, 2, 3, 4], 0),
        ([0, 1, 2, 3, 3], 1),
        ([0, 1, 2, 3, 10], 1),
        ([0, 1, 2, 3, 2**32 - 1], 1),
    ],
)
@pytest.mark.usefixtures("coder")
def test_the_first_segment_with_wrong_indices_is_named(indices, wrong):
    low, (lower, upper) = low_bits(20, 5), (np.zeros(n // 8, np.uint64) for n in lengths(20, 5))
    starts, offsets = np.array([0, 2, 5]), np.array([0, 10, 20])
    indices = np.array(indices, np.uint32)
    assert encode(indices, starts, offsets, low, lower, upper) == wrong


@pytest.mark.parametrize(
    ("bits", "answer"), [(0, TOO_FEW), (0b01, TOO_FEW), (0b1101, TOO_MANY), (0b101, GOOD)]
)
@pytest.mark.usefixtures("coder")
def test_the_number_of_ones_must_be_right(bits, answer):
    whole = Numbers([0, 1], 2)
    lower, upper = whole.code()
    upper[0] = bits
    assert whole.read(lower, upper)[0] == answer


@pytest.mark.usefixtures("coder")
def test_ones_in_a_further_word_are_too_many():
    whole = Numbers([0, 1], 1000, 900)
    lower, upper = whole.code()
    upper[-1] = 1 << 63
    assert whole.read(lower, upper)[0] == TOO_MANY


@pytest.mark.usefixtures("coder")
def test_a_number_of_another_segment_is_refused():
    whole = Numbers([3, 9, 12], 20, cuts=[10])
    lower, upper = whole.code()
    whole.offsets = np.array([0, 9, 20])
    assert whole.read(lower, upper)[0] == 0
    whole.offsets = np.array([0, 13, 20])
    assert whole.read(lower, upper)[0] == 1


@given(sets, seeds, st.integers(1, 40))
def test_any_bits_are_refused_or_read_alike_by_both(drawn, seed, flips):
    lower, upper = with_coder(False, drawn.code)
    rng = np.random.default_rng(seed)
    for _ in range(flips):
        part = upper if rng.random() < 0.5 or not len(lower) else lower
        part[rng.integers(len(part))] ^= np.uint64(1) << np.uint64(rng.integers(64))
    readings = [with_coder(compiled, drawn.read, lower, upper) for compiled in BOTH]
    assert len({answer == GOOD for answer, _ in readings}) == 1
    for answer, found in readings:
        if answer == GOOD:
            assert np.array_equal(found, readings[0][1])
            numbers = found + np.repeat(drawn.offsets[:-1], np.diff(drawn.starts))
            assert (np.diff(numbers) > 0).all()
            assert (numbers < drawn.universe).all()
