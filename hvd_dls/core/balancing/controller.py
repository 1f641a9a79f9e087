"""The ratios: all ranks' sketches in, entries per layer out, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hvd_dls.config import MEASURED, DLSConfig
from hvd_dls.core.balancing.attendance import Attendance
from hvd_dls.core.balancing.balance import balance_at_once, optimal_adjustment
from hvd_dls.core.balancing.budgets import Budgets
from hvd_dls.core.balancing.curves import SketchedCurves
from hvd_dls.core.balancing.plan import Plan, shared_out
from hvd_dls.core.balancing.schedule import density_at
from hvd_dls.errors import StateMismatchError


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
        budgets: of the buckets: what those of their layers send that share the model's.
        attendance: which layers take part.
        dense_steps: steps at first that send whole gradients.
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
        sharing = [rows[np.isin(rows, plan.sharing)] for rows in buckets]
        self.budgets = Budgets(sharing, plan.sizes, least, self.k)
        self.attendance = Attendance(len(self.k))
        self._measures = config.strategy == "dls" and config.prior == MEASURED
        self.dense_steps = max(config.dense_steps, int(self._measures))
        self._plan = plan
        self._config = config
        self._row = {layer.name: row for row, layer in enumerate(plan.sparse)}

    def state(self) -> np.ndarray:
        """All of it in whole numbers: int64; the step comes first."""
        budgets = self.budgets
        return np.concatenate(
            [
                [self.step, budgets.steps],
                *(self.k, self.wanted, *self.attendance.state()),
                *(budgets.budgets, budgets.mean.view(np.int64)),
            ]
        )

    def check(self, state: np.ndarray) -> None:
        """Whether a ``state()``, sound in all else, shares out what there is to be shared out.

        Raises:
            StateMismatchError: layers send more or less than that.
        """
        step, layers = int(state[0]), len(self.k)
        k, wanted, *attendance = state[2 : 2 + 5 * layers].reshape(5, layers)
        there = Attendance(layers)
        there.restore(np.stack(attendance))
        rows, density = self._plan.sharing, self._density_of(step)
        for entries in (k, wanted):
            if (wrong := np.flatnonzero((entries > 0) & ~there.live)).size:
                name = self._plan.sparse[wrong[0]].name
                raise StateMismatchError(
                    f"layer {name!r} stayed away, but sends entries in the saved state"
                )
            expected = shared_out(self._plan, self._config, density, entries[rows], there)
            if entries[rows].sum() != expected[rows].sum():
                raise StateMismatchError(
                    f"layers send {entries[rows].sum()} entries in the saved state, expected "
                    f"{expected[rows].sum()}"
                )

    def restore(self, state: np.ndarray) -> None:
        """Goes on from a ``state()``; from its k and attendance alone if it has other buckets."""
        state, layers, buckets = np.array(state, np.int64), len(self.k), len(self.budgets.budgets)
        self.step = int(state[0])
        self.k, self.wanted, *attendance = state[2 : 2 + 5 * layers].reshape(5, layers)
        self.attendance.restore(np.stack(attendance))
        self.budgets.restart(self.k, self.attendance.live)
        of_buckets = state[2 + 5 * layers :]
        if len(of_buckets) == 2 * buckets:
            self.budgets.steps = int(state[1])
            self.budgets.budgets = of_buckets[:buckets]
            self.budgets.mean = of_buckets[buckets:].view(np.float64)

    def k_of(self, name: str) -> int:
        """Entries the layer sends in the current step."""
        return int(self.k[self._row[name]])

    @property
    def dense(self) -> bool:
        """Whether the current step sends whole gradients."""
        return self.step < self.dense_steps

    @property
    def measures_now(self) -> bool:
        """Whether the current step's whole gradients say what the next one sends."""
        return self._measures and self.step == self.dense_steps - 1

    @property
    def density(self) -> float:
        """Density of the current step, or of the first sparse one."""
        return self._density_of(self.step)

    def _density_of(self, step: int) -> float:
        return density_at(self._config, max(step - self.dense_steps, 0))

    def start_at(self, step: int) -> None:
        """Goes on behind another step than the first, with the ratios of the first."""
        self.step = step
        wanted = self.wanted[self._plan.sharing]
        self.start_from(shared_out(self._plan, self._config, self.density, wanted, self.attendance))

    def start_from(self, k: np.ndarray) -> None:
        """Takes (L,) entries for the step to come."""
        self.wanted = self.k = k
        self.budgets.restart(k, self.attendance.live)

    def advance(
        self,
        rows: np.ndarray | None = None,
        bases: np.ndarray | None = None,
        counts: np.ndarray | None = None,
    ) -> None:
        """Ends a step.

        Args:
            rows: (L',) ascending positions among the plan's sparse layers of those that some rank
                sent in it.  The others' wanted k stays.  None: nothing is to be learnt.
            bases: (L', P) first bin of each layer's sketch on each rank; None: k is not balanced,
                because each rank chooses its own.
            counts: (L', P, WINDOW) counts of these sketches.
        """
        density = self.density
        self.step += 1
        changed = self.density != density
        if rows is not None and self._observe(rows):
            changed = True
        if changed:
            wanted = self._basis()[self._plan.sharing]
            k = shared_out(self._plan, self._config, self.density, wanted, self.attendance)
            self.start_from(k)
        if rows is None or bases is None or counts is None or self._config.strategy != "dls":
            return
        sharing = np.isin(rows, self._plan.sharing)
        due = changed or not self.step % self._config.adjust_every
        if due and np.count_nonzero(sharing) > 1:
            self._balance(rows[sharing], bases[sharing], counts[sharing])

    def _observe(self, rows: np.ndarray) -> bool:
        """Whether the layers that have a share are others now."""
        if self.density >= 1 and self.attendance.live.all():
            return False  # the others send all they have: a share would be of no use to them
        present = np.zeros(len(self.k), bool)
        present[rows] = True
        return self.attendance.observe(present)

    def _basis(self) -> np.ndarray:
        """(L,) what layers should send, in proportion; from the density, if they come back."""
        if self._config.strategy != "dls":
            return self._plan.sizes.astype(np.float64)
        return np.where(self.wanted > 0, self.wanted, self.density * self._plan.sizes)

    def _balance(self, rows: np.ndarray, bases: np.ndarray, counts: np.ndarray) -> None:
        curves = SketchedCurves(bases, counts, self._plan.sizes[rows])
        before, min_k, steps = self.wanted[rows], self._config.min_k, self._config.pair_steps
        self.wanted = self.wanted.copy()
        if steps is None:
            self.wanted[rows] = balance_at_once(curves, before, min_k)
        else:
            self.wanted[rows] = optimal_adjustment(curves, before, min_k, steps)
        self.k = self.budgets.fit(self.wanted)
