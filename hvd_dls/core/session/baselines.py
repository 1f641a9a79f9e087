"""Strategies by which each rank chooses for itself what a layer sends: to compare DLS with.

Ranks need not agree on k then, so their payloads differ in length and tell it themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from hvd_dls.config import DLSConfig
from hvd_dls.core.balancing.attendance import Attendance
from hvd_dls.core.balancing.plan import Plan, shared_out
from hvd_dls.core.balancing.schedule import density_at
from hvd_dls.core.selection.norms import l2_norm
from hvd_dls.core.selection.passes_numpy import widened

BASELINES = ("global", "norm", "hard")
_BLOCK = 1 << 16  # entries worked on at once


class BaselineStrategy:
    """How many entries each layer sends, by this rank alone.

    Layers with a density of their own send what that says.

    Args:
        plan: the layers and their budget.
        config: the options; the strategy is one of BASELINES.

    Attributes:
        needs_all: whether all layers must be there before any is chosen from.
        norms: of each layer, by name, as "norm" saw them last.
    """

    def __init__(self, plan: Plan, config: DLSConfig) -> None:
        self.needs_all = config.strategy == "global"
        self._plan, self._config = plan, config
        self._names = [layer.name for layer in plan.sparse]
        self._sharing = {self._names[row] for row in plan.sharing}
        # Before a gradient was seen: as if all entries were alike.
        self.norms = dict(zip(self._names, np.sqrt(plan.sizes).tolist(), strict=True))
        self.start_step(density_at(config, 0))

    def start_step(self, density: float, attendance: Attendance | None = None) -> None:
        """Takes the density of the step to come, and which layers take part."""
        self._budget = self._plan.budget(density, attendance)
        # DEFT's rule (arXiv:2307.03500): in proportion to the norm that the last step left.
        norms = np.array([self.norms[self._names[row]] for row in self._plan.sharing])
        k = shared_out(self._plan, self._config, density, norms, attendance)
        self._k: dict[str, int] = dict(zip(self._names, k.tolist(), strict=True))

    def scale(self, factor: float) -> None:
        """Has ``norms`` follow the loss scale, which not all layers may see in the next step."""
        self.norms = {name: factor * norm for name, norm in self.norms.items()}

    def k_of(self, name: str, residual: np.ndarray, gradient: np.ndarray, loss_scale: float) -> int:
        """Entries that a layer sends, by the strategies "norm" and "hard"."""
        threshold = self._config.threshold
        if threshold is None or name not in self._sharing:
            return self._k[name]
        return count_reaching(residual, gradient, threshold * loss_scale)

    def k_together(
        self, residuals: Mapping[str, np.ndarray], gradients: Mapping[str, np.ndarray]
    ) -> dict[str, int]:
        """Entries that each layer in ``gradients`` sends, by the strategy "global"."""
        names = [name for name in self._names if name in gradients and name in self._sharing]
        chosen = global_k(
            [residuals[name] for name in names],
            [gradients[name] for name in names],
            self._budget,
        )
        return {name: self._k[name] for name in gradients} | dict(zip(names, chosen, strict=True))

    def take_note(self, name: str, residual: np.ndarray, sent: np.ndarray) -> None:
        """Looks at what a step leaves, and what it sent."""
        if self._config.strategy == "norm":
            self.norms[name] = math.hypot(l2_norm(residual), l2_norm(sent))


def global_k(residuals: Sequence[np.ndarray], gradients: Sequence[np.ndarray], k: int) -> list[int]:
    """How many of the k largest entries of all layers lie in each: the exact global top-k.

    Ties go to the first layers.  Layers that are not finite get one entry, for ``find`` to tell.

    Args:
        residuals: L arrays (n_l,).
        gradients: L arrays (n_l,).
        k: of all layers together; all entries if there are no more.
    """
    with np.errstate(all="ignore"):
        pairs = zip(residuals, gradients, strict=True)
        magnitudes = [np.abs(residual + widened(gradient)) for residual, gradient in pairs]
    if not all(np.isfinite(values).all() for values in magnitudes):
        return [1] * len(magnitudes)
    everything = np.concatenate(magnitudes) if magnitudes else np.empty(0)
    k = min(k, len(everything))
    if not k:
        return [0] * len(magnitudes)
    everything.partition(len(everything) - k)
    threshold = everything[len(everything) - k]
    chosen = [int(np.count_nonzero(values > threshold)) for values in magnitudes]
    left = k - sum(chosen)
    for layer, values in enumerate(magnitudes):
        ties = min(left, int(np.count_nonzero(values == threshold)))
        chosen[layer] += ties
        left -= ties
    return chosen


def count_reaching(residual: np.ndarray, gradient: np.ndarray, threshold: float) -> int:
    """How many magnitudes of residual + gradient are >= threshold; NaN counts."""
    count = 0
    with np.errstate(all="ignore"):
        for start in range(0, len(residual), _BLOCK):
            block = slice(start, start + _BLOCK)
            magnitudes = np.abs(residual[block] + widened(gradient[block]))
            count += int(np.count_nonzero(~(magnitudes < threshold)))
    return count
