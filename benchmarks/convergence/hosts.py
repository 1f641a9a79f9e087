"""Training on hosts of several ranks: two levels, and owners, beside ranks that all send.

    python -m benchmarks.convergence.hosts
    python -m benchmarks.convergence.hosts --tasks digits --seeds 0 --steps 100
    python -m benchmarks.convergence.hosts --report                     # only prints the table

Four hosts of four ranks, simulated as in ``benchmarks.convergence``: the same tasks, seeds and
learning rates, with momentum correction and a warm-up. *Payloads on a link*: what a host receives
from others in a step, in payloads of 1 %. Each run is kept in build/convergence-hosts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common.command_line import make_parser
from benchmarks.common.paths import ROOT
from benchmarks.common.reporting import markdown
from benchmarks.convergence.settings import MOMENTUM, SEEDS, WARMUP
from benchmarks.convergence.sweep import make_missing, result_of
from benchmarks.convergence.tasks import TASKS
from hvd_dls.config import ALLGATHER, SPARSE_ALLREDUCE

KEPT = ROOT / "build" / "convergence-hosts"
DENSITY = 0.01
HOSTS = (4, 4, 4, 4)


class Way(NamedTuple):
    """A way to train.

    Attributes:
        title: its name in the table.
        workers: how many there are; the batch is shared out among them.
        density: of each payload; None: dense.
        hosts: workers on each, where they average first.
        payloads: that a host receives in a step, in payloads of DENSITY.
        exchange: of the compressor.
    """

    title: str
    workers: int
    density: float | None
    hosts: tuple[int, ...] | None
    payloads: float
    exchange: str = ALLGATHER


_RANKS, _HOSTS = sum(HOSTS), len(HOSTS)
WAYS = {
    "dense": Way("dense", _RANKS, None, None, 0),
    "alone": Way("flat, a rank on each host", _HOSTS, DENSITY, None, _HOSTS - 1),
    "hosts": Way("two levels", _RANKS, DENSITY, HOSTS, _HOSTS - 1),
    "flat": Way("flat", _RANKS, DENSITY, None, _RANKS - 1),
    "flat-equal": Way(
        "flat, as many bytes as two levels",
        _RANKS,
        DENSITY * (_HOSTS - 1) / (_RANKS - 1),
        None,
        _HOSTS - 1,
    ),
    # Owners get, and hand out, what is not their own.
    "owners": Way(
        "two levels, sparse allreduce between hosts",
        _RANKS,
        DENSITY,
        HOSTS,
        2 * (_HOSTS - 1) / _HOSTS,
        SPARSE_ALLREDUCE,
    ),
    "owners-equal": Way(
        "the same, as many bytes as two levels",
        _RANKS,
        DENSITY * _HOSTS / 2,
        HOSTS,
        _HOSTS - 1,
        SPARSE_ALLREDUCE,
    ),
}


def description(task: str, way: Way, seed: int, steps: int | None) -> dict[str, Any]:
    """Returns all that a run's result follows from: see ``training.train``."""
    of, options = TASKS[task], None
    steps = steps or of.steps
    if way.density is not None:
        options = {
            "density": way.density,
            "momentum": MOMENTUM,
            "momentum_masking": of.masking,
            "warmup_steps": round(WARMUP[DENSITY] * steps),
            "hierarchical": way.hosts is not None,
            "exchange": way.exchange,
            "measure_every": 0,
        }
    return {
        "task": task,
        "workers": way.workers,
        "hosts": list(way.hosts) if way.hosts else None,
        "seed": seed,
        "steps": steps,
        "rate": of.rate,
        "batch": of.batch,
        "options": options,
        "optimizer_momentum": MOMENTUM if options is None else 0.0,
    }


def table(tasks: Sequence[str], results: dict[tuple[str, str, int], dict[str, Any]]) -> str:
    """Formats the mean of all seeds, standard deviation and number, for each way and task."""
    rows = []
    for name, way in WAYS.items():
        cells = []
        for task in tasks:
            of = TASKS[task]
            own = [r for (t, n, _), r in results.items() if (t, n) == (task, name)]
            values = [r["accuracy"] if of.accuracy else r["loss"] for r in own]
            good = np.array([value for value in values if value is not None])
            if not len(good):
                cells.append("-")
                continue
            scale, digits = (100, 1) if of.accuracy else (1, 3)
            number = f"{scale * good.mean():.{digits}f}"
            if len(good) > 1:
                number += f" ± {scale * good.std(ddof=1):.{digits}f} ({len(good)})"
            cells.append(number)
        payloads = "-" if way.density is None else f"{way.payloads:g}"
        rows.append([way.title, f"{way.workers}", payloads, *cells])
    head = ["", "ranks", "payloads on a link"]
    head += [f"{task}: {'%' if TASKS[task].accuracy else 'nats'}" for task in tasks]
    return markdown(head, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the runs that are missing and prints the table; returns the exit status."""
    parser = make_parser("convergence.hosts", __doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of a thread each")
    parser.add_argument("--steps", type=int, help="of every run (default: the task's)")
    parser.add_argument("--folder", type=Path, default=KEPT, help="where results are kept")
    parser.add_argument("--report", action="store_true", help="only print the table")
    args = parser.parse_args(arguments)
    runs = {}
    for seed in args.seeds:
        for task in args.tasks:
            for name in args.ways:
                about = description(task, WAYS[name], seed, args.steps)
                runs[task, name, seed] = about, args.folder / task / f"{name}-{seed}.json"
    failed = [] if args.report else make_missing(runs.values(), args.jobs)
    results = {key: result for key, each in runs.items() if (result := result_of(*each))}
    print(table(args.tasks, results), *failed, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
