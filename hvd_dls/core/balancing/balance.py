"""Algorithm 2: moving the ratios until all layers share one threshold, sum of k unchanged.

The exchange between two layers is that of the paper's appendix E, made precise: counts instead of
distribution functions, and the largest *unsent* magnitude for the layer that receives (with sent
thresholds alone the exchange stalls at k = 1).
"""

from __future__ import annotations

import numpy as np

from hvd_dls.core.balancing.curves import Curves, SketchedCurves
from hvd_dls.core.balancing.ratios import apportion


def one_step_adjustment(curves: Curves, k: np.ndarray, min_k: int = 1) -> np.ndarray:
    """OneStepAdjustment: one exchange, between the layers furthest apart.

    Property 2: it at least halves the difference between those two layers' thresholds (unless a
    limit of k binds).

    Args:
        curves: of L layers.
        k: (L,) entries sent per layer, min_k <= k <= sizes.
        min_k: lower limit of k, >= 1.

    Returns:
        (L,) int64 with the same sum; equal to ``k`` when the layers are balanced already, which
        for exact curves means that ``k`` is the global top-k, up to ``min_k``.
    """
    return _adjust(curves, k, min_k, 1)


def optimal_adjustment(
    curves: Curves, k: np.ndarray, min_k: int = 1, steps: int | None = None
) -> np.ndarray:
    """OptimalAdjustment: exchanges until all thresholds are one (Property 1).

    Args:
        curves: of L layers.
        k: (L,) entries sent per layer.
        min_k: lower limit of k, >= 1.
        steps: stop after this many exchanges: the s of DLS(s); None = when balanced.

    Returns:
        (L,) int64 with the same sum.
    """
    return _adjust(curves, k, min_k, steps)


def balance_at_once(curves: SketchedCurves, k: np.ndarray, min_k: int = 1) -> np.ndarray:
    """What OptimalAdjustment converges to, solved directly for the common threshold.

    Args:
        curves: of L layers, from sketches.
        k: (L,) entries sent per layer.
        min_k: lower limit of k, >= 1.

    Returns:
        (L,) int64 with the same sum.
    """
    k = np.asarray(k, dtype=np.int64)
    total = int(k.sum())
    least = np.minimum(min_k, curves.sizes)
    return apportion(curves.at_common_threshold(total, least), total, least, curves.sizes)


def _adjust(curves: Curves, k: np.ndarray, min_k: int, steps: int | None) -> np.ndarray:
    k = np.array(k, dtype=np.int64)
    done = 0
    while steps is None or done < steps:
        sent, unsent = curves.smallest_sent(k), curves.largest_unsent(k)
        giver = int(np.argmin(np.where(k > min_k, sent, np.inf)))
        taker = int(np.argmax(np.where(k < curves.sizes, unsent, -np.inf)))
        low, high = sent[giver], unsent[taker]
        can_move = min(int(k[giver]) - min_k, int(curves.sizes[taker] - k[taker]))
        if can_move <= 0 or high <= low:
            break
        # One at least: the taker's next entry is larger than the giver's last, even where rounding
        # or interpolation puts no entry on the way to the middle.
        moved = min(max(_entries_to_move(curves, k, giver, taker, low, high), 1), can_move)
        k[giver] -= moved
        k[taker] += moved
        done += 1
    return k


def _entries_to_move(
    curves: Curves, k: np.ndarray, giver: int, taker: int, low: float, high: float
) -> int:
    """Moves the threshold with fewer entries in its way to the middle; the other falls short."""
    middle = low + (high - low) / 2  # cannot overflow
    in_givers_way = k[giver] - curves.at_least(giver, high)
    in_takers_way = curves.above(taker, low) - k[taker]
    if in_givers_way <= in_takers_way:
        return round(int(k[giver]) - curves.at_least(giver, middle))
    return round(curves.above(taker, middle) - int(k[taker]))
