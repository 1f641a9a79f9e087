"""Tables, files of figures and pictures that benchmarks leave."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Formats a table as Markdown, with a line break at its end."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def write_json(figures: Any, path: Path, indent: int | None = 1) -> None:
    """Writes figures to a file, in folders that are made if they are missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=indent))


def pyplot() -> Any:
    """Imports ``matplotlib.pyplot``, set up to draw into files where there is no display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_picture(figure: Any, path: Path, dpi: int = 120) -> None:
    """Writes a figure to a file, in folders that are made if they are missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    pyplot().close(figure)
