"""Makes runs in parallel processes and keeps their results."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.convergence.runs import Run, description, read
from benchmarks.convergence.training import train


def run_and_keep(about: dict[str, Any], file: Path) -> None:
    """Makes one run.

    Args:
        about: the ``description`` of the run.
        file: where its result is kept.
    """
    keep(train(about), file)


def keep(result: dict[str, Any], file: Path) -> None:
    """Writes a result; its file is there whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}.unfinished")
    unfinished.write_text(json.dumps(result, allow_nan=False))
    os.replace(unfinished, file)


def result_of(about: dict[str, Any], file: Path) -> dict[str, Any] | None:
    """Reads a run's result; None if there is none, or if a run would do something else now."""
    if not file.exists():
        return None
    result: dict[str, Any] = json.loads(file.read_text())
    return result if result["about"] == about else None


def make_missing(runs: Iterable[tuple[dict[str, Any], Path]], jobs: int) -> list[str]:
    """Makes the runs whose results are missing; none needs another's.

    Args:
        runs: description of each, and where its result is kept.
        jobs: runs at a time.

    Returns:
        What went wrong, a line for each run.
    """
    missing = [each for each in runs if result_of(*each) is None]
    failed = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, start_worker) as pool:
        futures = {pool.submit(run_and_keep, *each): each[0] for each in missing}
        for future in tqdm(as_completed(futures), total=len(futures), unit="run"):
            if error := future.exception():
                failed.append(f"{futures[future]}: {error!r}")
    return failed


def start_worker() -> None:
    """Sets a process of the pool up: it has one thread, and ends with the process that made it."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def sweep(runs: list[Run], steps: int | None, folder: Path, jobs: int) -> list[str]:
    """Makes all runs whose results are missing.

    Args:
        runs: what a run needs stands before it.
        steps: of every run; None: the task's.
        folder: of results.
        jobs: runs at a time.

    Returns:
        What went wrong, a line for each run.
    """
    waiting: list[Run] = []
    for each in runs:
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
