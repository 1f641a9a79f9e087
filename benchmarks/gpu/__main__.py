"""Times, waits and memory of compression on a GPU, in one process and without Horovod.

    python -m benchmarks.gpu --device cuda --json build/gpu.json --markdown build/gpu.md

Each part's table is printed, and all figures so far are written, as soon as the part is done. A
part that fails is named and does not end the others. Before each repetition a buffer larger than
the second-level cache is written. "device" is the time between two events around the work, queued
behind a device that sleeps, so that a slow host leaves no gaps (a method in which the host waits
has its gaps counted); "host" until the call returns; "elapsed" until the result is there.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.command_line import make_parser
from benchmarks.common.reporting import write_json
from benchmarks.gpu import finding, launches, memory, report, settling, stepping, waits
from benchmarks.gpu.about import about, ways_found
from benchmarks.gpu.passes import Ways, ways

Keep = Callable[[dict[str, Any]], None]
PARTS: dict[str, Callable[[torch.device, Ways, bool, Keep], None]] = {
    "step": stepping.rows_of,
    "launches": launches.rows_of,
    "selection": finding.rows_of,
    "stalls": waits.rows_of,
    "memory": memory.rows_of,
    "settle": settling.rows_of,
}


class Figures:
    """All figures, written to files as they come.

    Args:
        head: what to begin with.
        json: where to write them, or None.
        markdown: where to write the tables, or None.
    """

    def __init__(self, head: dict[str, Any], json: Path | None, markdown: Path | None) -> None:
        self.all = {"about": head}
        self._json, self._markdown = json, markdown

    def measure(self, name: str, device: torch.device, found: Ways, quick: bool) -> bool:
        """Measures one part and prints it; returns whether all went well."""
        part: dict[str, Any] = {"rows": [], "complete": False}
        self.all[name] = part
        start = time.perf_counter()

        def keep(row: dict[str, Any]) -> None:
            part["rows"].append(row)
            self._write_json()

        try:
            PARTS[name](device, found, quick, keep)
            part["complete"] = True
        except Exception as error:  # the other parts' figures are worth having
            part["error"] = f"{type(error).__name__}: {error}"
        part["seconds"] = time.perf_counter() - start
        self.write()
        print(report.part(self.all, name), flush=True)
        print(f"({name}: {part['seconds']:.1f} s)\n", flush=True)
        right = all(all(row.get("exact", {}).values()) for row in part["rows"])
        return right and part["complete"]

    def write(self) -> None:
        """Writes all files."""
        self._write_json()
        if self._markdown:
            self._markdown.parent.mkdir(parents=True, exist_ok=True)
            self._markdown.write_text(report.section(self.all))

    def _write_json(self) -> None:
        if self._json:
            write_json(self.all, self._json)


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = make_parser("gpu", __doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--markdown", type=Path, help="where to write the tables")
    parser.add_argument(
        "--only", default=",".join(PARTS), help="parts, with commas between (default: %(default)s)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="small sizes and few repetitions, to try it out"
    )
    args = parser.parse_args()
    args.only = args.only.split(",")
    if unknown := set(args.only) - PARTS.keys():
        parser.error(f"--only: {', '.join(sorted(unknown))}: accepted are {', '.join(PARTS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU: torch.cuda.is_available() is False; --device cpu is for a dry run")
    return args


def main() -> None:
    """Measures all parts that were asked for."""
    args = parse()
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    found = ways(device)
    head = about(device, args.quick) | ways_found(found)
    print(report.machine(head), flush=True)
    figures = Figures(head, args.json, args.markdown)
    good = [figures.measure(name, device, found, args.quick) for name in args.only]
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
