"""Builds docs/convergence.md and its pictures from the results that are kept.

All figures of the page come from results.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.convergence import times
from benchmarks.convergence.pictures import draw
from benchmarks.convergence.results import Groups, Result, load
from benchmarks.convergence.settings import DENSITIES, MOMENTUM, SEEDS, WARMUP, WORKERS
from benchmarks.convergence.tables import (
    adam_table,
    length_table,
    rate_table,
    strategy_table,
    summary_table,
    variant_table,
    worker_table,
)
from benchmarks.convergence.tasks import TASKS
from benchmarks.convergence.training import MEASURE_ALL
from hvd_dls.config import DLSConfig

# Sections of settings, by where momentum is.
MOMENTUM_SECTIONS = {"strategies": "Momentum correction and warm-up", "plain": "Plain"}
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


def introduction(results: Sequence[Result]) -> str:
    """Returns the first section: what was run, and what the figures mean."""
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
    """Describes a task: data, model and training."""
    results = [group.results[0] for group in groups.select(task)]
    first, about = results[0], TASKS[task].about
    steps = min(result["about"]["steps"] for result in results)
    return (
        f"{about[0].upper()}{about[1:]}. {first['entries']:,} parameters, {steps} steps of "
        f"{first['about']['batch']} examples, learning rate {TASKS[task].rate:g}"
        f"{'' if TASKS[task].masking else '; momentum of sent entries is kept'}.\n"
    )


def page(groups: Groups, results: Sequence[Result], pictures: dict[str, str]) -> str:
    """Returns the whole page; sections without results are left out."""
    tasks = groups.tasks()
    better = "Higher accuracy is better, lower loss is.\n"
    parts = [introduction(results), "## Differences from dense\n", better]
    for section, title in MOMENTUM_SECTIONS.items():
        if groups.select(None, section):
            parts += [f"{title}:\n", summary_table(groups, section)]
    parts += [pictures["metrics"], pictures["curves"]]
    for task in tasks:
        parts += [f"## Task {task}\n", about_task(groups, task)]
        for density, (section, title) in itertools.product(DENSITIES, MOMENTUM_SECTIONS.items()):
            if groups.select(task, section, density=density):
                parts += [f"Density {density:.1%}, {title[0].lower()}{title[1:]}:\n"]
                parts += [strategy_table(groups, task, section, density)]
    if table := length_table(groups):
        parts += ["## Longer training\n", table]
    parts += ["## What is chosen\n", CHOICE, pictures["quality"], pictures.get("layers", "")]
    for title, (section, usuals) in VARIANTS.items():
        tables = [variant_table(groups, task, section, u) for task in tasks for u in usuals]
        parts += [f"## {title}\n", *tables] if any(tables) else []
    if table := adam_table(groups):
        parts += ["## Adam\n", ADAM, table]
    if any(tables := [worker_table(groups, task) for task in tasks]):
        parts += ["## More workers\n", "The batch is the same, shared among more.\n", *tables]
    if table := rate_table(groups):
        parts += ["## Learning rates\n", "Dense training with other peaks:\n", table]
    parts += ["## Time to a target\n", *times.section(groups)]
    return "\n".join(part for part in parts if part)


def build(folder: Path, file: Path, steps: int | None = None) -> None:
    """Makes the page and its pictures.

    Args:
        folder: of results.
        file: the page; pictures go to a folder ``images`` beside it.
        steps: of every run; None: the task's.
    """
    results = load(folder, steps)
    if not results:
        raise SystemExit(f"no results in {folder}")
    groups = Groups(results)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page(groups, results, draw(groups, file.parent / "images")))
