"""Tables of docs/convergence.md."""

from __future__ import annotations

import numpy as np

from benchmarks.common.reporting import markdown
from benchmarks.convergence.results import CORRECTED, Group, Groups, falling_density, unit
from benchmarks.convergence.settings import SEEDS, SETTINGS
from benchmarks.convergence.tasks import TASKS, Task
from hvd_dls.config import DLSConfig

FIRST_STEPS = 10  # in which a prior shows


def format_value(task: Task, value: float, sign: bool = False) -> str:
    """Formats a value of the task's metric; with a sign, a difference of two."""
    plus = "+" if sign else ""
    return f"{100 * value:{plus}.1f}" if task.accuracy else f"{value:{plus}.3f}"


def metric(group: Group) -> str:
    """Formats mean and standard deviation over seeds, and how many runs diverged."""
    values, lost = group.values(), len(group.results) - len(group.finished)
    text = format_value(group.task, values.mean()) if len(values) else ""
    if len(values) > 1:
        text += f" ± {format_value(group.task, values.std(ddof=1))}"
    if len(values) > len(SEEDS):
        text += f" ({len(values)})"
    parts = [text, f"{lost} of {len(group.results)} diverged" if lost else ""]
    return ", ".join(part for part in parts if part)


def difference(group: Group, beside: Group | None, what: str = "metric") -> str:
    """Formats a difference of means, in brackets if it is within noise, as the page explains.

    Args:
        group: of runs.
        beside: the group to compare with; None: there is none.
        what: the figure, see ``Group.values``.
    """
    if beside is None or beside is group:
        return "-"
    own, other = group.values(what), beside.values(what)
    if not len(own) or not len(other):
        return "-"
    text = format_value(group.task, own.mean() - other.mean(), sign=True)
    if min(len(own), len(other)) < 2:
        return text + "?"
    return f"({text})" if within_noise(own, other) else text


def within_noise(own: np.ndarray, other: np.ndarray) -> bool:
    """Tells whether two means differ by less than twice their difference's standard error."""
    noise = 2 * np.sqrt(own.var(ddof=1) / len(own) + other.var(ddof=1) / len(other))
    return bool(abs(own.mean() - other.mean()) <= noise)


def format_number(value: float, digits: int = 3) -> str:
    """Formats a number; NaN as "-"."""
    return "-" if np.isnan(value) else f"{value:.{digits}f}"


def kilobytes(group: Group) -> str:
    """Formats the bytes of a step and rank."""
    sparse, dense = group.mean("sparse_bytes") / 1e3, group.mean("dense_bytes") / 1e3
    if group.density is None:
        return f"{dense:,.1f}"
    return f"{sparse + dense:,.1f} ({dense:,.1f} dense)"


def global_like(groups: Groups, group: Group) -> Group | None:
    """Returns global top-k of the same density, with momentum in the same place."""
    if group.density is None:
        return None
    ending = CORRECTED if group.setting.endswith(CORRECTED) else ""
    return groups.get(group.task.name, f"global-{group.density:g}{ending}", group.workers)


def summary_table(groups: Groups, section: str) -> str:
    """Formats differences from dense: a row for each setting of a section, a column per task."""
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


def strategy_table(groups: Groups, task: str, section: str, density: float) -> str:
    """Formats all figures of a task's settings in a section, for one density."""
    own = groups.select(task, section, density=density)
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
                difference(group, global_like(groups, group)),
                *([format_number(losses.mean() if len(losses) else np.nan)] if of_loss else []),
                format_number(group.quality("energy")),
                format_number(group.quality("misallocation")),
                format_number(group.quality("least", of="shared")),
                format_number(group.quality("misallocation", of="shared")),
                f"{group.mean('entries_sent'):,.0f}",
                kilobytes(group),
            ]
        )
    return markdown(head, rows)


def variant_table(groups: Groups, task: str, section: str, usual: str) -> str:
    """Formats settings that differ from a usual one in one option.

    Args:
        groups: all results.
        task: its name.
        section: of the settings.
        usual: the setting whose name theirs begin with.

    Returns:
        The table; empty if there are no results.
    """
    default = groups.get(task, usual)
    own = [
        group
        for group in groups.select(task, section)
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
            format_number(group.quality(what, *part))
            for what in ("energy", "misallocation")
            for part in ((0.0, first), (0.5, 1.0))
        ]
        title = name if group is default else group.title
        rows.append([title, metric(group), difference(group, default), *qualities])
    return markdown(head, rows)


def length_table(groups: Groups) -> str:
    """Formats longer training, dense and sparse, beside the usual; empty without results."""
    rows = []
    for task in groups.tasks():
        for group in groups.select(task, "length"):
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


def adam_table(groups: Groups) -> str:
    """Formats Adam in place of SGD; empty without results."""
    rows = []
    for task in groups.tasks():
        dense = groups.get(task, "dense-adam")
        for group in groups.select(task, "adam"):
            density = "" if group.density is None else f", {group.density:.1%}"
            best = groups.get(task, f"global-{group.density:g}-adam") if density else None
            rows.append(
                [
                    task,
                    group.title + density,
                    metric(group),
                    difference(group, dense),
                    difference(group, best),
                    format_number(group.quality("energy")),
                    format_number(group.quality("misallocation")),
                ]
            )
    head = ["", "", "metric", "from dense", "from global", "energy", "misallocation"]
    return markdown(head, rows) if rows else ""


def worker_table(groups: Groups, task: str) -> str:
    """Formats the same batch, shared among more workers; empty without results."""
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
                    difference(group, global_like(groups, group)),
                    format_number(group.quality("energy")),
                    format_number(group.quality("misallocation")),
                    kilobytes(group),
                ]
            )
    head = [f"{task}: workers", "", unit(TASKS[task]), "from dense", "from global", "energy"]
    head += ["misallocation", "kB per step and rank"]
    return markdown(head, rows) if rows else ""


def rate_table(groups: Groups) -> str:
    """Formats dense training with other learning rates; empty without results."""
    rows = []
    for task in groups.tasks():
        dense, others = groups.get(task, "dense"), groups.select(task, "rates")
        if dense is None or not others:
            continue
        for group in sorted([dense, *others], key=lambda g: g.results[0]["about"]["rate"]):
            losses = group.values("loss")
            rows.append(
                [
                    task,
                    f"{group.results[0]['about']['rate']:g}" + " (used)" * (group is dense),
                    metric(group),
                    format_number(losses.mean() if len(losses) else np.nan),
                    difference(group, dense),
                ]
            )
    head = ["", "learning rate", "metric", "held-out loss", "from the one used"]
    return markdown(head, rows) if rows else ""
