#!/usr/bin/env python3
"""Does sparse training reach dense accuracy? Trains small models in many ways and compares them.

    python benchmarks/convergence.py                          # all: about six hours of one core
    python benchmarks/convergence.py --tasks text --settings dense 'dls-*' --seeds 0
    python benchmarks/convergence.py --report                 # only builds the page

Workers are simulated in one process (simulation.py), with the sessions that ranks of a real job
have. Each run is kept in build/convergence/TASK/SETTING-WORKERS-SEED.json and not made again unless
what it is made of has changed, so an interrupted sweep goes on where it was. Seed by seed: after an
interruption, all runs of the first seeds are there. The page is docs/convergence.md.

A new way to train is a new line in SETTINGS.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import platform
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.convergence_tasks import TASKS, Data, Task, batch, evaluate, loss, rate_at
from benchmarks.simulation import SimulatedJob
from hvd_dls.config import DLSConfig
from hvd_dls.errors import NonFiniteGradientError

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "build" / "convergence"
PAGE = ROOT / "docs" / "convergence.md"
VERSION = 1  # of what a run does and keeps
MOMENTUM = 0.9
WORKERS = 4
POINTS = 50  # of each curve
MEASURE_ALL = 10  # steps between two in which all workers' choices are compared
LOOKED_AT = 250  # held-out examples of each point of a curve; the end looks at all
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
    "floor": ("images", "text"),
    "momentum": tuple(TASKS),
    "lumps": ("images",),
    "rates": ("digits", "images"),
}
# Settings that are tried with more workers, too, by task.
MORE_WORKERS = {
    ("digits", name): (8, 16)
    for name in ("dense", "dls-0.01-corrected", "layerwise-0.01-corrected")
} | {("digits", "global-0.01-corrected"): (8,)}


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
    return {
        "version": VERSION,
        **run._asdict(),
        "steps": steps,
        "rate": setting.rate * task.rate,
        "batch": task.batch,
        "options": options,
        "optimizer_momentum": MOMENTUM if setting.momentum == "optimizer" else 0.0,
    }


def usual_threshold(result: dict[str, Any]) -> float:
    """Median over the second half of a run of the layers' mean threshold."""
    layers = result["layers"]
    means = np.mean(layers["thresholds"], axis=1)
    return float(np.median(means[len(means) // 2 :]))


# One run ------------------------------------------------------------------------------------------


class Kept:
    """What a run tells, as it goes on."""

    def __init__(self, names: list[str], sizes: list[int]) -> None:
        self.curve: dict[str, list[float]] = {
            "step": [], "training_loss": [], "loss": [], "accuracy": []
        }  # fmt: skip
        self.layers: dict[str, list[Any]] = {
            "names": names, "sizes": sizes, "step": [], "k": [], "thresholds": []
        }  # fmt: skip
        self.quality: dict[str, list[float]] = {"step": [], "energy": [], "misallocation": []}
        self.shared: dict[str, list[float]] = {"step": [], "misallocation": [], "least": []}
        self.bytes: list[list[float]] = []  # sparse and dense, of each step
        self.entries: list[float] = []
        self.gradient_seconds: list[float] = []
        self.losses: list[float] = []

    def step(self, job: SimulatedJob, dense_bytes: int, training_loss: float) -> None:
        self.losses.append(training_loss)
        self.gradient_seconds.append(float(np.median(job.gradient_seconds)))
        records = [session.last_step for session in job.sessions]
        if not records:
            self.bytes.append([0, dense_bytes])
        for record in records[:1]:
            assert record is not None
            if record.quality is not None:
                self.quality["step"].append(len(self.losses))
                self.quality["energy"].append(float(record.quality.energy))
                self.quality["misallocation"].append(float(record.quality.misallocation))
            best = [r.quality.best_k for r in records if r is not None and r.quality is not None]
            if len(best) == len(records) and record.k.sum():
                # Ranks that choose for themselves send entries of their own number.
                k = np.mean([r.k for r in records if r is not None], axis=0)
                ideal, total = np.mean(best, axis=0), 2 * k.sum()
                self.shared["step"].append(len(self.losses))
                self.shared["misallocation"].append(float(np.abs(k - ideal).sum() / total))
                self.shared["least"].append(float(np.abs(best[0] - ideal).sum() / total))
            sent = [[r.sparse_bytes, r.dense_bytes] for r in records if r is not None]
            self.bytes.append(np.mean(sent, axis=0).tolist())
            self.entries.append(float(np.mean([r.k.sum() for r in records if r is not None])))

    def point(self, job: SimulatedJob, found: tuple[float, float]) -> None:
        since = int(self.curve["step"][-1]) if self.curve["step"] else 0
        values = (len(self.losses), float(np.mean(self.losses[since:])), *found)
        for column, value in zip(self.curve.values(), values, strict=True):
            column.append(value)
        if job.sessions and (record := job.sessions[0].last_step) is not None:
            self.layers["step"].append(len(self.losses))
            self.layers["k"].append(record.k.tolist())
            self.layers["thresholds"].append(record.thresholds.tolist())


def train(about: dict[str, Any]) -> dict[str, Any]:
    """Trains as a ``description`` says; its figures."""
    task, steps = TASKS[about["task"]], about["steps"]
    data = data_of(task.name)
    few = data.validation.part(slice(None, None, max(1, len(data.validation.inputs) // LOOKED_AT)))
    model = task.make_model(about["seed"])
    config = None
    if about["options"] is not None:
        config = DLSConfig.from_options(measure_every=1, **about["options"])
    job = SimulatedJob(model, about["workers"], config, MEASURE_ALL)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=about["optimizer_momentum"])
    sparse = job.sessions[0].plan.sparse if job.sessions else ()
    kept = Kept([layer.name for layer in sparse], [layer.size for layer in sparse])
    entries = sum(p.numel() for p in model.parameters())
    diverged, start = None, time.perf_counter()

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = about["rate"] / task.rate * rate_at(task, step, steps)
        try:
            training_loss = job.backward(worker_loss(task, model, data, about, step))
        except NonFiniteGradientError:
            training_loss = math.nan
        if not math.isfinite(training_loss):
            diverged = step
            break
        optimizer.step()
        kept.step(job, 4 * entries, training_loss)
        if (step + 1) * POINTS // steps > step * POINTS // steps:
            kept.point(job, evaluate(model, few))

    final = (None, None) if diverged is not None else evaluate(model, data.validation)
    seconds = time.perf_counter() - start
    sparse_bytes, dense_bytes = np.mean(kept.bytes or [[0, 0]], axis=0).tolist()
    return {
        "about": about,
        "config": None if config is None else vars(config),
        "diverged": diverged,
        "loss": finite(final[0]),
        "accuracy": finite(final[1]),
        "entries": entries,
        "entries_sent": float(np.mean(kept.entries)) if kept.entries else float(entries),
        "sparse_bytes": sparse_bytes,
        "dense_bytes": dense_bytes,
        "curve": {name: [*map(finite, column)] for name, column in kept.curve.items()},
        "quality": kept.quality,
        "shared": kept.shared,
        "layers": kept.layers,
        "seconds": seconds,
        "gradient_seconds": float(np.median(kept.gradient_seconds or [0.0])),
        "parameters_sha256": sha256(model),
        "machine": machine(),
    }


def worker_loss(task: Task, model: nn.Module, data: Data, about: dict[str, Any], step: int) -> Any:
    """The loss of a step, by the worker's number."""
    seed, workers = about["seed"], about["workers"]
    return lambda worker: loss(task, model, batch(task, data.training, seed, step, worker, workers))


@lru_cache(maxsize=1)
def data_of(task: str) -> Data:
    return TASKS[task].data()


def sha256(model: nn.Module) -> str:
    """Of all parameters' and buffers' bits."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def finite(value: float | None) -> float | None:
    """JSON knows no NaN."""
    return value if value is not None and math.isfinite(value) else None


def machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


# All runs -----------------------------------------------------------------------------------------


def read(run: Run, steps: int | None, folder: Path) -> dict[str, Any] | None:
    """A run's result, if it is there and what it was made of is what it would be made of now."""
    file = run.file(folder)
    needed = run.needs()
    if not file.exists() or (needed and not needed.file(folder).exists()):
        return None
    result: dict[str, Any] = json.loads(file.read_text())
    return result if result["about"] == description(run, steps, folder) else None


def run_and_keep(about: dict[str, Any], file: Path) -> None:
    """One run; the file is there whole or not at all."""
    result = train(about)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}.unfinished")
    unfinished.write_text(json.dumps(result, allow_nan=False))
    os.replace(unfinished, file)


def start_worker() -> None:
    """In each worker process: one thread, and an end with the process that started it."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def sweep(runs: list[Run], steps: int | None, folder: Path, jobs: int) -> list[str]:
    """Makes all runs that are not there; what went wrong."""
    waiting: list[Run] = []
    for each in runs:  # what a run needs stands before it
        if each.needs() in waiting or read(each, steps, folder) is None:
            waiting.append(each)
    failed: list[str] = []
    busy: dict[Future[None], Run] = {}

    def ready(run: Run) -> bool:
        needed = run.needs()
        return needed is None or (needed not in waiting and needed not in busy.values())

    def start(pool: ProcessPoolExecutor, run: Run) -> None:
        waiting.remove(run)
        needed = run.needs()
        if needed and read(needed, steps, folder) is None:
            failed.append(f"{run}: needs {needed}, which failed")
            return
        if read(run, steps, folder) is not None:  # what it needs has come out as before
            return
        about = description(run, steps, folder)
        try:
            busy[pool.submit(run_and_keep, about, run.file(folder))] = run
        except BrokenProcessPool as error:
            failed.append(f"{run}: {error!r}")

    with (
        ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), start_worker) as pool,
        tqdm(total=len(runs), initial=len(runs) - len(waiting), unit="run") as bar,
    ):
        while waiting or busy:
            while len(busy) < jobs and (run := next(filter(ready, waiting), None)):
                start(pool, run)
            if not busy:
                break
            bar.set_postfix_str(", ".join(f"{r.task} {r.setting} {r.seed}" for r in busy.values()))
            for future in wait(busy, return_when=FIRST_COMPLETED).done:
                run = busy.pop(future)
                if error := future.exception():
                    failed.append(f"{run}: {error!r}")
            bar.update(len(runs) - len(waiting) - len(busy) - bar.n)
    return failed


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--settings", nargs="+", default=["*"], help="names or patterns of names")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of a thread each")
    parser.add_argument("--steps", type=int, help="of every run (default: the task's)")
    parser.add_argument("--folder", type=Path, default=KEPT, help="where results are kept")
    parser.add_argument("--page", type=Path, default=PAGE, help="what to build from them")
    parser.add_argument("--report", action="store_true", help="only build the page")
    return parser.parse_args(arguments)


def main() -> int:
    args = parse()
    failed: list[str] = []
    if not args.report:
        runs = all_runs(args.tasks, args.settings, args.seeds)
        if not runs:
            print(f"no such settings; there are {', '.join(SETTINGS)}", file=sys.stderr)
            return 2
        failed = sweep(runs, args.steps, args.folder, args.jobs)
    from benchmarks.convergence_report import build  # draws: only here is matplotlib needed

    build(args.folder, args.page, args.steps)
    print(f"{args.page} is made", *failed, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
