"""The ratios: all ranks' sketches in, entries per layer out, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hvd_dls.config import DLSConfig
from hvd_dls.core.balance import balance_at_once, optimal_adjustment
from hvd_dls.core.budgets import Budgets
from hvd_dls.core.curves import SketchedCurves
from hvd_dls.core.plan import Plan


class Controller:
    """Holds k of each layer and moves it after each step (Algorithm 2).

    Its state changes only through what all ranks received alike, so it is the same on all ranks.

    Args:
        plan: the layers and their budget.
        config: the options.
        k: (L,) entries per sparse layer in the first step.
        buckets: rows of the layers of each bucket; None: all are in one.

    Attributes:
        step: number of the last step that ended.
        wanted: (L,) what Algorithm 2 would send.
        k: (L,) what is sent: the same, but for the buckets' budgets.
        budgets: of the buckets.
    """

    def __init__(
        self,
        plan: Plan,
        config: DLSConfig,
        k: np.ndarray,
        buckets: Sequence[np.ndarray] | None = None,
    ) -> None:
        self.step = 0
        self.wanted = self.k = np.array(k, dtype=np.int64)
        if buckets is None:
            buckets = [np.arange(len(self.k))]
        least = np.minimum(config.min_k, plan.sizes)
        self.budgets = Budgets(buckets, plan.sizes, least, self.k)
        self._plan = plan
        self._config = config
        self._row = {layer.name: row for row, layer in enumerate(plan.sparse)}

    def state(self) -> np.ndarray:
        """All of it in whole numbers: int64; the step comes first."""
        mean = self.budgets.mean.view(np.int64)
        counts = [self.step, self.budgets.steps]
        return np.concatenate([counts, self.k, self.wanted, self.budgets.budgets, mean])

    def restore(self, state: np.ndarray) -> None:
        """Goes on from a ``state()``; from its k alone if it comes from other buckets."""
        state, layers, buckets = np.array(state, np.int64), len(self.k), len(self.budgets.budgets)
        self.step = int(state[0])
        self.k = state[2 : 2 + layers]
        self.wanted = state[2 + layers : 2 + 2 * layers]
        self.budgets.restart(self.k)
        if len(state) == 2 * (1 + layers + buckets):
            self.budgets.steps = int(state[1])
            self.budgets.budgets = state[-2 * buckets : len(state) - buckets]
            self.budgets.mean = state[len(state) - buckets :].view(np.float64)

    def k_of(self, name: str) -> int:
        """Entries the layer sends in the current step."""
        return int(self.k[self._row[name]])

    def advance(self, rows: np.ndarray, bases: np.ndarray, counts: np.ndarray) -> None:
        """Ends a step.

        Args:
            rows: (L',) ascending positions among the plan's sparse layers of those that were
                exchanged in it.  The others' wanted k stays.
            bases: (L', P) first bin of each layer's sketch on each rank.
            counts: (L', P, WINDOW) counts of these sketches.
        """
        self.step += 1
        if self._config.strategy == "layerwise" or self.step % self._config.adjust_every:
            return
        if len(rows) < 2:
            return
        curves = SketchedCurves(bases, counts, self._plan.sizes[rows])
        before, min_k, steps = self.wanted[rows], self._config.min_k, self._config.pair_steps
        self.wanted = self.wanted.copy()
        if steps is None:
            self.wanted[rows] = balance_at_once(curves, before, min_k)
        else:
            self.wanted[rows] = optimal_adjustment(curves, before, min_k, steps)
        self.k = self.budgets.fit(self.wanted)
