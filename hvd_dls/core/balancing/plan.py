"""What becomes of each layer, and how the layers that are compressed share their budget.

All of it follows from what every rank knows, so every rank computes the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hvd_dls.config import MEASURED, DLSConfig
from hvd_dls.core.balancing.attendance import Attendance
from hvd_dls.core.balancing.curves import SketchedCurves
from hvd_dls.core.balancing.layers import VECTOR, LayerSpec
from hvd_dls.core.balancing.prior import PRIORS
from hvd_dls.core.balancing.ratios import apportion, common_threshold_ratios
from hvd_dls.core.balancing.schedule import density_at
from hvd_dls.core.balancing.sketch import N_BINS
from hvd_dls.core.balancing.tails import TAILS


@dataclass(frozen=True)
class Plan:
    """What becomes of each layer.

    Attributes:
        layers: all, in model order.
        sparse: layers that are compressed, in model order.
        dense: layers left to Horovod, with the reason of each.
        own_density: (L,) of the sparse layers that have a density of their own; NaN of those that
            share the budget.
    """

    layers: tuple[LayerSpec, ...]
    sparse: tuple[LayerSpec, ...]
    dense: tuple[tuple[LayerSpec, str], ...]
    own_density: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """(L,) entries of each sparse layer."""
        return np.array([layer.size for layer in self.sparse], dtype=np.int64)

    @property
    def sharing(self) -> np.ndarray:
        """(L',) rows of the sparse layers that share the budget."""
        return np.flatnonzero(np.isnan(self.own_density))

    def budget(self, density: float, attendance: Attendance | None = None) -> int:
        """K: entries that these layers send together, at this density.

        Layers that never came are none that are compressed, so they do not count.  Those that came
        and stay away leave their share to the others.

        Args:
            density: in (0, 1].
            attendance: of the sparse layers; None: all take part.
        """
        sizes = self.sizes[self.sharing]
        if attendance is None:
            return round(density * int(sizes.sum()))
        counted, live = attendance.counted[self.sharing], attendance.live[self.sharing]
        return min(round(density * int(sizes[counted].sum())), int(sizes[live].sum()))

    def fixed_k(self, config: DLSConfig, density: float) -> np.ndarray:
        """(L,) entries of the layers with a density of their own; 0 of the others.

        A warm-up, at a density above the configured one, lifts those that are below it.
        """
        least = density if density > config.density else 0.0
        own = np.where(np.isnan(self.own_density), 0.0, np.maximum(self.own_density, least))
        k = np.rint(own * self.sizes).astype(np.int64)
        return np.where(own > 0, np.clip(k, np.minimum(config.min_k, self.sizes), self.sizes), 0)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the gradients that go dense."""
        return sum(layer.size * layer.itemsize for layer, _ in self.dense)


def initial_k(
    plan: Plan, config: DLSConfig, norms: Mapping[str, float] | None = None
) -> np.ndarray:
    """Entries each sparse layer sends in the first sparse step, before any gradient was seen.

    Args:
        plan: as made by ``make_plan``.
        config: the options: strategy, prior and tail decide.
        norms: Frobenius norm of each layer's weights, by name, for prior="weight_norm".

    Returns:
        (L,) int64.
    """
    sizes = plan.sizes[plan.sharing]
    if not len(sizes) or config.strategy != "dls" or config.prior == MEASURED:
        return shared_out(plan, config, density_at(config, 0), sizes)
    chain = plan.sparse
    if config.prior == "paper":  # Eq. 8 and 9 lead from each layer to the next, dense or not
        chain = tuple(x for x in plan.layers if x.kind != VECTOR and x.size)
    of_chain = None if norms is None else np.array([norms[layer.name] for layer in chain])
    variances = PRIORS[config.prior](chain, of_chain)
    sigma = {x.name: np.sqrt(v) for x, v in zip(chain, variances, strict=True)}
    sigmas = np.array([sigma[plan.sparse[row].name] for row in plan.sharing])
    density = density_at(config, 0)
    ratios = common_threshold_ratios(sizes, sigmas, density, TAILS[config.tail])
    return shared_out(plan, config, density, sizes * ratios)


def measured_k(
    plan: Plan, config: DLSConfig, gradients: Mapping[str, np.ndarray], density: float
) -> np.ndarray:
    """Entries of each sparse layer above the threshold that whole gradients would share.

    Histograms and IEEE basic operations only: the same on every rank that saw the same gradients.

    Args:
        plan: as made by ``make_plan``.
        config: the options.
        gradients: histogram of each layer's magnitudes by ``histogram``, by name; layers that are
            missing had none.
        density: of the step.

    Returns:
        (L,) int64.
    """
    rows = plan.sharing
    if not len(rows):
        return plan.fixed_k(config, density)
    counts = np.zeros((len(rows), 1, N_BINS))
    for i, row in enumerate(rows):
        counts[i, 0] = gradients.get(plan.sparse[row].name, 0)
    counts[:, :, 0] = 0  # zeros
    curves = SketchedCurves(np.zeros((len(rows), 1), np.int64), counts, plan.sizes[rows])
    least = np.minimum(config.min_k, plan.sizes[rows])
    wanted = curves.at_common_threshold(plan.budget(density), least)
    return shared_out(plan, config, density, wanted)


def shared_out(
    plan: Plan,
    config: DLSConfig,
    density: float,
    wanted: np.ndarray,
    attendance: Attendance | None = None,
) -> np.ndarray:
    """Entries of each layer at a density.

    Args:
        plan: the layers.
        config: the options.
        density: of the step.
        wanted: (L',) real numbers >= 0, proportional to which the layers that share the budget
            should send; the others send what they have to.
        attendance: of the sparse layers: those that stay away send nothing; None: all take part.

    Returns:
        (L,) int64.
    """
    live = np.ones(len(plan.sparse), bool) if attendance is None else attendance.live
    k, rows = np.where(live, plan.fixed_k(config, density), 0), plan.sharing
    if len(rows):
        sizes = np.where(live, plan.sizes, 0)[rows]
        least = np.minimum(config.min_k, sizes)
        # The budget of all layers has room for these; that of the ones that ever came may not.
        total = max(plan.budget(density, attendance), int(least.sum()))
        k[rows] = apportion(wanted * live[rows], total, least, sizes)
    return k
