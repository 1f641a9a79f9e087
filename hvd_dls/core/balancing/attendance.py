"""Which layers take part at all: one that never comes must not keep a share of the budget.

A frozen layer, an embedding with sparse gradients or a variable without a gradient sends nothing.
One that never came counts as if it were not compressed at all.  One that stays away leaves its
share to the others until it comes back.
"""

from __future__ import annotations

import numpy as np

PATIENCE = 10  # steps that a layer may stay away before its share is given to the others


class Attendance:
    """In how many steps in a row each of L layers has been away, on all ranks.

    It changes only through what all ranks received alike, so it is the same on all of them.

    A layer that takes part in every n-th step only (of two models that train in turns) must not
    lose its share each time: whenever one comes back, its patience doubles.

    Args:
        layers: their number, L.

    Attributes:
        away: (L,) int64, steps in a row without the layer.
        patience: (L,) int64, so many of them are borne.
        seen: (L,) bool, whether the layer has ever taken part.
    """

    def __init__(self, layers: int) -> None:
        self.away = np.zeros(layers, np.int64)
        self.patience = np.full(layers, PATIENCE, np.int64)
        self.seen = np.zeros(layers, bool)

    @property
    def live(self) -> np.ndarray:
        """(L,) bool: whether a layer has a share in the budget."""
        live: np.ndarray = self.away < self.patience
        return live

    @property
    def counted(self) -> np.ndarray:
        """(L,) bool: whether a layer's entries count for the budget."""
        counted: np.ndarray = self.seen | self.live
        return counted

    def observe(self, present: np.ndarray) -> bool:
        """Takes note of a step.

        Args:
            present: (L,) bool: whether the layer took part on any rank.

        Returns:
            Whether ``live`` has changed.
        """
        before = self.live
        self.patience[present & ~before] *= 2
        self.seen |= present
        self.away = np.where(present, 0, self.away + 1)
        return bool((self.live != before).any())

    def state(self) -> np.ndarray:
        """(3, L) int64: all of it."""
        return np.stack([self.away, self.patience, self.seen.astype(np.int64)])

    def restore(self, state: np.ndarray) -> None:
        """Goes on from a ``state()``."""
        self.away, self.patience, seen = np.array(state, np.int64)
        self.seen = seen.astype(bool)
