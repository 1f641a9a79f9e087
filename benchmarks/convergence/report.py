"""Builds docs/convergence.md and its pictures from the results that convergence.py keeps.

All figures of the page come from results; ``convergence.py --report`` calls it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.common.reporting import markdown
from benchmarks.convergence import times
from benchmarks.convergence.pictures import draw
from benchmarks.convergence.results import (
    CORRECTED,
    Group,
    Groups,
    Result,
    falling_density,
    load,
    unit,
)
from benchmarks.convergence.settings import DENSITIES, MOMENTUM, SEEDS, SETTINGS, WARMUP, WORKERS
from benchmarks.convergence.tasks import TASKS, Task
from benchmarks.convergence.training import MEASURE_ALL
from hvd_dls.config import DLSConfig

FIRST_STEPS = 10  # in which a prior shows
MOMENTUM_IS = {"strategies": "Momentum correction and warm-up", "plain": "Plain"}  # by section
# Sections of settings that differ in one option, each from one of these.
VARIANTS = {
    "Priors": ("priors", ["dls-0.01"]),
    "Adjustment": ("adjustment", ["dls-0.01"]),
    "Entries each layer sends at least": ("floor", ["dls-0.001", "dls-0.001-corrected"]),
    "Momentum": ("momentum", ["dls-0.01-corrected"]),
    "Output layer": ("output", ["dls-0.01-corrected", "dls-0.001-corrected"]),
    "Where layer-wise top-k wins": ("lumps", ["dls-0.001", "layerwise-0.001", "global-0.001"]),
}
CHOICE = """Global top-k and a constant threshold (for as many entries as reach it) are ideal by
construction.
"""
ADAM = """Its moments are the optimizer's own, of sparse sums; with momentum correction the first is
in the compressor. The density warms up as above; the learning rate is the best for dense training.
"""


# Figures ------------------------------------------------------------------------------------------


def shown(task: Task, value: float, sign: bool = False) -> str:
    """A value of the task's metric, or a difference of two."""
    plus = "+" if sign else ""
    return f"{100 * value:{plus}.1f}" if task.accuracy else f"{value:{plus}.3f}"


def metric(group: Group) -> str:
    """Mean and standard deviation over seeds; or how many runs diverged."""
    values, lost = group.values(), len(group.results) - len(group.finished)
    text = shown(group.task, values.mean()) if len(values) else ""
    if len(values) > 1:
        text += f" ± {shown(group.task, values.std(ddof=1))}"
    if len(values) > len(SEEDS):
        text += f" ({len(values)})"
    parts = [text, f"{lost} of {len(group.results)} diverged" if lost else ""]
    return ", ".join(part for part in parts if part)


def difference(group: Group, beside: Group | None, what: str = "metric") -> str:
    """Of means; in brackets if it is within noise, as the page explains."""
    if beside is None or beside is group:
        return "-"
    own, other = group.values(what), beside.values(what)
    if not len(own) or not len(other):
        return "-"
    text = shown(group.task, own.mean() - other.mean(), sign=True)
    if min(len(own), len(other)) < 2:
        return text + "?"
    return f"({text})" if within_noise(own, other) else text


def within_noise(own: np.ndarray, other: np.ndarray) -> bool:
    noise = 2 * np.sqrt(own.var(ddof=1) / len(own) + other.var(ddof=1) / len(other))
    return bool(abs(own.mean() - other.mean()) <= noise)


def number(value: float, digits: int = 3) -> str:
    return "-" if np.isnan(value) else f"{value:.{digits}f}"


def kilobytes(group: Group) -> str:
    sparse, dense = group.mean("sparse_bytes") / 1e3, group.mean("dense_bytes") / 1e3
    if group.density is None:
        return f"{dense:,.1f}"
    return f"{sparse + dense:,.1f} ({dense:,.1f} dense)"


