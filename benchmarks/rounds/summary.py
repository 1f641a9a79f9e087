"""Sums up the figures of a job of rounds: quartiles, ratios between methods, tables."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.common.reporting import markdown


def steps_of(job: dict[str, Any], method: str, what: str = "seconds") -> np.ndarray:
    """Returns a figure of all steps of a method, in all turns."""
    return np.concatenate([turn[what] for turn in job["methods"][method]["turns"]])


def quartiles(values: Any) -> list[float]:
    """Returns lower quartile, median and upper quartile."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return [float(low), float(median), float(high)]


def ratio(
    job: dict[str, Any], method: str, beside: str = "dense", without: str | None = None
) -> list[float]:
    """Computes how many times as long a step takes with one method as with another.

    Args:
        job: figures of a job of rounds.
        method: the one expected to be faster.
        beside: the one expected to be slower.
        without: a method whose time is subtracted from both.

    Returns:
        Smallest, median and largest over the rounds, of ratios of medians in a round.
    """

    def medians(name: str) -> np.ndarray:
        return np.array([np.median(turn["seconds"]) for turn in job["methods"][name]["turns"]])

    off = medians(without) if without else 0.0
    ratios = (medians(beside) - off) / (medians(method) - off)
    return [float(ratios.min()), float(np.median(ratios)), float(ratios.max())]


def title_of(method: str) -> str:
    """Returns a method's name for tables and pictures: "DLS, 1.0%" for "dls:0.01"."""
    method, _, longer = method.partition("x")
    if longer:
        return f"{title_of(method)}, {longer} times the steps"
    kind, *rest = method.split(":")
    names = {"dls": "DLS", "layerwise": "layer-wise top-k", "none": "dense"}
    names |= {"hierarchical": "DLS, two levels", "sparse_allreduce": "DLS, sparse allreduce"}
    names["hierarchical_sparse_allreduce"] = "DLS, two levels, sparse allreduce"
    names |= {"ddp": "torch DDP", "ddp-fp16": "torch DDP, fp16"}
    if kind == "powersgd":
        return f"torch DDP, PowerSGD, rank {rest[0]}"
    if kind == "local":
        outer = f", outer rate {rest[1]}, momentum {rest[2]}" if rest[1:] else ""
        return f"local steps, {rest[0]}{outer}"
    if kind == "local-dls":
        outer = f", outer rate {rest[2]}" if rest[2:] else ""
        return f"local steps, {rest[0]}, DLS, {_percent(float(rest[1]))}{outer}"
    words = [names.get(kind, kind)]
    words += [_percent(float(rest[0]))] if rest else []
    return ", ".join([*words, *rest[1:]])


def _percent(share: float) -> str:
    """A density as tables have it: "1.0%", and with as many digits as it has below that."""
    return f"{share:.1%}" if round(share, 3) == share else f"{100 * share:.3g}%"


def format_range(values: list[float] | None, factor: float = 1.0) -> str:
    """Formats [low, middle, high] as "middle (low–high)", all multiplied by a factor."""
    if values is None:
        return "-"
    low, median, high = (factor * value for value in values)
    return f"{median:.{2 if median < 10 else 1}f} ({low:.2f}–{high:.2f})"


def format_profile(job: dict[str, Any], method: str) -> str | None:
    """Formats where a step's time goes as a table with a title; None if it was not measured."""
    parts = job["methods"][method]["profile_ms"]
    if not parts:
        return None
    cells = [[part, f"{wall:.2f}", f"{cpu:.2f}"] for part, (wall, cpu) in parts.items()]
    table = markdown(["part", "clock", "processor"], cells)
    return f"Where a step with {title_of(method)} goes, rank 0, ms\n\n{table}"
