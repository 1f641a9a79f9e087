"""What is told through Python's ``logging``: by one logger, never often, mostly by rank 0."""

from __future__ import annotations

import logging
from collections.abc import Collection

from hvd_dls.core.balancing.plan import Plan
from hvd_dls.core.session.routing import Routing
from hvd_dls.core.wire.buckets import USUAL_BYTES
from hvd_dls.core.wire.layout import payload_bytes

_log = logging.getLogger("hvd_dls")
_NAMED = 8  # layers that a message names


def told_again(count: int) -> bool:
    """Whether something that has happened ``count`` times is worth a line: 1, 10, 100, ..."""
    while count % 10 == 0 and count:
        count //= 10
    return count == 1


def started(
    plan: Plan, routing: Routing, k: list[int], world_size: int, owners: bool = False
) -> None:
    """One line that says what will happen; the reasons of layers that go dense at DEBUG."""
    pairs = zip(routing.buckets, routing.rows, strict=True)
    many = routing.limit > USUAL_BYTES
    by_bucket = (payload_bytes(bucket, sum(k[row] for row in rows)) for bucket, rows in pairs)
    _log.info(
        "compressing %d of %d layers: %d of %d entries a step, in %d payload(s) of %.3g MB "
        "together; %d layers (%.3g MB) go dense; %d ranks%s%s",
        len(plan.sparse),
        len(plan.layers),
        sum(k),
        int(plan.sizes.sum()),
        len(routing.buckets),
        sum(by_bucket) / 1e6,
        len(plan.dense),
        plan.dense_bytes / 1e6,
        world_size,
        ", owners add up what they send" if owners else "",
        f", up to {routing.limit >> 20:,} MiB of gradients in each payload" if many else "",
    )
    for layer, reason in plan.dense:
        _log.debug("layer %r of shape %s goes dense: %s", layer.name, layer.shape, reason)
    if not plan.sparse and world_size > 1:
        first, reason = plan.dense[0] if plan.dense else (None, "there are none")
        _log.warning(
            "nothing will be compressed: all layers go dense (%s: %s)",
            "no layer" if first is None else first.name,
            reason,
        )


def skipped(count: int, where: list[tuple[str, int | None]], of_hosts: bool = False) -> None:
    """A step was skipped for NaN or Inf; ``where`` as in ``NonFiniteGradientError``."""
    if told_again(count):
        on = "on the host of rank" if of_hosts else "on rank"
        _log.warning(
            "step skipped for NaN or Inf in %s; %d step(s) skipped so far",
            ", ".join(_place(*x, on) for x in where[:_NAMED]),
            count,
        )


def _place(name: str, rank: int | None, on: str) -> str:
    return f"layer {name!r}" + ("" if rank is None else f" {on} {rank}")


def share_given_away(names: Collection[str], steps: int) -> None:
    """Layers have lost their share of the budget."""
    _log.warning(
        "no gradient came from %s for %d steps: their share of the budget goes to the other "
        "layers until they come back",
        _listed(names),
        steps,
    )


def share_given_back(names: Collection[str]) -> None:
    """Layers have a share again."""
    _log.info("gradients come from %s again: they have a share of the budget", _listed(names))


def _listed(names: Collection[str]) -> str:
    first = ", ".join(map(repr, list(names)[:_NAMED]))
    return first + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def layer_by_layer(why: str) -> None:
    """Says that each layer on a GPU has launches of its own: those of several do not run there."""
    _log.warning(
        "the GPU kernels of several layers do not run here, each layer has its own: %s", why
    )


def no_kernels(why: str) -> None:
    """Says that layers on a GPU take slower operations, since the kernels do not run there."""
    _log.warning("the GPU kernels do not run here, torch's operations take their place: %s", why)
