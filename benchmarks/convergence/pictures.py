"""Pictures of docs/convergence.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.reporting import pyplot, save_picture
from benchmarks.convergence.results import CORRECTED, Group, Groups, unit
from benchmarks.convergence.settings import DENSITIES, SETTINGS, STRATEGIES
from benchmarks.convergence.tasks import TASKS


def smooth(values: Sequence[float] | np.ndarray, points: int) -> np.ndarray:
    """Computes the running median of so many points, an odd number; of fewer at the ends."""
    array = np.array(values, float)
    half = points // 2
    return np.array([np.median(array[max(0, i - half) : i + half + 1]) for i in range(len(array))])


def color(setting: str) -> str:
    """Returns the colour of a setting's strategy, which is the same in all pictures."""
    return f"C{[*STRATEGIES, 'dense'].index(setting.split('-')[0])}"


def draw_metrics(groups: Groups, axes: Any, task: str) -> None:
    """Draws the final metric of each run of a task, a row for each setting."""
    rows = groups.select(task, "strategies", "plain")
    factor = 100 if TASKS[task].accuracy else 1
    for row, group in enumerate(rows):
        values = factor * group.values()
        axes.plot(values, [row] * len(values), "o", color=color(group.setting), ms=4, alpha=0.6)
        if len(values):
            axes.plot([values.mean()] * 2, [row - 0.3, row + 0.3], color=color(group.setting))
    if (dense := groups.get(task, "dense")) and len(dense.values()):
        axes.axvline(factor * dense.values().mean(), color="black", lw=0.8, ls=":")
    labels = [g.title + ("" if g.density is None else f", {g.density:.1%}") for g in rows]
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set(title=task, xlabel=unit(TASKS[task]))


def draw_curves(groups: Groups, axes: Any, task: str, density: float) -> None:
    """Draws the held-out loss over the steps, mean over seeds, a line for each setting."""
    names = [f"{strategy}-{density:g}" for strategy in STRATEGIES]
    for name in ["dense", *(name + CORRECTED for name in names), *names]:
        if (group := groups.get(task, name)) is None or not group.finished:
            continue
        curves = np.array([r["curve"]["loss"] for r in group.finished], float)
        steps = group.finished[0]["curve"]["step"]
        plain = SETTINGS[name].section == "plain"
        label = None if plain else group.title.split(",")[0]
        axes.plot(steps, curves.mean(axis=0), ":" if plain else "-", color=color(name), label=label)
    axes.set(title=f"{task}, {density:.1%}", xlabel="step", ylabel="held-out loss", yscale="log")


def draw_quality(groups: Groups, axes: Any, task: str, density: float, what: str) -> None:
    """Draws "energy" or "misallocation" over the steps, a line for each strategy."""
    for strategy, title in STRATEGIES.items():
        group = groups.get(task, f"{strategy}-{density:g}{CORRECTED}")
        if group is None or not group.finished or strategy in ("global", "hard"):
            continue
        curves = np.array([r["quality"][what] for r in group.finished], float)
        steps = group.finished[0]["quality"]["step"]
        axes.plot(
            steps,
            smooth(curves.mean(axis=0), 2 * (len(steps) // 50) + 1),
            color=color(strategy),
            label=title,
            lw=1,
        )
    axes.set(title=f"{task}, {density:.1%}", xlabel="step", ylabel=what, ylim=(0, 1.02))


def draw_layers(group: Group, axes: Sequence[Any]) -> None:
    """Draws all layers' thresholds on the first axes and their ratios on the second."""
    layers = group.results[0]["layers"]
    ratios = np.array(layers["k"], float) / layers["sizes"]
    for column, name in enumerate(layers["names"]):
        style = {"color": f"C{column % 10}", "ls": "-" if column < 10 else "--", "lw": 1}
        axes[0].plot(layers["step"], np.array(layers["thresholds"])[:, column], label=name, **style)
        axes[1].plot(layers["step"], ratios[:, column], **style)
    axes[0].set(title=group.title.split(",")[0], ylabel="threshold", yscale="log")
    axes[1].set(xlabel="step", ylabel="ratio", yscale="log")


def draw(groups: Groups, folder: Path) -> dict[str, str]:
    """Draws all pictures.

    Args:
        groups: all results.
        folder: where the pictures go.

    Returns:
        Markdown that shows each picture, by its name.
    """
    plt = pyplot()
    tasks, drawn = groups.tasks(), {}

    def keep(figure: Any, name: str, about: str) -> None:
        save_picture(figure, folder / f"convergence-{name}.png", dpi=110)
        drawn[name] = f"![{about}](images/convergence-{name}.png)\n"

    def grid(
        rows: int, columns: int, width: float = 4, height: float = 3
    ) -> tuple[Any, np.ndarray]:
        figure = plt.figure(figsize=(width * columns, height * rows), layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False)

    figure, axes = grid(1, len(tasks), 5, 5)
    for task, axis in zip(tasks, axes[0], strict=True):
        draw_metrics(groups, axis, task)
    keep(figure, "metrics", "Final metric of each run, by strategy and task; dotted: dense")

    figure, axes = grid(len(DENSITIES), len(tasks))
    for row, density in zip(axes, DENSITIES, strict=True):
        for task, axis in zip(tasks, row, strict=True):
            draw_curves(groups, axis, task, density)
    axes[0, 0].legend(fontsize=7)
    keep(figure, "curves", "Held-out loss over the steps, mean over seeds; dotted: plain")

    figure, axes = grid(2 * len(DENSITIES), len(tasks))
    kinds = [(density, what) for density in DENSITIES for what in ("energy", "misallocation")]
    for row, kind in zip(axes, kinds, strict=True):
        for task, axis in zip(tasks, row, strict=True):
            draw_quality(groups, axis, task, *kind)
    axes[0, 0].legend(fontsize=7)
    keep(figure, "quality", "Energy and misallocation over the steps: running medians")

    for task in ("images", *tasks):
        names = [f"{name}-{DENSITIES[0]:g}{CORRECTED}" for name in ("layerwise", "dls")]
        pair = [groups.get(task, name) for name in names]
        both = [group for group in pair if group is not None and group.results[0]["layers"]["step"]]
        if len(both) == 2:
            figure, axes = grid(2, 2, 6, 3.5)
            for row in axes:
                row[0].sharey(row[1])
            for group, column in zip(both, axes.T, strict=True):
                draw_layers(group, column)
            lines, labels = axes[0, 0].get_legend_handles_labels()
            figure.legend(lines, labels, fontsize=7, loc="outside right center")
            keep(figure, "layers", f"Thresholds and ratios of all layers, {task}, 1 %")
            break
    return drawn
