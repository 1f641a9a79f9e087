"""Which layers are compressed and which go dense.

The plan follows from shapes, world size and options alone, so every rank makes the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np

from hvd_dls.config import DENSE, SPARSE_ALLREDUCE, DLSConfig
from hvd_dls.core.balancing.layers import VECTOR, LayerSpec
from hvd_dls.core.balancing.plan import Plan
from hvd_dls.core.wire.buckets import make_bucket
from hvd_dls.core.wire.layout import payload_bytes
from hvd_dls.errors import DLSError

_WITH_OWNERS = 3  # payloads that a rank receives, at most: see session/owners.py


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
        hosts = " or, with hierarchical=True, one host" if config.hierarchical else ""
        return f"one rank{hosts}: nothing to exchange"
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
        payload, times = payload_bytes(make_bucket([layer], config), k), world_size
        if config.exchange == SPARSE_ALLREDUCE:  # to the owners, with room to spare, and back
            times = _WITH_OWNERS
        if payload * times >= 2 * layer.size * layer.itemsize:
            return f"a dense allreduce moves no more bytes than {times} sparse payloads"
    return ""
