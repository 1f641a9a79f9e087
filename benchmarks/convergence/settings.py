"""The ways to train that convergence.py compares, and which of them each task is trained in.

A new way to train is a new line in SETTINGS.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.convergence.tasks import TASKS
from hvd_dls.config import DLSConfig

VERSION = 1  # of what a run does and keeps
MOMENTUM = 0.9
WORKERS = 4
SEEDS = (0, 1, 2)
MORE_SEEDS = (3, 4)
DENSITIES = (0.01, 0.001)
WARMUP = {0.01: 0.1, 0.001: 0.3}  # share of the steps, by density
STRATEGIES = {
    "dls": "DLS",
    "layerwise": "layer-wise top-k",
    "global": "global top-k",
    "norm": "by the layers' norms",
    "hard": "constant threshold",
}


class Setting(NamedTuple):
    """A way to train.

    Attributes:
        title: as tables call it.
        options: of the compressor; None: dense.
        section: of the page; decides which tasks it is tried with.
        momentum: where it lives: in the "optimizer", or in the "compressor" (then ``options`` get
            it, and the optimizer has none).
        warmup: share of the steps in which the density goes down.
        rate: factor on the task's learning rate.
        longer: whether it trains for more steps, as the task says.
        masking: of momentum correction; None: the task's.
        dense_output: whether the task's output layer goes dense.
        adam: whether Adam takes the place of SGD, with the task's rate for it.
    """

    title: str
    options: dict[str, Any] | None
    section: str = "strategies"
    momentum: str = "optimizer"
    warmup: float = 0.0
    rate: float = 1.0
    longer: bool = False
    masking: bool | None = None
    dense_output: bool = False
    adam: bool = False


def _settings() -> Iterator[tuple[str, Setting]]:
    yield "dense", Setting("dense", None)
    for density, (strategy, title) in itertools.product(DENSITIES, STRATEGIES.items()):
        setting = Setting(title, {"strategy": strategy, "density": density})
        if strategy not in ("norm", "hard"):
            yield f"{strategy}-{density:g}", setting._replace(section="plain")
        elif density != DENSITIES[0]:
            continue
        corrected = setting._replace(momentum="compressor", warmup=WARMUP[density])
        yield f"{strategy}-{density:g}-corrected", corrected
        if strategy == "dls":
            yield f"{strategy}-{density:g}-long", corrected._replace(section="length", longer=True)
    yield "dense-long", Setting("dense", None, "length", longer=True)
    yield from _variants()


def _variants() -> Iterator[tuple[str, Setting]]:
    for prior in ("paper", "weight_norm", "uniform", "measured"):
        if prior != DLSConfig().prior:  # which is plain DLS
            options = {"density": 0.01, "prior": prior}
            yield f"dls-0.01-{prior}", Setting(f"prior {prior}", options, "priors")
    for option, value, title in (
        ("pair_steps", 1, "DLS(1): one exchange a step"),
        ("pair_steps", 4, "DLS(4): four exchanges a step"),
        ("adjust_every", 4, "one threshold, every fourth step"),
    ):
        options = {"density": 0.01, option: value}
        yield f"dls-0.01-{option}-{value}", Setting(title, options, "adjustment")
    floor = Setting("min_k=16", {"density": 0.001, "min_k": 16}, "floor")
    yield "dls-0.001-min_k-16", floor
    corrected = floor._replace(momentum="compressor", warmup=WARMUP[0.001])
    yield "dls-0.001-corrected-min_k-16", corrected
    for name, title, change in (
        ("kept", "momentum of sent entries kept", {"masking": False}),
        ("cleared", "momentum of sent entries cleared", {"masking": True}),
        ("nesterov", "Nesterov momentum", {"options": {"density": 0.01, "nesterov": True}}),
        ("no", "no warm-up", {"warmup": 0.0}),
    ):
        usual = Setting(title, {"density": 0.01}, "momentum", momentum="compressor", warmup=0.1)
        yield f"dls-0.01-corrected-{name}", usual._replace(**change)
    dense = Setting("dense", None, "adam", adam=True)
    yield "dense-adam", dense
    for strategy in ("dls", "layerwise", "global"):
        options = {"strategy": strategy, "density": 0.01}
        sparse = dense._replace(title=STRATEGIES[strategy], options=options, warmup=WARMUP[0.01])
        yield f"{strategy}-0.01-adam", sparse
        if strategy == "dls":
            title = f"{STRATEGIES[strategy]}, momentum correction"
            corrected = sparse._replace(title=title, momentum="compressor")
            yield f"{strategy}-0.01-adam-corrected", corrected
    for density in DENSITIES:
        options = {"density": density}
        usual = Setting("output layer dense", options, "output", "compressor", WARMUP[density])
        yield f"dls-{density:g}-corrected-output", usual._replace(dense_output=True)
    for strategy in ("dls", "layerwise", "global"):
        options = {"strategy": strategy, "density": 0.001}
        for name, title, change in (
            ("output", "output layer dense", {"dense_output": True}),
            ("quarter", "a quarter of the learning rate", {"rate": 0.25}),
        ):
            yield f"{strategy}-0.001-{name}", Setting(title, options, "lumps")._replace(**change)
    for factor, title in ((0.5, "half the learning rate"), (2.0, "twice the learning rate")):
        yield f"dense-rate-{factor:g}", Setting(f"dense, {title}", None, "rates", rate=factor)


SETTINGS = dict(_settings())
TASKS_OF = {
    "strategies": tuple(TASKS),
    "plain": ("digits", "images", "text"),
    "length": ("text", "code"),
    "priors": ("digits", "text"),
    "adjustment": ("digits", "text"),
    "floor": ("images",),
    "momentum": tuple(TASKS),
    "adam": ("code",),
    "output": ("images", "code"),
    "lumps": ("images",),
    "rates": ("digits", "images"),
}
# Settings that are tried with more workers, too, by task.
MORE_WORKERS = {
    ("digits", name): (8, 16)
    for name in ("dense", "dls-0.01-corrected", "layerwise-0.01-corrected")
} | {("digits", "global-0.01-corrected"): (8,)}

# Settings, by task, that differ by little more than their seeds make them: they get MORE_SEEDS.
NEAR_NOISE = {
    (task, name)
    for task in ("digits", "images", "text")
    for name in (
        "dense",
        *(f"{s}-{d:g}-corrected" for s in ("dls", "layerwise", "global") for d in DENSITIES),
    )
}


class Run(NamedTuple):
    """One training."""

    task: str
    setting: str
    workers: int
    seed: int

    def file(self, folder: Path) -> Path:
        return folder / self.task / f"{self.setting}-{self.workers}-{self.seed}.json"

    def needs(self) -> Run | None:
        """A run that must be there first: a constant threshold is DLS's."""
        options = SETTINGS[self.setting].options or {}
        if options.get("strategy") != "hard":
            return None
        return self._replace(setting=self.setting.replace("hard", "dls"))


def all_runs(tasks: Iterable[str], settings: Iterable[str], seeds: Iterable[int]) -> list[Run]:
    """Seed by seed; what a run needs comes before it, asked for or not."""
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
    """With the seeds that the page has."""
    more = all_runs(tasks, settings, MORE_SEEDS)
    return all_runs(tasks, settings, SEEDS) + [
        run for run in more if (run.task, run.setting) in NEAR_NOISE and run.workers == WORKERS
    ]


def description(run: Run, steps: int | None, folder: Path) -> dict[str, Any]:
    """All that a run's result follows from."""
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
    """A run's result, if it is there and what it was made of is what it would be made of now."""
    file = run.file(folder)
    needed = run.needs()
    if not file.exists() or (needed and not needed.file(folder).exists()):
        return None
    result: dict[str, Any] = json.loads(file.read_text())
    return result if result["about"] == description(run, steps, folder) else None


def usual_threshold(result: dict[str, Any]) -> float:
    """Median over the second half of a run of the layers' mean threshold."""
    layers = result["layers"]
    means = np.mean(layers["thresholds"], axis=1)
    return float(np.median(means[len(means) // 2 :]))
