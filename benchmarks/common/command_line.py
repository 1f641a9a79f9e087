"""Command line options that most benchmarks have."""

from __future__ import annotations

import argparse
from pathlib import Path


def make_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """Makes a parser whose help begins with a text as it is.

    Args:
        module: as it is run: "exchange" for ``python -m benchmarks.exchange``.
        description: usually the module's docstring.
    """
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Adds --json and --picture, the files to write besides what is printed."""
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--picture", type=Path, help="where to draw them (matplotlib)")
