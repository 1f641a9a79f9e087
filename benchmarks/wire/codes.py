"""Bits that other codes need for an index, and the least that any code needs."""

from __future__ import annotations

import math

import numpy as np


def entropy_bound(n: int, k: int) -> float:
    """Computes the bits that any code needs on average: log2(binomial(n, k)) / k."""
    logs = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return logs / math.log(2) / k


def u16_blocks(n: int, k: int) -> float:
    """Computes the bits of a 16-bit offset per entry and a 32-bit count per 65,536 positions."""
    return 16 + 32 * math.ceil(n / 65_536) / k


def golomb_rice(positions: np.ndarray) -> float:
    """Computes the bits of gaps in unary above b bits and binary below, with the best b."""
    gaps = np.diff(positions, prepend=-1) - 1
    return min(b + 1 + float((gaps >> b).mean()) for b in range(33))
