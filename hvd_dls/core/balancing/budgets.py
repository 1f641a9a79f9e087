"""How many entries each bucket sends: constant most of the time, while ratios move every step.

Horovod negotiates anew whenever a payload's length changes.  Gradients of mini-batches are noisy,
and so is what one threshold would have each bucket send.  So a bucket's budget follows the mean of
the last steps, and only once that is off by more than a fifth.  Within their buckets layers move
at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hvd_dls.core.balancing.ratios import apportion

_WEIGHT = 0.1  # of the latest step in the mean
_TOLERANCE = 1 / 5  # of a budget, that the mean may be off
_NEARLY_ONE = 1 + 1e-12  # so that rounding leaves the sum no smaller: ``apportion`` is quick then


class Budgets:
    """Entries of each of B buckets, which always add up to the model's budget.

    What it does follows from what all ranks know, in whole numbers and IEEE basic operations.

    Args:
        buckets: rows of the layers of each bucket: together, each of the L layers once.
        sizes: (L,) entries of each layer.
        least: (L,) lower limits of k.
        k: (L,) entries sent in the first step.
    """

    def __init__(
        self, buckets: Sequence[np.ndarray], sizes: np.ndarray, least: np.ndarray, k: np.ndarray
    ) -> None:
        self._buckets = buckets
        self._all_sizes, self._all_least = sizes, least
        self.restart(k)

    def restart(self, k: np.ndarray, live: np.ndarray | None = None) -> None:
        """Starts from these entries of each layer; layers that are not ``live`` send nothing."""
        live = np.ones(len(self._all_sizes), bool) if live is None else live
        self._sizes = np.where(live, self._all_sizes, 0)
        self._least = np.where(live, self._all_least, 0)
        self.budgets = self._summed(k)
        self.mean = self.budgets.astype(np.float64)
        self.steps = 0

    def fit(self, wanted: np.ndarray) -> np.ndarray:
        """(L,) entries as near to the wanted ones as the buckets' budgets allow."""
        if len(self._buckets) < 2:
            return wanted
        self.steps += 1
        now = self._summed(wanted)
        weight = max(_WEIGHT, 1 / self.steps)
        self.mean += weight * (now - self.mean)
        if np.any(np.abs(self.mean - self.budgets) > _TOLERANCE * self.budgets):
            self.budgets = apportion(
                self.mean, int(now.sum()), self._summed(self._least), self._summed(self._sizes)
            )
        k = wanted.copy()
        for rows, budget, total in zip(self._buckets, self.budgets, now, strict=True):
            if budget != total:
                shares = wanted[rows] * (budget / total * _NEARLY_ONE)
                k[rows] = apportion(shares, int(budget), self._least[rows], self._sizes[rows])
        return k

    def _summed(self, values: np.ndarray) -> np.ndarray:
        return np.array([int(values[rows].sum()) for rows in self._buckets], dtype=np.int64)
