#!/usr/bin/env python3
"""Does sparse training reach dense accuracy? Trains small models in many ways and compares them.

    python -m benchmarks.convergence                          # all: about eight hours of one core
    python -m benchmarks.convergence --tasks text --settings dense 'dls-*' --seeds 0
    python -m benchmarks.convergence --report                 # only builds the page

Workers are simulated in one process (simulation.py), with the sessions that ranks of a real job
have. Each run is kept in build/convergence/TASK/SETTING-WORKERS-SEED.json and not made again unless
what it is made of has changed, so an interrupted sweep goes on where it was. Seed by seed: after an
interruption, all runs of the first seeds are there. The page is docs/convergence.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import threading
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.convergence.settings import SETTINGS, Run, all_runs, description, read, usual_runs
from benchmarks.convergence.tasks import TASKS
from benchmarks.convergence.training import train

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "build" / "convergence"
PAGE = ROOT / "docs" / "convergence.md"


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
    parser.add_argument("--seeds", type=int, nargs="+", help="(default: those of the page)")
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
        if args.seeds:
            runs = all_runs(args.tasks, args.settings, args.seeds)
        else:
            runs = usual_runs(args.tasks, args.settings)
        if not runs:
            print(f"no such settings; there are {', '.join(SETTINGS)}", file=sys.stderr)
            return 2
        failed = sweep(runs, args.steps, args.folder, args.jobs)
    from benchmarks.convergence.report import build  # draws: only here is matplotlib needed

    build(args.folder, args.page, args.steps)
    print(f"{args.page} is made", *failed, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
