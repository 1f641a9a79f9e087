"""Compares what ``hvd-dls advise`` says with trainings over links of several rates.

    python -m benchmarks.advise --keep build/advise
    python -m benchmarks.advise --hosts 2 --rates 1gbit --models conv

For each number of hosts and rate it makes hosts of this machine (benchmarks.hosts; needs root) and
runs a job on them: each model trains with all candidates in turn, asks for advice from inside the
script, and trains again. "Measured" is the median of the turns of both trainings, which share no
code with the advice; "apart" is how far their medians are from each other: what no prediction can
be better than. A case is right if, by measured times, the recommended candidate takes at most 1.2
times what the fastest takes (the rule's limit), and every more cautious one takes longer than that;
either limit may be missed by a factor of 1.1. "By measured times" is what the rule makes of these
times without any slack.

With --keep, the figures of each job are kept in a file, and read from there the next time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from datetime import date
from pathlib import Path

import numpy as np

from benchmarks.advise.comparing import Case, Compared, compare, judge
from benchmarks.advise.models import MODELS
from benchmarks.common.command_line import make_parser
from benchmarks.common.reporting import markdown, write_json
from benchmarks.hosts import Hosts, HostsError
from benchmarks.hosts.jobs import JobError, launcher, run_job
from hvd_dls.advice.candidates import Candidate
from hvd_dls.config import ALLGATHER, SPARSE_ALLREDUCE

WANTED = 0.2  # error of a step time, at most
FREE = "none"  # a link that is not shaped


def measure(args: argparse.Namespace, count: int, rate: str) -> list[Case]:
    """Runs a job on new hosts; returns the figures of each model."""
    options = ["--models", *args.models, "--densities", *map(str, args.densities)]
    options += ["--exchanges", *args.exchanges]
    for name in ("rounds", "turn_seconds", "seconds"):
        options += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    place = f"{count} hosts, {'not shaped' if rate == FREE else rate}"
    with Hosts(count, None if rate == FREE else rate) as hosts:
        command = launcher(count, *hosts.horovodrun_options([1] * count))
        module = "benchmarks.advise.training"
        result = run_job(command, module, options, hosts[0].popen, title=place)
    return [{"title": f"{model}, {place}", **figures} for model, figures in result.items()]


def measure_or_read(args: argparse.Namespace, count: int, rate: str) -> list[Case]:
    """The figures of a job, new or kept."""
    if args.keep is None:
        return measure(args, count, rate)
    path = Path(args.keep) / f"{count}-{rate}.json"
    if not path.exists():
        write_json(measure(args, count, rate), path)
    cases: list[Case] = json.loads(path.read_text())
    return cases


def show(cases: list[Case]) -> None:
    """Prints all tables."""
    rows = [row for case in cases for row in compare(case)]
    show_steps(rows)
    show_recommendations(cases)
    errors, apart = (np.abs([getattr(row, what) for row in rows]) for what in ("error", "apart"))
    within = sum(row.within for row in rows)
    print(
        f"Errors of {len(rows)} predictions: {spread_of(errors)}; {within} measured medians are "
        "between the smallest and the largest predicted turn."
    )
    print(f"The two trainings are apart by: {spread_of(apart)}.")
    loads = [each for case in cases for each in case["load"]]
    print(f"{date.today()}, {os.cpu_count()} cores, load {min(loads):.1f} to {max(loads):.1f}")


def spread_of(errors: np.ndarray) -> str:
    """Sums errors up."""
    few = np.mean(errors <= WANTED)
    median, largest = np.median(errors), errors.max()
    return f"median {median:.0%}, largest {largest:.0%}, {few:.0%} of them at most {WANTED:.0%}"


def show_steps(rows: list[Compared]) -> None:
    """Prints predicted beside measured steps."""

    def cell(seconds: tuple[float, float, float]) -> str:
        value, low, high = (f"{1e3 * each:,.0f}" for each in seconds)
        return f"{value} ({low}–{high})"

    lines = [
        [
            row.case,
            Candidate.of(row.name).title,
            cell(row.predicted),
            cell(row.measured),
            f"{row.error:+.0%}",
            f"{row.apart:.0%}",
        ]
        for row in rows
    ]
    head = ["", "candidate", "predicted, ms", "measured, ms", "error", "apart"]
    print(markdown(head, lines))


def show_recommendations(cases: list[Case]) -> None:
    """Prints what was recommended, and whether that was right."""
    lines = []
    verdicts = [judge(case) for case in cases]
    for case, verdict in zip(cases, verdicts, strict=True):
        lines.append(
            [
                case["title"],
                verdict.recommended.title,
                f"{verdict.turns[0]} of {verdict.turns[1]}",
                verdict.best.title,
                f"{verdict.regret:.2f}",
                "yes" if verdict.right else "NO",
                f"{min(case['load']):.1f}–{max(case['load']):.1f}",
            ]
        )
    head = ["", "recommended", "turns that say so", "by measured times", "over the fastest"]
    print(markdown([*head, "right", "load"], lines))
    right, same = (sum(getattr(each, what) for each in verdicts) for what in ("right", "same"))
    print(f"Right: {right} of {len(cases)}; the very same candidate: {same}.")


def main() -> None:
    """Runs all cases and shows them."""
    parser = make_parser("advise", __doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4], help="numbers of hosts")
    parser.add_argument(
        "--rates", nargs="+", default=["100mbit", "1gbit", FREE], help=f"as in 1gbit, or {FREE}"
    )
    parser.add_argument("--densities", type=float, nargs="+", default=[0.05, 0.01, 0.001])
    parser.add_argument(
        "--exchanges",
        nargs="+",
        choices=(ALLGATHER, SPARSE_ALLREDUCE),
        default=[ALLGATHER, SPARSE_ALLREDUCE],
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="of the advice's turns")
    parser.add_argument("--rounds", type=int, default=3, help="turns before and after")
    parser.add_argument("--turn-seconds", type=float, default=1.5, help="of a training's turn")
    parser.add_argument("--keep", type=Path, help="a folder for the figures of each case")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    args = parser.parse_args()
    try:
        cases = [
            case
            for count, rate in itertools.product(args.hosts, args.rates)
            for case in measure_or_read(args, count, rate)
        ]
    except (HostsError, JobError, ValueError) as problem:
        sys.exit(f"advise: {problem}")
    show(cases)
    if args.json:
        write_json({"cases": cases}, args.json)


if __name__ == "__main__":
    main()
