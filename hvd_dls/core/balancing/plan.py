"""Which layers are compressed and which go dense, and how many entries they share.

The plan follows from shapes, world size and options alone, so every rank makes the same one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from hvd_dls.config import DENSE, DLSConfig
from hvd_dls.core.wire.buckets import make_bucket
from hvd_dls.core.balancing.curves import SketchedCurves
from hvd_dls.core.balancing.layers import VECTOR, LayerSpec
from hvd_dls.core.wire.payload import payload_bytes
from hvd_dls.core.balancing.prior import MEASURED, PRIORS
from hvd_dls.core.balancing.ratios import apportion, common_threshold_ratios
from hvd_dls.core.balancing.schedule import density_at
from hvd_dls.core.balancing.sketch import N_BINS, bin_of
from hvd_dls.core.balancing.tails import TAILS
from hvd_dls.errors import DLSError


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

    def budget(self, density: float) -> int:
        """K: entries that these layers send together, at this density."""
        return round(density * int(self.sizes[self.sharing].sum()))

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


def make_plan(layers: Sequence[LayerSpec], config: DLSConfig, world_size: int) -> Plan:
    """Sorts layers into sparse and dense and sets the budget.

    Args:
        layers: in model order, with distinct names.
        config: the options.
        world_size: number of ranks, P.

    Raises:
        DLSError: two layers have one name, or the density leaves fewer than ``min_k`` entries for
            each sparse layer.
    """
    names = [layer.name for layer in layers]
    for name in names:
        if names.count(name) > 1:
            raise DLSError(
                f"layer name {name!r} occurs {names.count(name)} times; it must be unique"
            )
    for pattern, _ in config.layer_density:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise DLSError(
                f"layer_density: no layer's name matches {pattern!r}; there are "
                f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
            )
    reasons = [(layer, _why_dense(layer, config, world_size)) for layer in layers]
    sparse = tuple(layer for layer, reason in reasons if not reason)
    own = [_own_density(layer, config) for layer in sparse]
    plan = Plan(
        tuple(layers),
        sparse,
        tuple((layer, why) for layer, why in reasons if why),
        np.array([np.nan if density is None else density for density in own], np.float64),
    )
    _check_budget(plan, config)
    return plan


def _own_density(layer: LayerSpec, config: DLSConfig) -> float | str | None:
    for pattern, density in config.layer_density:
        if fnmatchcase(layer.name, pattern):
            return density
    return None


def _check_budget(plan: Plan, config: DLSConfig) -> None:
    sizes, total_k = plan.sizes[plan.sharing], plan.budget(config.density)
    entries, floor = int(sizes.sum()), int(np.minimum(config.min_k, sizes).sum())
    if total_k < floor:
        enough = min(1.0, 1.05 * floor / entries)  # still enough when rounded to two digits
        raise DLSError(
            f"density={config.density} gives {total_k} of {entries} entries, but "
            f"{len(sizes)} layers with min_k={config.min_k} need {floor}: raise density to at "
            f"least {enough:.2g}, or raise dense_below so that small layers go dense"
        )


def _why_dense(layer: LayerSpec, config: DLSConfig, world_size: int) -> str:
    own = _own_density(layer, config)
    if world_size == 1:
        return "one rank: nothing to exchange"
    if own == DENSE:
        return "layer_density says so"
    if layer.kind == VECTOR:
        return "bias, normalisation or scalar"
    if layer.size == 0:
        return "no entries"
    if layer.size < config.dense_below:
        return f"fewer than dense_below={config.dense_below} entries"
    if config.cost_rule:
        # Received by a rank: (P - 1) payloads from an allgather; 2 (P - 1) / P gradients from a
        # ring allreduce.
        density = config.density if own is None else float(own)
        k = max(config.min_k, round(density * layer.size))
        payload = payload_bytes(make_bucket([layer], config), k)
        if payload * world_size >= 2 * layer.size * layer.itemsize:
            return f"a dense allreduce moves no more bytes than {world_size} sparse payloads"
    return ""


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
        chain = tuple(layer for layer in plan.layers if layer.kind != VECTOR)
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


def histogram(gradient: np.ndarray) -> np.ndarray:
    """(N_BINS,) int64: how many magnitudes of a whole gradient lie in each of the sketch's bins."""
    return np.bincount(bin_of(np.abs(gradient)), minlength=N_BINS)


def shared_out(plan: Plan, config: DLSConfig, density: float, wanted: np.ndarray) -> np.ndarray:
    """Entries of each layer at a density.

    Args:
        plan: as made by ``make_plan``.
        config: the options.
        density: of the step.
        wanted: (L',) real numbers >= 0, proportional to which the layers that share the budget
            should send; the others send what they have to.

    Returns:
        (L,) int64.
    """
    k, rows = plan.fixed_k(config, density), plan.sharing
    if len(rows):
        sizes = plan.sizes[rows]
        least = np.minimum(config.min_k, sizes)
        k[rows] = apportion(wanted, plan.budget(density), least, sizes)
    return k
