"""10,000 steps in which everything happens that does in ordinary life, with exact accounts.

    python -m benchmarks.soak

Ranks have no gradient for some layers now and then, layers are frozen and thawed, NaN and Inf
turn up on one rank, one rank gives a step up in the middle, states are saved and loaded, all ranks
go back to an earlier step, and the density falls in a warm-up. Gradients are whole numbers, so that
all sums are exact. At each look all ranks must hold the same weights and ratios to the bit, and
what all ranks have accumulated must be what reached the weights plus residuals, to the bit.
The resident memory of the largest rank shows whether anything leaks.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.command_line import make_parser
from benchmarks.common.reporting import markdown, write_json
from benchmarks.hosts.jobs import JobError, launcher, run_job
from hvd_dls.config import VALUES


def table(figures: dict[str, Any]) -> str:
    """What was seen at each look, and what had happened until the end."""
    looks = [
        [
            f"{look['step']:,}",
            f"{look['steps made']:,}",
            f"{look['entries'] / look['of']:.2%}",
            f"{look['spread']:.2f}",
            f"{look['largest weight']:,.0f}",
            f"{look['megabytes']:.1f}",
        ]
        for look in figures["looks"]
    ]
    head = ["step", "made", "density", "spread", "largest weight", "MB of the largest rank"]
    events = [[name, f"{count:,}"] for name, count in figures["counts"].items()]
    return f"{markdown(head, looks)}\n{markdown(['what happened', 'steps'], events)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the job; returns the exit status."""
    parser = make_parser("soak", __doc__)
    parser.add_argument("--ranks", type=int, default=4, help="a power of two, for exact averages")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--look-every", type=int, default=1_000, help="steps")
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--values", choices=VALUES, default="float32")
    parser.add_argument("--often", type=float, default=1.0, help="1: in 1.3 %% of all steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="where to write all figures")
    args = parser.parse_args(arguments)
    if args.ranks < 2 or args.ranks & (args.ranks - 1):
        parser.error(f"--ranks {args.ranks}: accepted are 2, 4, 8, ...")
    options = []
    for name in ("steps", "look_every", "density", "values", "often", "seed"):
        options += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    try:
        figures = run_job(launcher(args.ranks), "benchmarks.soak.training", options, title="soak")
    except JobError as error:
        print(error, file=sys.stderr)
        return 1
    print(table(figures))
    print(f"At each look: all {args.ranks} ranks equal, and every entry accounted for, to the bit.")
    if args.json:
        write_json(figures, Path(args.json))
    return 0


if __name__ == "__main__":
    sys.exit(main())
