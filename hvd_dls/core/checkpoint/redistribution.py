"""What was saved by one number of ranks, for another: what waits weighs as much as before.

What waits in residuals and velocities reaches the weights as a mean over those that hold it: ranks,
or hosts where these send as one.  So each new rank takes a weighted mean of old ranks', whose
weights are the old ranks' shares of what is now this rank's: old rank r of P stands for the
interval [r/P, (r+1)/P), and new ones likewise.  The mean of all is kept, and so is the size of each
rank's own numbers, which thresholds go by.  Where Horovod sums instead of averaging, all of it is
multiplied by P over the new number of ranks: see ``session.fitting``.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np

MOVED = "redistributed"  # key of a state that was made here
OF_ADAM = ("second_moments", "moment_weights")  # without loss scale
ARRAYS = ("residuals", "velocities", *OF_ADAM)  # in a model's state, those of Adam only with it


def shares(before: int, now: int, rank: int) -> dict[int, Fraction]:
    """Weights of the old ranks' numbers in a new rank's, by old rank; they add up to 1.

    Over all new ranks, those of each old one add up to now / before.

    Args:
        before: number of ranks that saved.
        now: number of ranks that load.
        rank: one of these.
    """
    first, last = rank * before, (rank + 1) * before  # in units of 1 / (before * now)
    weights = {}
    for old in range(first // now, -(-last // now)):
        common = min(last, (old + 1) * now) - max(first, old * now)
        weights[old] = Fraction(common, before)
    return weights


def wanted(sizes: list[int], now: int, rank: int, hosts: bool) -> list[int]:
    """The old ranks whose states ``redistributed`` needs.

    Args:
        sizes: ranks in each group that saved, each of one if every rank sent for itself.
        now: number of ranks that load.
        rank: one of these.
        hosts: whether hosts send as one now.
    """
    before = sum(sizes)
    if hosts or max(sizes) > 1:
        return list(range(before))
    return list(shares(before, now, rank))


def redistributed(
    states: Mapping[int, Mapping[str, Any]], now: int, rank: int, hosts: bool = False
) -> dict[str, Any]:
    """A model's state for one of another number of ranks.

    Where hosts send as one, then or now, who holds which layer depends on more than is known here;
    so every rank gets the same, the mean of all.

    Args:
        states: of the ``wanted`` old ranks, of one save; arrays may be missing, and count as zeros.
        now: number of ranks that load.
        rank: one of these.
        hosts: whether hosts send as one now.

    Returns:
        As if ``now`` ranks that send for themselves had saved it.
    """
    first = next(iter(states.values()))
    sizes = list(first["groups"])
    before = sum(sizes)
    if hosts or max(sizes) > 1:
        of_dense = dict.fromkeys(states, Fraction(1, before))
        of_sparse = dict.fromkeys(states, Fraction(1, len(sizes)))
    else:
        of_dense = of_sparse = shares(before, now, rank)
    sparse = {name for name, _ in first["layers"]}
    arrays = {}
    for part in ARRAYS:
        if part in first:
            names = dict.fromkeys(name for state in states.values() for name in state[part])
            arrays[part] = {
                name: _mean(states, part, name, of_sparse if name in sparse else of_dense)
                for name in names
            }
    of = first.get(MOVED, {"groups": sizes, "factor": 1.0})
    return {
        **first,
        **arrays,
        "rank": rank,
        "world_size": now,
        "groups": [1] * now,
        "config": {**first["config"], "hierarchical": False},
        "thresholds": _list_mean(states, "thresholds", of_dense),
        "norms": _list_mean(states, "norms", of_dense),
        MOVED: {"groups": of["groups"], "factor": of["factor"] * (before / now)},
    }


def _scale(states: Mapping[int, Mapping[str, Any]], rank: int) -> float:
    """What brings a rank's numbers to the first one's loss scale."""
    first = next(iter(states.values()))
    return float(first["loss_scale"]) / float(states[rank]["loss_scale"])


def _mean(
    states: Mapping[int, Mapping[str, Any]],
    part: str,
    name: str,
    weights: Mapping[int, Fraction],
) -> np.ndarray:
    """In float64, and rounded once; a single array is handed on as it is."""
    total: np.ndarray | None = None
    dtype: np.dtype[Any] = np.dtype(np.float32)
    for rank, state in states.items():
        if name not in state[part]:
            continue
        array = np.asarray(state[part][name])  # read now, if it is in a file
        weight = float(weights[rank])
        if part not in OF_ADAM:
            weight *= _scale(states, rank)
        if len(states) == 1 and weight == 1:
            return array
        dtype = array.dtype
        if total is None:
            total = np.zeros(array.shape, np.float64)
        total += array * np.float64(weight)
    assert total is not None
    return total.astype(dtype)


def _list_mean(
    states: Mapping[int, Mapping[str, Any]], part: str, weights: Mapping[int, Fraction]
) -> list[float]:
    rows = [
        float(weights[rank]) * _scale(states, rank) * np.asarray(state[part], np.float64)
        for rank, state in states.items()
    ]
    total: list[float] = np.sum(rows, axis=0).tolist()
    return total
