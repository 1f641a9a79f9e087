"""Accuracy of sparse training beside dense training, for small models and many settings.

    python -m benchmarks.convergence                          # all: about eight hours of one core
    python -m benchmarks.convergence --tasks text --settings dense 'dls-*' --seeds 0
    python -m benchmarks.convergence --report                 # only builds the page

Workers are simulated in one process, with the sessions that ranks of a real job have. Each run is
kept in build/convergence/TASK/SETTING-WORKERS-SEED.json and not made again unless what it follows
from has changed, so that an interrupted sweep goes on where it was. It goes seed by seed: after an
interruption, all runs of the first seeds are there. The page is docs/convergence.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.command_line import make_parser
from benchmarks.common.paths import ROOT
from benchmarks.convergence.runs import all_runs, usual_runs
from benchmarks.convergence.settings import SETTINGS
from benchmarks.convergence.sweep import sweep
from benchmarks.convergence.tasks import TASKS

KEPT = ROOT / "build" / "convergence"
PAGE = ROOT / "docs" / "convergence.md"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = make_parser("convergence", __doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--settings", nargs="+", default=["*"], help="names or patterns of names")
    parser.add_argument("--seeds", type=int, nargs="+", help="(default: those of the page)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of a thread each")
    parser.add_argument("--steps", type=int, help="of every run (default: the task's)")
    parser.add_argument("--folder", type=Path, default=KEPT, help="where results are kept")
    parser.add_argument("--page", type=Path, default=PAGE, help="what to build from them")
    parser.add_argument("--report", action="store_true", help="only build the page")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the runs that are missing and builds the page; returns the exit status."""
    args = parse(arguments)
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
