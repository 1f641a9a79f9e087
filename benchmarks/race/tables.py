"""Tables of races: all about one rate of links, and all rates side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.common.reporting import markdown
from benchmarks.convergence.tasks import TASKS
from benchmarks.convergence.times import TARGET_AT, loss_at, steps_to
from benchmarks.rounds.summary import title_of

Job = dict[str, Any]


def seconds_to(result: Job, target: float) -> float:
    """Returns the seconds of training until the held-out loss is no higher than a target."""
    steps = steps_to(result, target)
    if not np.isfinite(steps):
        return float("inf")
    return float(result["curve"]["seconds"][result["curve"]["step"].index(steps)])


def target_of(job: Job) -> float:
    """Returns the held-out loss that all methods of a job are timed to."""
    return loss_at(job["methods"]["dense"], TARGET_AT)


def times(jobs: Sequence[Job], method: str) -> np.ndarray:
    """Returns (jobs,) seconds of a method to the targets; inf where it never is there."""
    return np.array([seconds_to(job["methods"][method], target_of(job)) for job in jobs])


def step_ms(jobs: Sequence[Job], method: str) -> float:
    """Returns the time of a step, ms: the mean over a training, the median of jobs."""
    own = [job["methods"][method] for job in jobs]
    return float(np.median([1e3 * r["seconds"] / r["about"]["steps"] for r in own]))


def metric_of(result: Job, task: str) -> float:
    """Returns what a training ended with: accuracy in percent, or the loss in nats."""
    accuracy = TASKS[task].accuracy
    return float(100 * result["accuracy"] if accuracy else result["loss"])


def table(jobs: Sequence[Job]) -> str:
    """Formats the results of one task and rate, with a value for each seed."""
    task, methods = jobs[0]["task"], list(jobs[0]["methods"])
    accuracy, targets = TASKS[task].accuracy, [target_of(job) for job in jobs]
    rows = []
    for name in methods:
        own, taken = [job["methods"][name] for job in jobs], times(jobs, name)
        reached = np.isfinite(taken)
        steps = [steps_to(r, t) for r, t in zip(own, targets, strict=True)]
        row = [title_of(name), f"{step_ms(jobs, name):.0f}"]
        row.append(f"{np.median([r['sent_bytes'] for r in own]) / 1e3:,.0f}")
        row.append(_listed([metric_of(r, task) for r in own], 1 if accuracy else 3))
        row.append(f"{np.median(steps):.0f}" if reached.all() else "-")
        row.append(_listed(taken, 0))
        for beside in ("dense", "ddp"):
            if beside not in methods:
                row.append("-")
                continue
            faster = times(jobs, beside)[reached] / taken[reached]
            row.append(_listed(faster, 2) if len(faster) else "-")
        rows.append(row)
    head = [jobs[0]["rate"], "step, ms", "kB sent a step, kernel"]
    head += ["accuracy, %" if accuracy else "loss, nats", "steps to target", "seconds to target"]
    return markdown([*head, "dense / this", "DDP / this"], rows)


def overview(jobs: Sequence[Job]) -> str:
    """Formats a task's results at all rates: medians; the first at the target in bold."""
    task = jobs[0]["task"]
    rates = list(dict.fromkeys(job["rate"] for job in jobs))
    at = {rate: [job for job in jobs if job["rate"] == rate] for rate in rates}
    names = list(dict.fromkeys(name for job in jobs for name in job["methods"]))
    taken = {
        (rate, name): float(np.median(times(at[rate], name)))
        for rate in rates
        for name in names
        if name in at[rate][0]["methods"]
    }
    best = {rate: min(v for (r, _), v in taken.items() if r == rate) for rate in rates}
    rows = []
    for name in names:
        own = [job["methods"][name] for job in jobs if name in job["methods"]]
        there = [rate for rate in rates if (rate, name) in taken]
        row = [title_of(name), f"{np.median([r['sent_bytes'] for r in own]) / 1e3:,.0f}"]
        ended = np.median([metric_of(r, task) for r in own])
        row.append(f"{ended:.1f}" if TASKS[task].accuracy else f"{ended:.3f}")
        row += [f"{step_ms(at[r], name):.0f}" if r in there else "" for r in rates]
        for rate in rates:
            seconds = taken.get((rate, name))
            text = "" if seconds is None else _listed([seconds], 0 if best[rate] >= 20 else 1)
            row.append(f"**{text}**" if text and seconds == best[rate] else text)
        rows.append(row)
    metric = "accuracy, %" if TASKS[task].accuracy else "loss, nats"
    head = [task, "kB a step", metric, *(f"step, ms: {rate}" for rate in rates)]
    return markdown([*head, *(f"s to target: {rate}" for rate in rates)], rows)


def _listed(values: Sequence[float] | np.ndarray, digits: int) -> str:
    """One value for each seed: "12, 13, -"."""
    return ", ".join(f"{v:.{digits}f}" if np.isfinite(v) else "-" for v in values)
