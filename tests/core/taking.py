"""What a layer would send, and its description, in the forms the core's parts hand on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hvd_dls.core.balancing.sketch import BELOW, LAST_BASE, SAMPLE, WINDOW, Sketch, bin_of
from hvd_dls.core.selection.passes import Found, find


def take(values: np.ndarray, k: int) -> tuple[Found, np.ndarray]:
    """The k largest, and what stays: zero where something was taken."""
    found = find(np.zeros_like(values), values, k)
    assert found is not None
    rest = values.copy()
    rest[found.indices] = 0
    return found, rest


def stacked(rows: Sequence[Sequence[Sketch]]) -> tuple[np.ndarray, np.ndarray]:
    """Bases (L, P) and counts (L, P, WINDOW) of rows of all ranks' sketches."""
    bases = np.array([[sketch.base for sketch in row] for row in rows])
    return bases, np.array([[sketch.counts for sketch in row] for row in rows])


def sketch(sent: np.ndarray, unsent: np.ndarray, threshold: float) -> Sketch:
    """What ``find`` should sketch, the plain way.

    Args:
        sent: (k,) values sent: all are counted.
        unsent: (n,) residual left behind, zero where an entry was sent; a strided sample of it is
            counted, each hit for as many entries as the stride is long.
        threshold: smallest magnitude sent.

    Returns:
        A sketch whose window starts two octaves below the threshold.
    """
    centre = int(bin_of(np.array([threshold]))[0])
    base = min(max(centre - BELOW, 0), LAST_BASE)
    stride = max(1, len(unsent) // SAMPLE)
    while math.gcd(stride, len(unsent)) > 1:  # never in step with kernels and channels
        stride += 1
    # What was sent is zero in ``unsent``: bin 0, which must not count again.
    sampled = bin_of(np.abs(unsent[::stride])) - max(base, 1)
    low = _histogram(sampled[sampled >= 0] + max(base, 1) - base)
    return Sketch(base, (_histogram(bin_of(np.abs(sent)) - base) + stride * low).astype(np.uint32))


def _histogram(bins: np.ndarray) -> np.ndarray:
    return np.bincount(np.clip(bins, 0, WINDOW - 1), minlength=WINDOW)
