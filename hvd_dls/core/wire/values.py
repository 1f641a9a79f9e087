"""Numbers on their way: gradient values in 16 bits, if so chosen, and a sketch's counts.

Values are rounded to the nearest, and what rounding leaves is kept: what is sent and what is kept
together are the value, exactly.  Float16 reaches from 2**-24 to 65,504 only, so each segment (a
layer's entries) gets a power of two as scale, with which its largest magnitude just fits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

WIRE_DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
    "float16": np.dtype("<u2"),
    "bfloat16": np.dtype("<u2"),
}

_LARGEST = 15  # scaled magnitudes stay below 2**15: half of what float16 holds, room to round up
_EXPONENTS = (-126, 113)  # those that scale the smallest and the largest float32; both normal

_COUNT_BITS = 11  # of a count's mantissa
_COUNT_SHIFT = 52 - _COUNT_BITS  # of float64's mantissa are dropped
_COUNT_BIAS = (1023 + _COUNT_BITS - 1) << _COUNT_BITS


class Rounded(NamedTuple):
    """Values as they travel, and what that leaves.

    ``decode_values(sent, kind, exponents, starts) + kept`` are the values, exactly.
    """

    sent: np.ndarray  # (K,) of WIRE_DTYPES[kind]
    exponents: np.ndarray  # (S,) int8, of each segment's scale; zeros but for float16
    kept: np.ndarray | None  # (K,) float32; None: nothing, these values travel as they are


def round_values(values: np.ndarray, kind: str, starts: np.ndarray | None = None) -> Rounded:
    """Rounds values to what travels: to nearest, ties to even.

    A magnitude that would round beyond float32 (the upper half of its last 16-bit step) is rounded
    down instead.

    Args:
        values: (K,) finite; float64 for kind "float64", else float32.
        kind: one of WIRE_DTYPES.
        starts: (S + 1,) where each segment begins, the last one K; None: all are one.
    """
    starts = np.array([0, len(values)]) if starts is None else starts
    exponents = np.zeros(len(starts) - 1, np.int8)
    if kind in ("float32", "float64"):
        return Rounded(values, exponents, None)
    if kind == "bfloat16":
        bits = values.view(np.uint32)
        sent = ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype(np.uint16)
    else:
        exponents = _exponents(values, starts)
        with np.errstate(under="ignore"):
            scaled = values * _scales(-exponents, starts)
            sent = scaled.astype(np.float16).view(np.uint16)
    decoded = decode_values(sent, kind, exponents, starts)
    beyond = np.isinf(decoded)
    if beyond.any():
        sent[beyond] -= 1
        decoded = decode_values(sent, kind, exponents, starts)
    return Rounded(sent, exponents, np.subtract(values, decoded, out=decoded))


def decode_values(
    sent: np.ndarray, kind: str, exponents: np.ndarray, starts: np.ndarray
) -> np.ndarray:
    """Values from what travelled; see ``Rounded``.

    Returns:
        (K,) float32, or ``sent`` itself for kinds "float32" and "float64".
    """
    if kind in ("float32", "float64"):
        return sent
    if kind == "bfloat16":
        return (sent.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # in a damaged payload: the caller looks
        values = sent.view(np.float16).astype(np.float32)
        values *= _scales(exponents, starts)
    return values


def _exponents(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """(S,) int8: two to this power, times less than 2**15, reaches each segment's largest."""
    largest = np.zeros(len(starts) - 1, np.float32)
    filled = starts[1:] > starts[:-1]
    if len(values):
        largest[filled] = np.maximum.reduceat(np.abs(values), starts[:-1][filled])
    exponents = np.frexp(largest)[1] - _LARGEST
    return np.where(largest > 0, np.clip(exponents, *_EXPONENTS), 0).astype(np.int8)


def _scales(exponents: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Two to the power of each entry's exponent: (K,), or (1,) if all are one segment."""
    scales = np.ldexp(np.float32(1), exponents)
    return scales if len(scales) == 1 else np.repeat(scales, np.diff(starts))


# A count as a number of 16 bits: an exponent e of 5 and a mantissa m of 11, read as m if e is 0 and
# as (2**11 + m) * 2**(e - 1) otherwise.


def encode_counts(counts: np.ndarray) -> np.ndarray:
    """Whole numbers from 0 to below 2**42 in 16 bits each: uint16, of the same shape.

    Below 2**11 (in fact 2**12) exact, above rounded to nearest, a relative error of at most 2**-12.
    """
    bits = counts.astype(np.float64).view(np.int64)
    even = bits >> _COUNT_SHIFT & 1
    rounded = (bits + ((1 << (_COUNT_SHIFT - 1)) - 1 + even)) >> _COUNT_SHIFT
    small = counts < 1 << _COUNT_BITS
    return np.where(small, counts, np.minimum(rounded - _COUNT_BIAS, 0xFFFF)).astype(np.uint16)


def decode_counts(codes: np.ndarray) -> np.ndarray:
    """Inverse of ``encode_counts``: int64 below 2**42, of the same shape.  Any code has a value."""
    codes = codes.astype(np.int64)
    exponent = codes >> _COUNT_BITS
    mantissa = codes & (1 << _COUNT_BITS) - 1
    normal = exponent > 0
    counts: np.ndarray = (mantissa + (normal << _COUNT_BITS)) << (exponent - normal)
    return counts
