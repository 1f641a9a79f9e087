"""Latency and bandwidth from timed operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Line:
    """Time of an operation by its size: ``latency + bytes / bandwidth``.

    Attributes:
        latency: seconds of the smallest operation.
        bandwidth: bytes that a rank sends in a second, in both directions at once; Inf if larger
            operations took no longer.
    """

    latency: float
    bandwidth: float

    def seconds(self, sent: float) -> float:
        """Of an operation in which each rank sends so many bytes."""
        return self.latency + sent / self.bandwidth


def sent_by_allreduce(handed_over: float, ranks: int) -> float:
    """Bytes that a rank sends in a ring allreduce: 2 (P - 1) / P of what it hands over."""
    return 2 * (ranks - 1) / ranks * handed_over


def sent_by_allgather(handed_over: float, ranks: int) -> float:
    """Bytes that a rank sends in a ring allgather: P - 1 times what it hands over."""
    return (ranks - 1) * handed_over


def fit_line(sent: Sequence[float], seconds: Sequence[float]) -> Line:
    """Fits the line by least squares of relative errors.

    Args:
        sent: bytes that a rank sends in each operation, two different numbers at least.
        seconds: what the operations took, all > 0.

    Returns:
        The line; neither latency nor time for a byte is negative.
    """
    x, y = np.asarray(sent, float), np.asarray(seconds, float)
    scale = x.max()
    columns = np.stack([1 / y, x / scale / y], axis=1)
    latency, slope = np.linalg.lstsq(columns, np.ones(len(x)), rcond=None)[0].tolist()
    if slope <= 0:
        return Line(float(_only(columns[:, 0])), float("inf"))
    if latency < 0:
        latency, slope = 0.0, _only(columns[:, 1])
    return Line(float(latency), float(scale / slope))


def _only(column: np.ndarray) -> float:
    """The factor that brings a column nearest to ones."""
    return float(column.sum() / (column @ column))
