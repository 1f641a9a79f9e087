"""Runs: which there are, what each of them follows from, and where its result is kept."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.convergence.settings import (
    MOMENTUM,
    MORE_SEEDS,
    MORE_WORKERS,
    NEAR_NOISE,
    SEEDS,
    SETTINGS,
    TASKS_OF,
    WORKERS,
)
from benchmarks.convergence.tasks import TASKS

VERSION = 1  # of what a run does and keeps


class Run(NamedTuple):
    """One training.

    Attributes:
        task: one of TASKS.
        setting: one of SETTINGS.
        workers: number of workers.
        seed: of first weights and the order of examples.
    """

    task: str
    setting: str
    workers: int
    seed: int

    def file(self, folder: Path) -> Path:
        """Returns where its result is kept in a folder of results."""
        return folder / self.task / f"{self.setting}-{self.workers}-{self.seed}.json"

    def needs(self) -> Run | None:
        """Returns the run whose result it needs, if any: a constant threshold is that of DLS."""
        options = SETTINGS[self.setting].options or {}
        if options.get("strategy") != "hard":
            return None
        return self._replace(setting=self.setting.replace("hard", "dls"))


def all_runs(tasks: Iterable[str], settings: Iterable[str], seeds: Iterable[int]) -> list[Run]:
    """Lists runs, seed by seed; what a run needs comes before it, asked for or not.

    Args:
        tasks: names.
        settings: names or patterns of names.
        seeds: of each setting.
    """
    runs: dict[Run, None] = {}
    for seed, task, (name, setting) in itertools.product(seeds, tasks, SETTINGS.items()):
        if task not in TASKS_OF[setting.section] or not any(fnmatch(name, p) for p in settings):
            continue
        if setting.masking == TASKS[task].masking:  # the usual
            continue
        for workers in (WORKERS, *MORE_WORKERS.get((task, name), ())):
            run = Run(task, name, workers, seed)
            runs |= {needed: None for needed in (run.needs(), run) if needed}
    return list(runs)


def usual_runs(tasks: Iterable[str], settings: Iterable[str]) -> list[Run]:
    """Lists runs as ``all_runs``, with the seeds that the page has."""
    more = all_runs(tasks, settings, MORE_SEEDS)
    return all_runs(tasks, settings, SEEDS) + [
        run for run in more if (run.task, run.setting) in NEAR_NOISE and run.workers == WORKERS
    ]


def description(run: Run, steps: int | None, folder: Path) -> dict[str, Any]:
    """Returns all that a run's result follows from.

    Args:
        run: the run.
        steps: of the training; None: the task's.
        folder: with the result of the run that it needs.
    """
    task, setting = TASKS[run.task], SETTINGS[run.setting]
    steps = steps or (task.longer if setting.longer else 1) * task.steps
    options = None
    if setting.options is not None:
        options = dict(setting.options)
        if setting.warmup:
            options["warmup_steps"] = round(setting.warmup * steps)
        if setting.momentum == "compressor":
            options["momentum"] = MOMENTUM
            if not (task.masking if setting.masking is None else setting.masking):
                options["momentum_masking"] = False
        if setting.dense_output:
            options["layer_density"] = {task.output: "dense"}
        if needed := run.needs():
            options["threshold"] = usual_threshold(json.loads(needed.file(folder).read_text()))
    # "adam" stands only where it is so: results from before there was a choice still count.
    return {
        "version": VERSION,
        **run._asdict(),
        "steps": steps,
        "rate": setting.rate * (task.adam_rate if setting.adam else task.rate),
        "batch": task.batch,
        "options": options,
        "optimizer_momentum": MOMENTUM if setting.momentum == "optimizer" else 0.0,
    } | ({"adam": True} if setting.adam else {})


def read(run: Run, steps: int | None, folder: Path) -> dict[str, Any] | None:
    """Reads a run's result; None if there is none, or if a run would do something else now.

    Args:
        run: the run.
        steps: of the training; None: the task's.
        folder: of results.
    """
    file = run.file(folder)
    needed = run.needs()
    if not file.exists() or (needed and not needed.file(folder).exists()):
        return None
    result: dict[str, Any] = json.loads(file.read_text())
    return result if result["about"] == description(run, steps, folder) else None


def usual_threshold(result: dict[str, Any]) -> float:
    """Computes the median, over the second half of a run, of the layers' mean threshold."""
    layers = result["layers"]
    means = np.mean(layers["thresholds"], axis=1)
    return float(np.median(means[len(means) // 2 :]))
