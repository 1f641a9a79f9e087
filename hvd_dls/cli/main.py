"""The command ``hvd-dls``: finds the subcommand and hands over to it."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

import hvd_dls

# Each is a module here with ``add_arguments(parser)`` and ``run(arguments) -> exit status``. All of
# them are imported for ``--help``, so their heads import neither frameworks nor Horovod.
COMMANDS: dict[str, str] = {
    "advise": "under horovodrun: step times of dense, fp16 and DLS in this job, and which to take",
    "doctor": "what is installed, what does not work, and what to type",
    "report": "one page of HTML from logs: thresholds, densities, bytes and times",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ``hvd-dls COMMAND ...``.

    Args:
        arguments: without the program's name; ``sys.argv``'s if None.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser("hvd-dls", description=hvd_dls.__doc__)
    parser.add_argument("--version", action="version", version=f"hvd_dls {hvd_dls.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        command = subparsers.add_parser(name, help=text, description=text)
        importlib.import_module(f"hvd_dls.cli.{name}").add_arguments(command)
    parsed = parser.parse_args(arguments)
    return int(importlib.import_module(f"hvd_dls.cli.{parsed.command}").run(parsed))
