"""Pictures of the cost model: the fit, ratios over the link's speed, and who is fastest where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.reporting import pyplot, save_picture
from benchmarks.cost_model.fit import OWNERS
from benchmarks.cost_model.predictions import RATES, bits_of
from benchmarks.rounds.summary import title_of

KINDS = ("Horovod", "ideal")  # of dense allreduces
NAMES = {"dense": "dense", "allgather": "allgather", OWNERS: "sparse allreduce"}
COLOURS = {"dense": "#bbbbbb", "allgather": "#4c78a8", OWNERS: "#e45756"}


def draw(fitted: list[dict[str, Any]], rows: list[dict[str, Any]], path: Path) -> None:
    """Draws model against measurements; below, where which exchange is the fastest.

    Args:
        fitted: of ``show_beside``.
        rows: of ``predict``.
        path: of the picture.
    """
    flat = [row for row in rows if row["averaged"] == 1]
    densities = sorted({row["density"] for row in rows}, reverse=True)
    columns = 1 + len(densities)
    figure, axes = pyplot().subplots(3, columns, figsize=(5 * columns, 13), squeeze=False)
    _draw_fit(axes[0][0], fitted)
    for axis in axes[1:, 0]:
        axis.axis("off")
    for column, density in enumerate(densities, 1):
        own = [row for row in flat if row["density"] == density]
        _draw_ratios(axes[0][column], own, density)
        for axis, kind in zip(axes[1:, column], KINDS, strict=True):
            _draw_fastest(axis, own, kind)
    axes[0][1].set_ylabel("dense over DLS (solid: allgather; dashed: sparse allreduce)")
    axes[0][1].legend(fontsize=7)
    for axis, kind in zip(axes[1:, 1], KINDS, strict=True):
        axis.set_ylabel(f"ranks, one a host; dense: {kind}")
    marks = [pyplot().Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in NAMES]
    axes[1][0].legend(marks, NAMES.values(), title="fastest", loc="center")
    figure.tight_layout()
    save_picture(figure, path)


def _draw_fit(axis: Any, fitted: list[dict[str, Any]]) -> None:
    for method in dict.fromkeys(row["method"] for row in fitted):
        own = [row for row in fitted if row["method"] == method]
        x, y = ([1e3 * row[what] for row in own] for what in ("measured", "model"))
        axis.plot(x, y, "o", label=title_of(method))
    ends = [f(1e3 * row["measured"] for row in fitted) for f in (min, max)]
    axis.plot(ends, ends, "k:", lw=1)
    axis.set(xscale="log", yscale="log", xlabel="measured, ms", ylabel="model, ms", title="fit")
    axis.legend(fontsize=7)


def _draw_ratios(axis: Any, rows: list[dict[str, Any]], density: float) -> None:
    x = [bits_of(rate) / 1e9 for rate in RATES]
    ranks = sorted({row["ranks"] for row in rows})
    for row in rows:
        colour = pyplot().get_cmap("viridis")(ranks.index(row["ranks"]) / len(ranks))
        gathered = row["exchange"] == "allgather"
        axis.plot(
            x,
            [row["ratio"]["Horovod"][rate] for rate in RATES],
            "-" if gathered else "--",
            color=colour,
            label=f"{row['ranks']} ranks" if gathered else None,
        )
    axis.axhline(1, color="black", lw=1)
    axis.set(
        xscale="log", yscale="log", xlabel="link, Gbit/s", title=f"density {density:g}, Horovod"
    )
    axis.grid(alpha=0.3)


def _draw_fastest(axis: Any, rows: list[dict[str, Any]], kind: str) -> None:
    """A map: number of ranks over the link's speed, beside one of KINDS."""
    speeds = np.geomspace(bits_of(RATES[0]), bits_of(RATES[-1]), 200)
    ranks, names = sorted({row["ranks"] for row in rows}), list(NAMES)
    fastest = np.zeros((len(ranks), len(speeds)), int)
    for row in rows:
        of = fastest[ranks.index(row["ranks"])]
        own = row["costs"]["own"].fixed + row["costs"]["own"].wire_bits / speeds
        dense = row["costs"][kind].fixed + row["costs"][kind].wire_bits / speeds
        others = [
            other["costs"]["own"].fixed + other["costs"]["own"].wire_bits / speeds
            for other in rows
            if other["ranks"] == row["ranks"]
        ]
        of[(own < dense) & (own <= np.min(others, axis=0))] = names.index(row["exchange"])
    colours = pyplot().matplotlib.colors.ListedColormap([COLOURS[name] for name in names])
    edges = np.arange(len(ranks) + 1)
    axis.pcolormesh(
        np.append(speeds, speeds[-1] * 1.01) / 1e9, edges, fastest, cmap=colours, vmin=0, vmax=2
    )
    axis.set(xscale="log", xlabel="link, Gbit/s")
    axis.set_yticks(edges[:-1] + 0.5, [str(each) for each in ranks])
