"""``hvd-dls doctor``: what is installed here, what does not work, and what to type."""

from __future__ import annotations

import argparse
import json
import math

from hvd_dls.cli.doctor.facts import FRAMEWORKS, gather
from hvd_dls.cli.doctor.findings import findings, ready
from hvd_dls.cli.doctor.text import as_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--json", action="store_true", help="the same for programs")
    parser.add_argument(
        "--framework",
        choices=FRAMEWORKS,
        help="exit with 0 only if a training could run with this one; otherwise any is enough",
    )
    parser.add_argument(
        "--time-limit",
        type=_seconds,
        default=180.0,
        metavar="SECONDS",
        help="for each of the processes in which frameworks are tried (default: %(default)g)",
    )
    parser.add_argument(
        "--host-name", action="store_true", help="name this host, too, which is left out otherwise"
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints the report.

    Returns:
        0 if a training could run here, 1 otherwise.
    """
    facts = gather(arguments.time_limit, arguments.host_name)
    found = findings(facts, arguments.framework)
    works = ready(facts)
    if arguments.json:
        said = [finding._asdict() for finding in found]
        print(json.dumps({**facts, "findings": said, "ready": works}, indent=2))
    else:
        print(as_text(facts, found, works))
    return 0 if (works[arguments.framework] if arguments.framework else any(works.values())) else 1


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: accepted is a number of seconds > 0")
    return value