def like_with_like(groups: Groups, group: Group) -> Group | None:
    """Global top-k of the same density, with momentum in the same place."""
    if group.density is None:
        return None
    ending = CORRECTED if group.setting.endswith(CORRECTED) else ""
    return groups.get(group.task.name, f"global-{group.density:g}{ending}", group.workers)


# Tables -------------------------------------------------------------------------------------------


def summary(groups: Groups, section: str) -> str:
    """A difference from dense for each way to train in a section, and each task."""
    tasks = groups.tasks()
    head = ["density", "", *(f"{name}: {unit(TASKS[name])}" for name in tasks)]
    rows = []
    for name, setting in sorted(SETTINGS.items(), key=lambda item: falling_density(item[1])):
        own = [groups.get(task, name) for task in tasks]
        if name != "dense" and (setting.section != section or not any(own)):
            continue
        density = "" if setting.options is None else f"{setting.options['density']:.1%}"
        cells = []
        for task, group in zip(tasks, own, strict=True):
            if group is None:
                cells.append("-")
            elif name == "dense":
                cells.append(metric(group))
            else:
                cells.append(difference(group, groups.get(task, "dense")))
        rows.append([density, setting.title, *cells])
    return markdown(head, rows)


def strategies(groups: Groups, task: str, section: str, density: float) -> str:
    own = groups.some(task, section, density=density)
    dense = groups.get(task, "dense")
    of_loss = ["held-out loss"] if TASKS[task].accuracy else []
    head = ["", unit(TASKS[task]), "from dense", "from global", *of_loss, "energy", "misallocation"]
    head += ["least", "shared", "entries sent", "kB per step and rank"]
    rows = []
    for group in [*([dense] if dense else []), *own]:
        losses = group.values("loss")
        rows.append(
            [
                group.title,
                metric(group),
                difference(group, dense),
                difference(group, like_with_like(groups, group)),
                *([number(losses.mean() if len(losses) else np.nan)] if of_loss else []),
                number(group.quality("energy")),
                number(group.quality("misallocation")),
                number(group.quality("least", of="shared")),
                number(group.quality("misallocation", of="shared")),
                f"{group.mean('entries_sent'):,.0f}",
                kilobytes(group),
            ]
        )
    return markdown(head, rows)


def variants(groups: Groups, task: str, section: str, usual: str) -> str:
    """Settings that differ from a usual one, which their names begin with, in one option."""
    default = groups.get(task, usual)
    own = [
        group
        for group in groups.some(task, section)
        if group.setting.startswith(usual)
        and (usual.endswith(CORRECTED) or CORRECTED not in group.setting)
    ]
    if default is None or not own:
        return ""
    name = f"prior {DLSConfig().prior} (default)" if section == "priors" else "default"
    first = FIRST_STEPS / default.results[0]["about"]["steps"]
    where = "" if SETTINGS[usual].section == "plain" else ", momentum correction"
    of = f"{task}: {SETTINGS[usual].title}, {default.density:.1%}{where}"
    head = [of, unit(default.task), "from default"]
    head += [f"energy: first {FIRST_STEPS} steps", "second half"]
    head += [f"misallocation: first {FIRST_STEPS} steps", "second half"]
    rows = []
    for group in [default, *own]:
        qualities = [
            number(group.quality(what, *part))
            for what in ("energy", "misallocation")
            for part in ((0.0, first), (0.5, 1.0))
        ]
        title = name if group is default else group.title
        rows.append([title, metric(group), difference(group, default), *qualities])
    return markdown(head, rows)


def lengths(groups: Groups) -> str:
    """Longer training, dense and sparse, beside the usual."""
    rows = []
    for task in groups.tasks():
        for group in groups.some(task, "length"):
            if group.density is None:
                usual, dense = groups.get(task, "dense"), None
            else:
                usual = groups.get(task, group.setting.replace("-long", "-corrected"))
                dense = groups.get(task, "dense-long")
            rows.append(
                [
                    task,
                    group.title + ("" if group.density is None else f", {group.density:.1%}"),
                    str(group.results[0]["about"]["steps"]),
                    metric(group),
                    difference(group, dense),
                    difference(group, usual),
                ]
            )
    head = ["", "", "steps", "metric", "from dense, as long", "from the usual length"]
    return markdown(head, rows) if rows else ""


