"""Pictures of races: held-out losses over time, and times to the target by rate of the links."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.common.reporting import pyplot, save_picture
from benchmarks.convergence.times import held_out
from benchmarks.hosts import bits_per_second
from benchmarks.race.tables import Job, target_of, times
from benchmarks.rounds.summary import title_of


def draw_curves(jobs: Sequence[Job], file: Path) -> None:
    """Draws held-out losses over time, a panel for each rate, of the first task and seed."""
    plt = pyplot()
    first = [j for j in jobs if (j["task"], j["seed"]) == (jobs[0]["task"], jobs[0]["seed"])]
    figure, axes = plt.subplots(
        1, len(first), figsize=(5.5 * len(first), 4.5), sharey=True, squeeze=False
    )
    for ax, job in zip(axes[0], first, strict=True):
        for name, result in job["methods"].items():
            losses = held_out(result)
            ax.plot(result["curve"]["seconds"], losses, label=title_of(name), **_style(name))
        ax.axhline(target_of(job), color="black", linewidth=0.8, linestyle=":")
        ax.set(xscale="log", yscale="log", xlabel="seconds of training", title=job["rate"])
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel(f"held-out loss, {first[0]['task']}")
    axes[0][-1].legend(fontsize=7, loc="lower left")
    save_picture(figure, file)


def draw_times(jobs: Sequence[Job], file: Path) -> None:
    """Draws seconds to the target by rate of the links, a panel for each task."""
    plt = pyplot()
    tasks = list(dict.fromkeys(job["task"] for job in jobs))
    figure, axes = plt.subplots(1, len(tasks), figsize=(9 * len(tasks), 5), squeeze=False)
    for ax, task in zip(axes[0], tasks, strict=True):
        own = [job for job in jobs if job["task"] == task]
        rates = sorted({job["rate"] for job in own}, key=lambda rate: bits_per_second(rate) or 0)
        never = []
        for number, name in enumerate(
            dict.fromkeys(name for job in own for name in job["methods"])
        ):
            points = []
            for rate in rates:
                there = [j for j in own if j["rate"] == rate and name in j["methods"]]
                points.append(float(np.median(times(there, name))) if there else np.inf)
            if not np.isfinite(points).any():
                never.append(title_of(name))
                continue
            shown = np.where(np.isfinite(points), points, np.nan)
            style = {"color": f"C{number % 10}", "marker": "osv^"[number // 10 % 4]}
            ax.plot(range(len(rates)), shown, label=title_of(name), **style, **_style(name))
        ax.set(yscale="log", title=task, xlabel="links", ylabel="seconds to the target loss")
        ax.set_xticks(range(len(rates)), rates)
        ticks = [value * 10**power for power in range(4) for value in (1, 2, 5)]
        low, high = ax.get_ylim()
        ax.set_yticks([tick for tick in ticks if low <= tick <= high])
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("")
        ax.grid(alpha=0.3)
        note = "\n".join(["never there:", *never]) if never else None
        ax.legend(
            fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), title=note, title_fontsize=8
        )
    figure.tight_layout()
    save_picture(figure, file)


def _style(name: str) -> dict[str, object]:
    """How a method's line is drawn: ours thicker, torch's own dashed, local steps dotted."""
    dashed = "--" if name.startswith(("ddp", "powersgd")) else "-"
    return {
        "linewidth": 2.2 if name.startswith("dls") else 1.2,
        "linestyle": ":" if name.startswith("local") else dashed,
    }
