"""``hvd-dls report``: one page of HTML from logs that ``compression.log_to`` wrote."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hvd_dls.errors import DLSError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a log, or a folder whose *.jsonl are all taken; NAME=PATH calls it by a name",
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("report.html"), help="default: report.html"
    )
    parser.add_argument("--title", default="hvd_dls report", help="of the page")


def run(arguments: argparse.Namespace) -> int:
    """Writes the page; returns 1, with the reason, if there is nothing to show.

    A log that cannot be read is told and left out.
    """
    from hvd_dls.insight.page import page_of
    from hvd_dls.insight.reading import read_run

    runs = []
    for argument in arguments.runs:
        for name, path in _logs_of(argument):
            try:
                runs.append(read_run(path, name))
            except DLSError as error:
                print(f"hvd-dls report: {error}", file=sys.stderr)
    if not runs:
        print("hvd-dls report: no log to show", file=sys.stderr)
        return 1
    try:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(page_of(runs, arguments.title), encoding="utf-8")
    except OSError as error:
        print(f"hvd-dls report: {arguments.output}: {error.strerror}", file=sys.stderr)
        return 1
    print(f"{arguments.output}: {len(runs)} run(s)")
    return 0


def _logs_of(argument: str) -> list[tuple[str, Path]]:
    """Names and paths of the logs that an argument means."""
    given, equals, rest = argument.partition("=")
    path = Path(argument)
    if equals and not path.exists():
        path = Path(rest)
    else:
        given = ""
    if not path.is_dir():
        return [(given or path.stem, path)]
    files = sorted(path.glob("*.jsonl"))
    if not files:
        print(f"hvd-dls report: {path}: a folder without *.jsonl in it", file=sys.stderr)
    prefix = given or path.name
    return [(f"{prefix}/{file.stem}" if len(files) > 1 else prefix, file) for file in files]
