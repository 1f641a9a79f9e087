"""Which layers take part at all: one that never comes must not keep a share of the budget.

A frozen layer, an embedding with sparse gradients or a variable without a gradient sends nothing.
While it stays away its share is the others'; when it comes back it gets one again.
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
    """

    def __init__(self, layers: int) -> None:
        self.away = np.zeros(layers, np.int64)
        self.patience = np.full(layers, PATIENCE, np.int64)

    @property
    def live(self) -> np.ndarray:
        """(L,) bool: whether a layer has a share in the budget."""
        live: np.ndarray = self.away < self.patience
        return live

    def observe(self, present: np.ndarray) -> bool:
        """Takes note of a step.

        Args:
            present: (L,) bool: whether the layer took part on any rank.

        Returns:
            Whether ``live`` has changed.
        """
        before = self.live
        self.patience[present & ~before] *= 2
        self.away = np.where(present, 0, self.away + 1)
        return bool((self.live != before).any())

    def restore(self, away: np.ndarray, patience: np.ndarray) -> None:
        """Goes on from saved numbers."""
        self.away, self.patience = away.copy(), patience.copy()
