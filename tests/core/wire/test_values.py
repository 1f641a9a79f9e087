"""Sixteen bits a value, with nothing lost; sixteen bits a count, with little."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hvd_dls.core.wire.values import decode_counts, decode_values, encode_counts, round_values
from tests.core.strategies import seeds

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
MAX, TINY = float(np.finfo(np.float32).max), float(np.finfo(np.float32).smallest_subnormal)


def parts(values, kind, starts=None):
    """What is sent, as the receiver reads it, and what is kept."""
    rounded = round_values(values, kind, starts)
    starts = np.array([0, len(values)]) if starts is None else starts
    assert rounded.sent.dtype == np.uint16
    assert rounded.exponents.dtype == np.int8
    assert rounded.kept.dtype == np.float32
    decoded = decode_values(rounded.sent, kind, rounded.exponents, starts)
    assert decoded.dtype == np.float32
    return decoded, rounded.kept


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@given(values=hnp.arrays(np.float32, st.integers(0, 20), elements=finite))
@example(values=np.array([MAX, -MAX, TINY, -TINY, 0, 1], np.float32))
@example(values=np.array([TINY], np.float32))
@example(values=np.array([-MAX], np.float32))
@example(values=np.array([0.0, -0.0], np.float32))
@example(values=np.array([2**-126, 3 * TINY, 2**-126 + TINY], np.float32))
def test_what_is_sent_and_what_is_kept_are_the_value_exactly(kind, values):
    decoded, kept = parts(values, kind)
    assert np.isfinite(decoded).all()
    assert np.array_equal(decoded + kept, values)
    assert np.array_equal(decoded.astype(float) + kept, values.astype(float))


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@given(bits=hnp.arrays(np.uint32, 200), cuts=st.lists(st.integers(0, 200), max_size=6))
def test_any_bits_of_any_layers_are_conserved(kind, bits, cuts):
    values = bits.view(np.float32)
    values[~np.isfinite(values)] = 0
    decoded, kept = parts(values, kind, np.array([0, *sorted(cuts), 200]))
    assert np.array_equal(decoded.astype(float) + kept, values.astype(float))


@pytest.mark.parametrize(("kind", "error"), [("float16", 2**-11), ("bfloat16", 2**-8)])
@given(seed=seeds, octave=st.integers(-110, 110))
def test_rounding_is_to_nearest(kind, error, seed, octave):
    draws = np.random.default_rng(seed).standard_normal(100).clip(-4, 4)
    values = np.ldexp(np.where(np.abs(draws) < 2**-12, 1, draws), octave).astype(np.float32)
    decoded, _ = parts(values, kind)
    assert (np.abs(decoded - values) <= error * np.abs(values)).all()


@pytest.mark.parametrize(("kind", "bits"), [("float16", 10), ("bfloat16", 7)])
@pytest.mark.parametrize("octave", [-20, 0, 20])
def test_ties_go_to_even(kind, bits, octave):
    step = 2.0**-bits
    values = np.array([1 + step / 2, 1 + step * 3 / 2, -1 - step / 2, 1 + step * 0.51], np.float32)
    decoded, _ = parts(np.ldexp(values, octave), kind)
    assert np.ldexp(decoded, -octave).tolist() == [1, 1 + 2 * step, -1, 1 + step]


def test_bfloat16_is_the_upper_half_of_float32():
    values = np.array([1.0, -2.5, 3.140625, 2.0**-133], np.float32)
    rounded = round_values(values, "bfloat16")
    assert np.array_equal(rounded.sent, values.view(np.uint32) >> 16)
    assert not rounded.kept.any()


def test_float16_is_scaled_by_layer_so_that_its_largest_fits():
    values = np.array([1e30, 1e28, 1e-30, 3e-31, 0], np.float32)
    starts = np.array([0, 2, 2, 4, 5])
    rounded = round_values(values, "float16", starts)
    # A layer without entries and one of zeros keep their scale.
    assert rounded.exponents.tolist() == [99 - 14, 0, -100 - 14, 0]
    decoded = decode_values(rounded.sent, "float16", rounded.exponents, starts)
    assert decoded == pytest.approx(values, rel=2**-11)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_what_would_round_to_infinity_is_rounded_down(kind):
    values = np.array([MAX, -MAX, 2.0**127], np.float32)
    decoded, kept = parts(values, kind)
    assert decoded[0] == -decoded[1] == 2.0**128 - 2.0 ** (117 if kind == "float16" else 120)
    assert decoded[2] == 2.0**127
    assert np.array_equal(kept, values - decoded)


@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_whole_values_travel_as_they_are(kind):
    values = np.random.default_rng(0).standard_normal(10).astype(kind)
    sent, exponents, kept = round_values(values, kind)
    assert sent is values
    assert kept is None
    assert decode_values(sent, kind, exponents, np.array([0, 10])) is sent


# Counts -----------------------------------------------------------------------------------------


def test_small_counts_are_exact():
    counts = np.arange(4097)
    assert np.array_equal(decode_counts(encode_counts(counts)), counts)


@given(hnp.arrays(np.int64, 50, elements=st.integers(0, 2**42 - 2**31)))
def test_large_counts_are_rounded_to_nearest(counts):
    decoded = decode_counts(encode_counts(counts))
    assert (np.abs(decoded - counts) <= 2.0**-12 * counts).all()


@pytest.mark.parametrize("dtype", [np.uint32, np.int64, np.float64])
def test_counts_of_any_type_give_the_same(dtype):
    counts = np.array([0, 1, 2047, 2048, 4095, 4097, 4098, 4099, 2**32 - 1])
    decoded = decode_counts(encode_counts(counts.astype(dtype)))
    assert decoded.tolist() == [0, 1, 2047, 2048, 4095, 4096, 4098, 4100, 2**32]


def test_a_count_beyond_all_bounds_is_the_largest():
    assert decode_counts(encode_counts(np.array([2**50]))) == 4095 << 30


def test_every_code_is_a_count_of_its_own_in_order():
    codes = np.arange(1 << 16, dtype=np.uint16)
    counts = decode_counts(codes)
    assert (np.diff(counts) > 0).all()
    assert np.array_equal(encode_counts(counts), codes)
    assert np.array_equal(counts, counts.astype(float).astype(np.int64))
