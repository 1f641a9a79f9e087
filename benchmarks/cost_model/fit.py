"""Measured steps, and the formula that is fitted to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.hosts import bits_per_second
from benchmarks.rounds.summary import steps_of

TERMS = ("start", "hop", "copy", "convert", "pass", "entry", "region", "scatter", "wire")
OWNERS = "sparse_allreduce"


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
        if job.get("cycle_time") or job.get("hosts", job["ranks"]) not in (1, job["ranks"]):
            continue  # the formula knows no hosts of several ranks
        ranks, n = job["ranks"], job["entries"]
        bits = bits_per_second(job["rate"])
        shared = max(1.0, ranks / job["about"]["cores"])
        for method, figures in job["methods"].items():
            if method == "nothing" or method.startswith(("ddp", "powersgd")):
                continue
            seconds = float(np.median(steps_of(job, method)))
            k = figures["handed_over"]["entries"]
            factors = factors_of(method, ranks, n, k, figures["claimed_wire_bytes"], bits, shared)
            place = f"{ranks} hosts, {job['rate']}" if bits else f"{ranks} ranks, loopback"
            points.append(Point(f"{job['model']}, {place}", ranks, method, seconds, factors))
    return points


def factors_of(
    method: str, ranks: int, n: int, k: float, wire: float, bits: float | None, shared: float
) -> np.ndarray:
    """Computes what each of TERMS is multiplied by to make the time of a step.

    Args:
        method: as ``Method.parse`` takes it.
        ranks: number of ranks.
        n: entries of the model.
        k: entries that a rank sends.
        wire: bytes that a rank sends.
        bits: of a link, in a second; None: sending takes no time.
        shared: how many ranks share a core.

    Returns:
        (T,) factors.
    """
    sparse, owners = ":" in method, method.startswith(OWNERS)
    own: list[float] = [1, ranks - 1, 0 if sparse else n, n if method == "fp16" else 0]
    own += [n, k * (2 if owners else ranks)] if sparse else [0, 0]
    own += [n / ranks, ranks - 1] if owners else [0, 0]
    return np.array([*(shared * np.array(own, float)), 8 * wire / bits if bits else 0.0])


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
