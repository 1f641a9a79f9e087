"""What benchmarks use of hvd_dls beyond its public interface.

It is imported here only, so that a change in the core needs to be followed in this file alone.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import numpy as np

from benchmarks.common.shapes import Shapes
from hvd_dls.config import DLSConfig
from hvd_dls.core.balancing.controller import Controller
from hvd_dls.core.balancing.layers import LayerSpec, layer_spec
from hvd_dls.core.balancing.sketch import WINDOW, Sketch
from hvd_dls.core.jit import HAVE_NUMBA
from hvd_dls.core.selection import threads
from hvd_dls.core.selection.passes import Found, find, settle, sum_up
from hvd_dls.core.session import averaging, ending, gathering, owning, settling, stopwatch
from hvd_dls.core.session.groups import Groups
from hvd_dls.core.session.owners import Owners
from hvd_dls.core.session.planning import make_plan
from hvd_dls.core.session.routing import Routing
from hvd_dls.core.session.session import Session
from hvd_dls.core.session.stopwatch import Stopwatch
from hvd_dls.core.session.tally import Tally
from hvd_dls.core.wire import elias_fano
from hvd_dls.core.wire.buckets import bucket_bytes_of, make_buckets
from hvd_dls.core.wire.layout import Bucket, payload_bytes
from hvd_dls.core.wire.pack import pack
from hvd_dls.core.wire.payload import Payloads
from hvd_dls.core.wire.unpack import unpack

__all__ = [
    "HAVE_NUMBA",
    "WINDOW",
    "Bucket",
    "Controller",
    "Found",
    "Groups",
    "LayerSpec",
    "Payloads",
    "Session",
    "Sketch",
    "StepSize",
    "Stopwatch",
    "Tally",
    "bucket_count",
    "clocked_modules",
    "elias_fano",
    "find",
    "layer_spec",
    "pack",
    "payload_bytes",
    "received_by_owners",
    "received_from_ranks",
    "settle",
    "step_size",
    "sum_up",
    "threads",
    "unpack",
]


class StepSize(NamedTuple):
    """What a rank sends in a step, by the plan alone.

    Attributes:
        entries: of all compressed layers.
        payload_bytes: of all buckets, with headers and sketches.
        dense_bytes: of the layers that go dense.
    """

    entries: int
    payload_bytes: int
    dense_bytes: int


def step_size(shapes: Shapes, config: DLSConfig, ranks: int) -> StepSize:
    """Computes what a rank sends in a step, if each layer has the same density.

    Args:
        shapes: of the model's parameters.
        config: the compressor's options.
        ranks: number of ranks.
    """
    layers = [layer_spec(name, shape) for name, shape in shapes.items()]
    plan = make_plan(layers, config, ranks)
    entries = plan.budget(config.density)
    buckets = make_buckets(plan.layers, plan.sparse, config, bucket_bytes_of(config, ranks))
    shares = (round(entries * bucket.size / plan.sizes.sum()) for bucket in buckets)
    payloads = sum(payload_bytes(b, share) for b, share in zip(buckets, shares, strict=True))
    return StepSize(entries, payloads, plan.dense_bytes)


def bucket_count(shapes: Shapes, config: DLSConfig, hosts: int, per_host: int = 1) -> int:
    """Counts the buckets that a model's compressed layers travel in.

    Args:
        shapes: of the model's parameters.
        config: the compressor's options.
        hosts: number of ranks that send a bucket: of hosts, where these average first.
        per_host: ranks that average before one of them sends.
    """
    layers = [layer_spec(name, shape) for name, shape in shapes.items()]
    plan = make_plan(layers, config, hosts)
    return len(Routing(plan, config, Groups([per_host] * hosts, 0)).buckets)


def received_by_owners(shapes: Shapes, config: DLSConfig, ranks: int, sharing: int = 1) -> int:
    """Computes the payload bytes that the busiest host receives in a step where owners add up.

    Args:
        shapes: of the model's parameters, each of the same density.
        config: the compressor's options.
        ranks: number of ranks.
        sharing: of which so many are on each host.
    """
    layers = [layer_spec(name, shape) for name, shape in shapes.items()]
    plan = make_plan(layers, config, ranks)
    buckets = make_buckets(plan.layers, plan.sparse, config, bucket_bytes_of(config, ranks))
    entries = plan.budget(config.density)
    k = [
        np.maximum(np.rint(entries * np.diff(bucket.offsets) / plan.sizes.sum()), 1).astype(int)
        for bucket in buckets
    ]
    owners = Owners(buckets, ranks, 0, [True] * len(buckets))
    return int(_received(owners, [int(each.sum()) for each in k], sharing).max())


def received_from_ranks(session: Session) -> np.ndarray:
    """Computes the payload bytes that each rank receives from all others in the step to come.

    Args:
        session: with exchange="sparse_allreduce", and in no step.

    Returns:
        (P,): of each rank's own regions from the others, and of theirs, what they hand out; where
        hosts average first, of each host.
    """
    owners = session.owners
    assert owners is not None
    totals = [int(session.k[rows].sum()) for rows in session.routing.rows]
    return _received(owners, totals)


def _received(owners: Owners, totals: list[int], sharing: int = 1) -> np.ndarray:
    """(P,) payload bytes, where the owners of each bucket hand so many sums out.

    Of a rank; or of a host of so many that are like this one: to each of them all ranks of other
    hosts send, while a ring hands on once what owners hand out.
    """
    ranks = len(owners.regions[0]) if owners.regions else 1
    received = np.zeros(ranks)
    for bucket, total in enumerate(totals):
        regions = owners.regions[bucket]
        room, shares = owners.room(bucket, total), owners.shares(bucket, total)
        parts = [payload_bytes(r.sent, n) for r, n in zip(regions, room.tolist(), strict=True)]
        out = [
            payload_bytes(r.handed_out, n) for r, n in zip(regions, shares.tolist(), strict=True)
        ]
        received += sharing * (ranks - sharing) * np.array(parts) + sum(out) - np.array(out)
    return received


def clocked_modules() -> list[ModuleType]:
    """Returns the modules that look at the clock, each by its own ``perf_counter``."""
    return [averaging, ending, gathering, owning, settling, stopwatch]
