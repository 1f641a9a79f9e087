"""Histograms of magnitudes around a layer's threshold: what ranks tell each other every step.

Bins are the upper 11 bits of a float32 magnitude (exponent and three bits of mantissa): eight bins
an octave, the same on every rank and for every layer, so that counts of different ranks add up and
curves of different layers share their edges.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

BINS_PER_OCTAVE = 8
WINDOW = 48  # bins of a sketch: six octaves
BELOW = 16  # of which two octaves lie below the threshold
SAMPLE = 1 << 16  # unsent entries looked at, at most about

N_BINS = 255 * BINS_PER_OCTAVE  # all finite float32 magnitudes
LAST_BASE = N_BINS - WINDOW
MANTISSA_SHIFT = 20  # of float32 bits: what is left of them is the bin


class Sketch(NamedTuple):
    """Counts of |a| in ``WINDOW`` bins from bin ``base`` up; the last one holds all beyond it."""

    base: int
    counts: np.ndarray  # (WINDOW,) uint32


def bin_of(magnitudes: np.ndarray) -> np.ndarray:
    """Bin number of each magnitude (float32 or float64, finite, >= 0): (n,) int64."""
    with np.errstate(over="ignore"):  # a float64 beyond float32 is infinite here: the last bin
        bits = np.asarray(magnitudes, dtype=np.float32).view(np.uint32)
    bins: np.ndarray = np.minimum(bits >> MANTISSA_SHIFT, N_BINS - 1).astype(np.int64)
    return bins


def histogram(gradient: np.ndarray) -> np.ndarray:
    """(N_BINS,) int64: how many magnitudes of a whole gradient lie in each bin."""
    return np.bincount(bin_of(np.abs(gradient)), minlength=N_BINS)


def edges(first: int, last: int) -> np.ndarray:
    """Lower edges of bins first..last-1 and the upper edge of the last: float64, exact."""
    octave, eighth = np.divmod(np.arange(first, last + 1), BINS_PER_OCTAVE)
    normal = np.ldexp(1 + eighth / BINS_PER_OCTAVE, octave - 127)
    subnormal = np.ldexp(eighth / BINS_PER_OCTAVE, -126)
    return np.where(octave > 0, normal, subnormal)
