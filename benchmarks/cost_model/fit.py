"""Measured steps, and the formula that is fitted to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.common.internals import bucket_count
from benchmarks.common.shapes import MODELS
from benchmarks.hosts import bits_per_second
from benchmarks.rounds.summary import steps_of
from hvd_dls.config import DLSConfig

TERMS = (
    *("start", "operation", "hop", "ring", "copy", "convert"),
    *("pass", "entry", "region", "scatter", "wire"),
)
OWNERS = "sparse_allreduce"
BETWEEN_HOSTS = "hierarchical"  # as methods' names begin


class Point(NamedTuple):
    """A measured step.

    Attributes:
        name: of the model, and where it was measured.
        ranks: number of ranks.
        method: as ``Method.parse`` takes it.
        seconds: median of all steps.
        factors: (T,) what each of TERMS is multiplied by.
    """

    name: str
    ranks: int
    method: str
    seconds: float
    factors: np.ndarray


def points_of(path: Path) -> list[Point]:
    """Reads all measured steps from a file of benchmarks.exchange or benchmarks.network."""
    data = json.loads(path.read_text())
    points = []
    for job in data.get("jobs", [data]):
        if job.get("cycle_time"):
            continue  # the formula knows Horovod's own only
        ranks, n = job["ranks"], job["entries"]
        bits = bits_per_second(job["rate"])
        # Over loopback no link is shared, so there is nothing in being one host.
        hosts = job.get("hosts", ranks) if bits else ranks
        shared = max(1.0, ranks / job["about"]["cores"])
        for method, figures in job["methods"].items():
            if method == "nothing" or method.startswith(("ddp", "powersgd")):
                continue
            seconds = float(np.median(steps_of(job, method)))
            k = figures["handed_over"]["entries"]
            senders = Senders.of(method, job["model"], hosts, ranks // hosts)
            factors = factors_of(method, senders, n, k, figures["claimed_wire_bytes"], bits, shared)
            place = f"{ranks} ranks, loopback"
            if bits:
                each = f" of {ranks // hosts} ranks" if ranks > hosts else ""
                place = f"{hosts} hosts{each}, {job['rate']}"
            points.append(Point(f"{job['model']}, {place}", ranks, method, seconds, factors))
    return points


class Senders(NamedTuple):
    """Who sends what is sparse.

    Attributes:
        ranks: that send a bucket: all, or one of each host.
        averaging: ranks of a host that average first; 1: none do.
        buckets: that a model's compressed layers travel in.
    """

    ranks: int
    averaging: int
    buckets: int

    @classmethod
    def of(cls, method: str, model: str, hosts: int, per_host: int) -> Senders:
        """Those of a method, for one of MODELS on so many hosts."""
        kind, *density = method.split(":")
        averaging = per_host if kind.startswith(BETWEEN_HOSTS) else 1
        ranks = hosts * per_host // averaging
        if not density:
            return cls(ranks, averaging, 0)
        config = DLSConfig(
            density=float(density[0]), exchange=OWNERS if kind.endswith(OWNERS) else "allgather"
        )
        return cls(ranks, averaging, bucket_count(MODELS[model](), config, ranks, averaging))

    def operations(self, owners: bool) -> int:
        """Operations of a step, one after the other: see ``benchmarks.cost_model``."""
        return self.buckets * ((3 if owners else 1) + (2 if self.averaging > 1 else 0))


def factors_of(
    method: str, senders: Senders, n: int, k: float, wire: float, bits: float | None, shared: float
) -> np.ndarray:
    """Computes what each of TERMS is multiplied by to make the time of a step.

    Args:
        method: as ``Method.parse`` takes it.
        senders: who sends what is sparse, or all.
        n: entries of the model.
        k: entries that a rank, or host that averages first, sends.
        wire: bytes that a rank, or host, sends.
        bits: of a link, in a second; None: sending takes no time.
        shared: how many ranks share a core.

    Returns:
        (T,) factors.
    """
    owners, mates = OWNERS in method, senders.averaging - 1
    hops = senders.ranks - 1
    if ":" not in method:
        own: dict[str, float] = {
            "hop": hops,
            "ring": hops,
            "copy": n,
            "convert": n if method == "fp16" else 0,
        }
    else:
        own = {
            "operation": senders.operations(owners),
            "hop": senders.buckets * (hops + mates),
            "pass": n / senders.averaging,
            "entry": k * (2 if owners else senders.ranks),
        }
        own |= {"ring": mates, "copy": n} if mates else {}
        if owners:
            region = n / (senders.ranks * senders.averaging)
            own |= {"region": region, "scatter": senders.buckets * hops}
    wires = {"wire": 8 * wire / bits if bits else 0.0}
    factors = {name: shared * value for name, value in {"start": 1, **own}.items()} | wires
    return np.array([factors.get(name, 0.0) for name in TERMS])


def fit(points: list[Point]) -> np.ndarray:
    """Fits the terms to measurements, by least squares of relative errors.

    Returns:
        (T,) values of TERMS; those that would be negative are zero.
    """
    seconds = np.array([p.seconds for p in points])
    matrix = np.array([p.factors for p in points]) / seconds[:, None]
    used = matrix.any(axis=0)
    while True:
        columns = np.flatnonzero(used)
        scales = np.abs(matrix[:, columns]).max(axis=0)
        found = np.linalg.lstsq(matrix[:, columns] / scales, np.ones(len(points)), rcond=None)[0]
        if (found >= 0).all():
            result = np.zeros(len(TERMS))
            result[columns] = found / scales
            return result
        used[columns[found.argmin()]] = False
