"""Which layers are compressed and which go dense, and how many entries they share.

The plan follows from shapes, world size and options alone, so every rank makes the same one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hvd_dls.config import DLSConfig
from hvd_dls.core.buckets import make_bucket
from hvd_dls.core.layers import VECTOR, LayerSpec
from hvd_dls.core.payload import payload_bytes
from hvd_dls.core.prior import PRIORS
from hvd_dls.core.ratios import apportion, common_threshold_ratios
from hvd_dls.core.tails import TAILS
from hvd_dls.errors import DLSError


@dataclass(frozen=True)
class Plan:
    """What becomes of each layer.

    Attributes:
        layers: all, in model order.
        sparse: layers that are compressed, in model order.
        dense: layers left to Horovod, with the reason of each.
        total_k: K, the entries that the sparse layers send together each step.
    """

    layers: tuple[LayerSpec, ...]
    sparse: tuple[LayerSpec, ...]
    dense: tuple[tuple[LayerSpec, str], ...]
    total_k: int

    @property
    def sizes(self) -> np.ndarray:
        """(L,) entries of each sparse layer."""
        return np.array([layer.size for layer in self.sparse], dtype=np.int64)

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
    reasons = [(layer, _why_dense(layer, config, world_size)) for layer in layers]
    sparse = tuple(layer for layer, reason in reasons if not reason)
    entries = sum(layer.size for layer in sparse)
    total_k = round(config.density * entries)
    floor = sum(min(config.min_k, layer.size) for layer in sparse)
    if total_k < floor:
        enough = min(1.0, 1.05 * floor / entries)  # still enough when rounded to two digits
        raise DLSError(
            f"density={config.density} gives {total_k} of {entries} entries, but "
            f"{len(sparse)} layers with min_k={config.min_k} need {floor}: raise density to at "
            f"least {enough:.2g}, or raise dense_below so that small layers go dense"
        )
    dense = tuple((layer, why) for layer, why in reasons if why)
    return Plan(tuple(layers), sparse, dense, total_k)


def _why_dense(layer: LayerSpec, config: DLSConfig, world_size: int) -> str:
    if world_size == 1:
        return "one rank: nothing to exchange"
    if layer.kind == VECTOR:
        return "bias, normalisation or scalar"
    if layer.size == 0:
        return "no entries"
    if layer.size < config.dense_below:
        return f"fewer than dense_below={config.dense_below} entries"
    if config.cost_rule:
        # Received by a rank: (P - 1) payloads from an allgather; 2 (P - 1) / P gradients from a
        # ring allreduce.
        k = max(config.min_k, round(config.density * layer.size))
        payload = payload_bytes(make_bucket([layer], config), k)
        if payload * world_size >= 2 * layer.size * layer.itemsize:
            return f"a dense allreduce moves no more bytes than {world_size} sparse payloads"
    return ""


def initial_k(
    plan: Plan, config: DLSConfig, norms: Mapping[str, float] | None = None
) -> np.ndarray:
    """Entries each sparse layer sends in the first step, before any gradient was seen.

    Args:
        plan: as made by ``make_plan``.
        config: the options: strategy, prior and tail decide.
        norms: Frobenius norm of each layer's weights, by name, for prior="weight_norm".

    Returns:
        (L,) int64 with sum ``plan.total_k``.
    """
    sizes = plan.sizes
    if not len(sizes):
        return sizes
    if config.strategy == "layerwise":
        wanted = config.density * sizes
    else:
        chain = plan.sparse
        if config.prior == "paper":  # Eq. 8 and 9 lead from each layer to the next, dense or not
            chain = tuple(layer for layer in plan.layers if layer.kind != VECTOR)
        of_chain = None if norms is None else np.array([norms[layer.name] for layer in chain])
        variances = PRIORS[config.prior](chain, of_chain)
        sigma = {x.name: np.sqrt(v) for x, v in zip(chain, variances, strict=True)}
        sigmas = np.array([sigma[layer.name] for layer in plan.sparse])
        tail = TAILS[config.tail]
        wanted = sizes * common_threshold_ratios(sizes, sigmas, config.density, tail)
    return apportion(wanted, plan.total_k, np.minimum(config.min_k, sizes), sizes)
