"""What the fitted formula says of more ranks and other links."""

from __future__ import annotations

import argparse
import itertools
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common.internals import bucket_count, received_by_owners, step_size
from benchmarks.common.shapes import MODELS, entries
from benchmarks.cost_model.fit import OWNERS, TERMS, Senders
from benchmarks.hosts import bits_per_second
from hvd_dls.config import DLSConfig

RATES = ("100mbit", "1gbit", "10gbit", "25gbit", "100gbit", "400gbit")
RATES_BITS = {"400gbit": 4e11}  # beyond what benchmarks.hosts can make


class Costs(NamedTuple):
    """Time of a step over a link of any speed.

    Attributes:
        fixed: seconds that it takes whatever the speed.
        wire_bits: bits that have to be sent.
    """

    fixed: float
    wire_bits: float

    def at(self, bits: float) -> float:
        """Returns the seconds of a step over a link of so many bits a second."""
        return self.fixed + self.wire_bits / bits


def dense_costs(terms: np.ndarray, n: int, ranks: int, latency: float, ideal: bool) -> Costs:
    """Predicts the costs of a dense step.

    Args:
        terms: fitted.
        n: entries of the model.
        ranks: number of ranks.
        latency: seconds of one hop of a ring.
        ideal: whether an allreduce costs nothing but the wire.
    """
    at = dict(zip(TERMS, terms, strict=True))
    hops = 2 * (ranks - 1)
    bits = 8 * hops / ranks * 4 * n * max(at["wire"], 1.0)
    return Costs((0 if ideal else at["start"] + at["copy"] * n) + hops * latency, bits)


def sparse_costs(
    terms: np.ndarray,
    model: str,
    config: DLSConfig,
    ranks: int,
    latency: float,
    per_host: int = 1,
    sharing: int = 1,
) -> Costs:
    """Predicts the costs of a step with DLS.

    Args:
        terms: fitted.
        model: one of MODELS.
        config: the compressor's options: density, values, exchange and bucket_bytes.
        ranks: number of ranks.
        latency: seconds of one hop of a ring.
        per_host: ranks that average their gradients on each host before one sends for all: that
            costs as much as a dense allreduce but for the wire, where a host's own is free.
        sharing: ranks on each host that do not average first, and share its link; for owners.
    """
    hosts, owners = ranks // per_host, config.exchange == OWNERS
    at = dict(zip(TERMS, terms, strict=True))
    shapes = MODELS[model]()
    n, size = entries(shapes), step_size(shapes, config, hosts)
    senders = Senders(hosts, per_host, bucket_count(shapes, config, hosts, per_host))
    fixed = at["start"] + at["operation"] * senders.operations(owners)
    fixed += at["pass"] * n / per_host + at["entry"] * size.entries * (2 if owners else hosts)
    # Each operation of each bucket, and what goes dense.
    fixed += ((3 if owners else 1) * senders.buckets + 2) * (hosts - 1) * latency
    if per_host > 1:  # an allreduce and an allgather of each bucket
        fixed += at["copy"] * n + 3 * senders.buckets * (per_host - 1) * latency
    if owners:
        fixed += at["region"] * n / ranks
        sent = float(received_by_owners(shapes, config, hosts, sharing))
    else:
        sent = float((hosts - 1) * size.payload_bytes)
    sent += 2 * (ranks - 1) / ranks * size.dense_bytes
    return Costs(fixed, 8 * sent * max(at["wire"], 1.0))


def config_of(
    density: float, values: str, exchange: str, bucket_bytes: int | None = None
) -> DLSConfig:
    """Options to predict for: the cost rule would have layers go dense where sparse is no smaller.

    Args:
        density, values, exchange: of the compressor.
        bucket_bytes: likewise; None: its default.
    """
    options: dict[str, Any] = {} if bucket_bytes is None else {"bucket_bytes": bucket_bytes}
    return DLSConfig(density=density, values=values, cost_rule=False, exchange=exchange, **options)


def crossover(dense: Costs, sparse: Costs) -> tuple[float, float]:
    """Computes the link speeds, in bits a second, between which sparse is faster."""
    saved, more = dense.wire_bits - sparse.wire_bits, sparse.fixed - dense.fixed
    if saved > 0:
        return 0.0, (saved / more if more > 0 else np.inf)
    return (saved / more, np.inf) if more < 0 else (np.inf, np.inf)


def format_speed(bits: float) -> str:
    """Formats bits a second with a unit."""
    if not np.isfinite(bits):
        return "any"
    unit, size = ("Gbit/s", 1e9) if bits >= 1e9 else ("Mbit/s", 1e6)
    return f"{bits / size:.3g} {unit}"


def when_it_pays(dense: Costs, sparse: Costs) -> str:
    """Says in words for which link speeds sparse is faster."""
    low, high = crossover(dense, sparse)
    if low == np.inf:
        return "never"
    if low > 0:
        return f"above {format_speed(low)}"
    return "always" if high == np.inf else f"below {format_speed(high)}"


def predict(
    terms: np.ndarray, args: argparse.Namespace, with_owners: bool = True
) -> list[dict[str, Any]]:
    """Predicts dense and sparse steps for all densities, numbers of ranks, and exchanges.

    Args:
        terms: fitted.
        args: the command line.
        with_owners: whether what owners cost has been measured.
    """
    latency, n = args.latency_us * 1e-6, entries(MODELS[args.model]())
    rows = []
    exchanges = ["allgather", *([OWNERS] if with_owners else [])]
    for density, ranks, per_host, exchange in itertools.product(
        args.density, args.ranks, sorted({1, args.per_host}), exchanges
    ):
        if ranks > args.per_host:  # or there is no link between hosts
            config = config_of(density, args.values, exchange, args.bucket_bytes)
            sharing = args.per_host // per_host
            sparse = sparse_costs(terms, args.model, config, ranks, latency, per_host, sharing)
            both = {
                kind: dense_costs(terms, n, ranks, latency, kind == "ideal")
                for kind in ("Horovod", "ideal")
            }
            rows.append(
                {
                    "density": density,
                    "ranks": ranks,
                    "averaged": per_host,
                    "exchange": exchange,
                    "costs": {"own": sparse, **both},
                    "seconds": {rate: sparse.at(bits_of(rate)) for rate in RATES},
                    "pays": {kind: when_it_pays(dense, sparse) for kind, dense in both.items()},
                    "crossover": {kind: crossover(dense, sparse) for kind, dense in both.items()},
                    "ratio": {
                        kind: {
                            rate: dense.at(bits_of(rate)) / sparse.at(bits_of(rate))
                            for rate in RATES
                        }
                        for kind, dense in both.items()
                    },
                    "bytes_over_dense": sparse.wire_bits / both["ideal"].wire_bits,
                }
            )
    return rows


def bits_of(rate: str) -> float:
    """Returns a rate in bits a second."""
    return RATES_BITS.get(rate) or float(bits_per_second(rate) or 0)