def adam(groups: Groups) -> str:
    """Adam in place of SGD."""
    rows = []
    for task in groups.tasks():
        dense = groups.get(task, "dense-adam")
        for group in groups.some(task, "adam"):
            density = "" if group.density is None else f", {group.density:.1%}"
            best = groups.get(task, f"global-{group.density:g}-adam") if density else None
            rows.append(
                [
                    task,
                    group.title + density,
                    metric(group),
                    difference(group, dense),
                    difference(group, best),
                    number(group.quality("energy")),
                    number(group.quality("misallocation")),
                ]
            )
    head = ["", "", "metric", "from dense", "from global", "energy", "misallocation"]
    return markdown(head, rows) if rows else ""


def more_workers(groups: Groups, task: str) -> str:
    """The same batch, shared among more workers."""
    rows = []
    names = [name for name in SETTINGS if len(groups.workers(task, name)) > 1]
    for workers in sorted({w for name in names for w in groups.workers(task, name)}):
        dense = groups.get(task, "dense", workers)
        for name in names:
            if (group := groups.get(task, name, workers)) is None:
                continue
            rows.append(
                [
                    str(workers),
                    group.title + ("" if group.density is None else f", {group.density:.1%}"),
                    metric(group),
                    difference(group, dense),
                    difference(group, like_with_like(groups, group)),
                    number(group.quality("energy")),
                    number(group.quality("misallocation")),
                    kilobytes(group),
                ]
            )
    head = [f"{task}: workers", "", unit(TASKS[task]), "from dense", "from global", "energy"]
    head += ["misallocation", "kB per step and rank"]
    return markdown(head, rows) if rows else ""


def rates(groups: Groups) -> str:
    """Dense training with other learning rates."""
    rows = []
    for task in groups.tasks():
        dense, others = groups.get(task, "dense"), groups.some(task, "rates")
        if dense is None or not others:
            continue
        for group in sorted([dense, *others], key=lambda g: g.results[0]["about"]["rate"]):
            losses = group.values("loss")
            rows.append(
                [
                    task,
                    f"{group.results[0]['about']['rate']:g}" + " (used)" * (group is dense),
                    metric(group),
                    number(losses.mean() if len(losses) else np.nan),
                    difference(group, dense),
                ]
            )
    head = ["", "learning rate", "metric", "held-out loss", "from the one used"]
    return markdown(head, rows) if rows else ""


# The page -----------------------------------------------------------------------------------------


