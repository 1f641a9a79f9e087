"""Results of runs, grouped by task, setting and number of workers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.convergence.runs import Run, read
from benchmarks.convergence.settings import SETTINGS, WORKERS, Setting
from benchmarks.convergence.tasks import TASKS, Task

CORRECTED = "-corrected"  # ending of names
Result = dict[str, Any]


class Group(NamedTuple):
    """Results that differ in nothing but their seed.

    Attributes:
        task: what was trained.
        setting: one of SETTINGS.
        workers: number of workers.
        results: by seed.
    """

    task: Task
    setting: str
    workers: int
    results: list[Result]

    @property
    def title(self) -> str:
        """Name for tables and pictures."""
        setting = SETTINGS[self.setting]
        return setting.title + (", plain" if setting.section == "plain" else "")

    @property
    def density(self) -> float | None:
        """Density of the compressor; None: dense."""
        options = SETTINGS[self.setting].options
        return None if options is None else options["density"]

    @property
    def finished(self) -> list[Result]:
        """Results of runs that did not diverge."""
        return [result for result in self.results if result["diverged"] is None]

    def values(self, what: str = "metric") -> np.ndarray:
        """Returns a figure of each run that did not diverge.

        Args:
            what: its name in a result; "metric": the one by which the task is judged.
        """
        if what == "metric":
            what = "accuracy" if self.task.accuracy else "loss"
        return np.array([result[what] for result in self.finished], float)

    def quality(
        self, what: str, first: float = 0.5, last: float = 1.0, of: str = "quality"
    ) -> float:
        """Computes the median of a figure over the steps in a part of the training, of all runs.

        Args:
            what: "energy" or "misallocation"; or "least", of "shared".
            first, last: where the part begins and ends, from 0 to 1.
            of: "quality": what worker 0 measured; "shared": beside the mean of all workers' ideals.
        """
        found = []
        for result in self.results:
            curve = result.get(of, {})
            if what in curve:
                steps = np.array(curve["step"]) / result["about"]["steps"]
                found.append(np.array(curve[what])[(steps > first) & (steps <= last)])
        everything = np.concatenate(found) if found else np.array([])
        return float(np.median(everything)) if len(everything) else np.nan

    def mean(self, what: str) -> float:
        """Computes the mean of a figure over all runs."""
        return float(np.mean([result[what] for result in self.results]))


class Groups:
    """All results, by task, setting and number of workers.

    Args:
        results: of any runs.
    """

    def __init__(self, results: Iterable[Result]) -> None:
        found: dict[tuple[str, str, int], list[Result]] = {}
        for result in results:
            about = result["about"]
            found.setdefault((about["task"], about["setting"], about["workers"]), []).append(result)
        self._groups = {
            key: Group(TASKS[key[0]], *key[1:], sorted(own, key=lambda r: r["about"]["seed"]))
            for key, own in found.items()
        }

    def get(self, task: str, setting: str, workers: int = WORKERS) -> Group | None:
        """Returns a group, or None if there are no such results."""
        return self._groups.get((task, setting, workers))

    def select(
        self, task: str | None = None, *sections: str, density: float | None = None
    ) -> list[Group]:
        """Returns groups with the usual number of workers, the denser first.

        Args:
            task: its name; None: all tasks.
            *sections: of settings; none: all sections.
            density: of the compressor; None: all densities, and dense.
        """
        return [
            group
            for name, setting in sorted(SETTINGS.items(), key=lambda x: falling_density(x[1]))
            for key, group in self._groups.items()
            if key[1:] == (name, WORKERS)
            and task in (None, key[0])
            and (not sections or setting.section in sections)
            and density in (None, group.density)
        ]

    def tasks(self) -> list[str]:
        """Returns the names of tasks that have results."""
        return [name for name in TASKS if any(key[0] == name for key in self._groups)]

    def workers(self, task: str, setting: str) -> list[int]:
        """Returns the numbers of workers that a task and setting have results of."""
        return sorted(key[2] for key in self._groups if key[:2] == (task, setting))


def load(folder: Path, steps: int | None = None) -> list[Result]:
    """Reads all results from a folder that runs would give now, too.

    Args:
        folder: of results.
        steps: of every run; None: the task's.
    """
    results = []
    for file in sorted(folder.glob("*/*.json")):
        about = json.loads(file.read_text())["about"]
        run = Run(*(about[field] for field in Run._fields))
        if run.task in TASKS and run.setting in SETTINGS:
            result = read(run, steps, folder)
            results += [result] if result else []
    return results


def falling_density(setting: Setting) -> float:
    """Returns a key to sort settings by: dense first."""
    return 0.0 if setting.options is None else 1 - float(setting.options["density"])


def unit(task: Task) -> str:
    """Returns a task's metric and its unit."""
    return "accuracy, %" if task.accuracy else "loss, nats a character"
