"""Time to reach a loss, at several link rates: a section of docs/convergence.md."""

from __future__ import annotations

import numpy as np

from benchmarks.common.paths import ROOT
from benchmarks.common.reporting import markdown
from benchmarks.convergence.pictures import smooth
from benchmarks.convergence.results import Group, Groups, Result
from benchmarks.convergence.settings import WORKERS
from benchmarks.cost_model.fit import Senders, factors_of, fit, points_of
from benchmarks.hosts import bits_per_second

MEASURED = [ROOT / "build" / "results" / name for name in ("exchange.json", "network.json")]
RATES = ("100mbit", "1gbit", "10gbit")
TARGET_AT = 0.8  # of dense training: the loss that others are timed to


def section(groups: Groups) -> list[str]:
    """Returns the section: its text, and a table for each task."""
    terms = fitted_terms()
    if terms is None:
        return ["Left out: `benchmarks/results.py` has left no measurements in build/results.\n"]
    text = f"""Steps until the held-out loss is what dense training of the same seed has after
{TARGET_AT:.0%} of its steps (curves are running medians of five points; the median over seeds),
times what a step takes: computing, as measured here, and the exchange between {WORKERS} hosts, as
the model of `benchmarks/cost_model` has it with the bytes counted here. That model is fitted to
nets of millions of parameters, knows no latency and no overlap, and charges every way of choosing
as DLS's.
"""
    return [text, *(time_to_target(groups, task, terms) for task in groups.tasks())]


def held_out(result: Result) -> np.ndarray:
    """Returns the curve of held-out losses, smoothed; inf where it is not finite."""
    losses = [np.inf if loss is None else loss for loss in result["curve"]["loss"]]
    return smooth(losses, 5)


def steps_to(result: Result, target: float) -> float:
    """Returns the steps until the held-out loss is no higher than a target; inf if it never is."""
    reached = np.flatnonzero(held_out(result) <= target)
    return float(result["curve"]["step"][reached[0]]) if len(reached) else np.inf


def loss_at(result: Result, part: float) -> float:
    """Returns the held-out loss when a part of the training, from 0 to 1, is done."""
    losses = held_out(result)
    position = int(np.searchsorted(result["curve"]["step"], part * result["about"]["steps"]))
    return float(losses[min(position, len(losses) - 1)])


def exchange_seconds(group: Group, terms: np.ndarray, rate: str) -> float:
    """Computes the time of a step's exchange by the cost model, with the bytes that were sent.

    Args:
        group: of runs.
        terms: fitted.
        rate: of the links.
    """
    ranks, n, result = group.workers, group.results[0]["entries"], group.results[0]
    placeholders = 8 * len(result["layers"]["names"])
    reduced = group.mean("dense_bytes") + placeholders
    wire = (ranks - 1) * group.mean("sparse_bytes") + 2 * (ranks - 1) / ranks * reduced
    method = "dense" if group.density is None else f"dls:{group.density:g}"
    k = group.mean("entries_sent")
    bits = bits_per_second(rate)
    senders = Senders(ranks, averaging=1, buckets=1)
    return float(factors_of(method, senders, n, k, wire, bits, shared=1.0) @ terms)


def time_to_target(groups: Groups, task: str, terms: np.ndarray) -> str:
    """Formats the table of a task; empty without dense results."""
    dense = groups.get(task, "dense")
    if dense is None or not dense.finished:
        return ""
    targets = {r["about"]["seed"]: loss_at(r, TARGET_AT) for r in dense.finished}
    computing = float(np.median([result["gradient_seconds"] for result in dense.results]))
    rows = []
    for group in groups.select(task, "strategies", "plain"):
        seeded = [r for r in group.results if r["about"]["seed"] in targets]
        if not seeded:
            continue
        steps = np.array([steps_to(r, targets[r["about"]["seed"]]) for r in seeded])
        reached, needed = int(np.isfinite(steps).sum()), float(np.median(steps))
        density = "" if group.density is None else f"{group.density:.1%}"
        times = [
            f"{needed * (computing + exchange_seconds(group, terms, rate)):.1f}"
            if np.isfinite(needed)
            else "-"
            for rate in RATES
        ]
        count = f"{needed:.0f}" if np.isfinite(needed) else "-"
        rows.append([density, group.title, f"{reached} of {len(steps)}", count, *times])
    head = [
        f"{task}: density",
        "",
        f"reach {np.mean([*targets.values()]):.3f}",
        "steps",
        *(f"{r}, s" for r in RATES),
    ]
    text = f"Computing a gradient: {1e3 * computing:.0f} ms a step, for all alike.\n\n"
    return text + markdown(head, rows)


def fitted_terms() -> np.ndarray | None:
    """Fits the cost model's terms; None if there are no measurements."""
    files = [file for file in MEASURED if file.exists()]
    return fit([point for file in files for point in points_of(file)]) if files else None
