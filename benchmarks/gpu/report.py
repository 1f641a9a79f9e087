"""A section of a page in Markdown, from files of figures.

python -m benchmarks.gpu.report build/gpu.json build/two_ranks.json
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common.command_line import make_parser
from benchmarks.gpu import tables

# What can be in a file: its title, and what makes a table of it.
PARTS: dict[str, tuple[str, Callable[[tables.Rows], str]]] = {
    "selection": ("Finding the largest entries of a layer", tables.selection),
    "settle": ("Adding up what all ranks sent of a layer", tables.settle),
    "step": ("A whole step", tables.step),
    "launches": ("What a step gives the device to do", tables.launches),
    "stalls": ("Where the host waits for the device", tables.stalls),
    "memory": ("Memory of the device", tables.memory),
    "two_ranks": ("A training on two ranks that share the device", tables.two_ranks),
}


def machine(about: dict[str, Any]) -> str:
    """Tells what figures are from."""
    card = about["card"]
    where = (
        f"{card['name']} ({card['memory_gib']:.0f} GiB, second-level cache of "
        f"{card['l2_mib']:.0f} MiB)"
        if card
        else "a CPU: a dry run, which says nothing of a GPU"
    )
    versions = [
        f"{name} {about[name]}"
        for name in ("python", "torch", "cuda", "triton", "numpy", "numba", "horovod", "hvd_dls")
        if about.get(name)
    ]
    lines = [f"{where}; {about['cores']} cores of {about['machine']}; {', '.join(versions)}."]
    lines.append(f"Measured on {about['date']}.")
    if about["quick"]:
        lines.append("With --quick: small sizes and few repetitions.")
    for way, why in about.get("missing", {}).items():
        lines.append(f"Not measured: {way}, which {why}.")
    return "\n".join(lines) + "\n"


def part(figures: dict[str, Any], name: str) -> str:
    """Formats one part of a file, with its title."""
    title, table = PARTS[name]
    found = figures[name]
    text = table(found["rows"]) if found["rows"] else ""
    if found.get("error"):
        text += f"\nThis part ended early: {found['error']}\n"
    elif not found.get("complete"):
        text += "\nThis part was not finished.\n"
    return f"### {title}\n\n{text}"


def section(figures: dict[str, Any]) -> str:
    """Formats a file."""
    names = [name for name in PARTS if name in figures]
    return tables.joined([machine(figures["about"]), *(part(figures, name) for name in names)])


def main() -> None:
    """Prints the section."""
    parser = make_parser("gpu.report", __doc__)
    parser.add_argument("files", nargs="+", type=Path, help="of figures, as --json leaves them")
    args = parser.parse_args()
    files = [json.loads(path.read_text()) for path in args.files]
    print(tables.joined(["## On a GPU", *map(section, files)]))


if __name__ == "__main__":
    main()
