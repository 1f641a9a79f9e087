"""The ratios: all ranks' sketches in, entries per layer out, the same on every rank."""

from __future__ import annotations

import numpy as np

from hvd_dls.config import DLSConfig
from hvd_dls.core.balance import balance_at_once, optimal_adjustment
from hvd_dls.core.curves import SketchedCurves
from hvd_dls.core.plan import Plan


class Controller:
    """Holds k of each layer and moves it after each step (Algorithm 2).

    Its state changes only through what all ranks received alike, so it is the same on all ranks.

    Args:
        plan: the layers and their budget.
        config: the options.
        k: (L,) entries per sparse layer in the first step.
    """

    def __init__(self, plan: Plan, config: DLSConfig, k: np.ndarray) -> None:
        self.step = 0
        self.k = np.array(k, dtype=np.int64)
        self._plan = plan
        self._config = config
        self._row = {layer.name: row for row, layer in enumerate(plan.sparse)}

    def k_of(self, name: str) -> int:
        """Entries the layer sends in the current step."""
        return int(self.k[self._row[name]])

    def advance(self, rows: np.ndarray, bases: np.ndarray, counts: np.ndarray) -> None:
        """Ends a step.

        Args:
            rows: (L',) ascending positions among the plan's sparse layers of those that were
                exchanged in it.  A layer that is missing keeps its k.
            bases: (L', P) first bin of each layer's sketch on each rank.
            counts: (L', P, WINDOW) counts of these sketches.
        """
        self.step += 1
        if self._config.strategy == "layerwise" or self.step % self._config.adjust_every:
            return
        if len(rows) < 2:
            return
        curves = SketchedCurves(bases, counts, self._plan.sizes[rows])
        if self._config.pair_steps is None:
            self.k[rows] = balance_at_once(curves, self.k[rows], self._config.min_k)
        else:
            self.k[rows] = optimal_adjustment(
                curves, self.k[rows], self._config.min_k, self._config.pair_steps
            )