def introduction(results: Sequence[Result]) -> str:
    machines = {json.dumps(r["machine"], sort_keys=True): r["machine"] for r in results}
    on = "; ".join(
        f"{m['cores']} cores, {m['processor']}, Python {m['python']}, torch {m['torch']}, "
        f"NumPy {m['numpy']}"
        for m in machines.values()
    )
    hours = sum(r["seconds"] for r in results) / 3600
    warmups = " and ".join(f"{share:.0%} (density {d:.1%})" for d, share in WARMUP.items())
    return f"""# Does sparse training reach dense accuracy?

Made by `python -m benchmarks.convergence`: {len(results)} runs, {hours:.1f} hours of one core
({on}).

- {WORKERS} workers, if nothing else is said, simulated in one process with the sessions that ranks
  have; a test compares two of them with a real Horovod job of two ranks, to the bit. {len(SEEDS)}
  seeds; more where a number in brackets follows. A seed sets first weights and the order of the
  examples, the same for all strategies.
- SGD throughout, with momentum {MOMENTUM}; the learning rate rises for the first tenth of the steps
  and falls as a cosine. Its peak is the best found for dense training, by held-out loss;
  all strategies use it, for the same number of steps. Batch norm's statistics are worker 0's.
- *Momentum correction and warm-up*: momentum is in the compressor, before the selection, and the
  density falls from {DLSConfig().warmup_density:.0%} in the first {warmups} of the steps.
  *Plain*: momentum is in the optimizer, and nothing warms up but the learning rate.
- Momentum correction clears the momentum of entries that are sent, but for tasks that say
  otherwise: whichever was better for DLS at {DENSITIES[0]:.0%} (see Momentum), and so for all.
- The constant threshold is, for each task, density and seed, the median over the second half of
  DLS's run of the layers' mean threshold.
- ± is the standard deviation over seeds. A difference d in brackets is within noise:
  |d| ≤ 2 √(s₁²/n₁ + s₂²/n₂); one with a question mark is of single runs. *From global* compares
  with global top-k of the same density, with momentum in the same place.
- Energy and misallocation are worker 0's, beside exact global top-k of the same accumulators
  (1 and 0 are ideal): medians over the second half of the steps. All ranks of DLS send the same
  k_l, and the best that could be is the mean over ranks of what each one's exact global top-k would
  send of a layer. *Least* is what worker 0's misallocation would be, with the accumulators that
  there are, if that were sent; *shared* is how far what was sent is from it (both every
  {MEASURE_ALL} steps; where missing, they were not kept).
"""


def about_task(groups: Groups, task: str) -> str:
    results = [group.results[0] for group in groups.some(task)]
    first, said = results[0], TASKS[task].about
    steps = min(result["about"]["steps"] for result in results)
    return (
        f"{said[0].upper()}{said[1:]}. {first['entries']:,} parameters, {steps} steps of "
        f"{first['about']['batch']} examples, learning rate {TASKS[task].rate:g}"
        f"{'' if TASKS[task].masking else '; momentum of sent entries is kept'}.\n"
    )


def page(groups: Groups, results: Sequence[Result], pictures: dict[str, str]) -> str:
    tasks = groups.tasks()
    better = "Higher accuracy is better, lower loss is.\n"
    parts = [introduction(results), "## Differences from dense\n", better]
    for section, title in MOMENTUM_IS.items():
        if groups.some(None, section):
            parts += [f"{title}:\n", summary(groups, section)]
    parts += [pictures["metrics"], pictures["curves"]]
    for task in tasks:
        parts += [f"## Task {task}\n", about_task(groups, task)]
        for density, (section, title) in itertools.product(DENSITIES, MOMENTUM_IS.items()):
            if groups.some(task, section, density=density):
                parts += [f"Density {density:.1%}, {title[0].lower()}{title[1:]}:\n"]
                parts += [strategies(groups, task, section, density)]
    if table := lengths(groups):
        parts += ["## Longer training\n", table]
    parts += ["## What is chosen\n", CHOICE, pictures["quality"], pictures.get("layers", "")]
    for title, (section, usuals) in VARIANTS.items():
        tables = [variants(groups, task, section, u) for task in tasks for u in usuals]
        parts += [f"## {title}\n", *tables] if any(tables) else []
    if table := adam(groups):
        parts += ["## Adam\n", ADAM, table]
    if any(tables := [more_workers(groups, task) for task in tasks]):
        parts += ["## More workers\n", "The batch is the same, shared among more.\n", *tables]
    if table := rates(groups):
        parts += ["## Learning rates\n", "Dense training with other peaks:\n", table]
    parts += ["## Time to a target\n", *times.section(groups)]
    return "\n".join(part for part in parts if part)


def build(folder: Path, file: Path, steps: int | None = None) -> None:
    """Makes the page from all results in a folder, and pictures in ``images`` beside it."""
    results = load(folder, steps)
    if not results:
        raise SystemExit(f"no results in {folder}")
    groups = Groups(results)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page(groups, results, draw(groups, file.parent / "images")))
