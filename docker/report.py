"""What came of the entries of the test matrix: kept between runs, and shown as a table."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

BEGIN, END = "<!-- matrix: begin -->", "<!-- matrix: end -->"
HEADER = ("entry", "result", "tests passed", "build", "tests", "image")


@dataclass(frozen=True)
class Result:
    """One entry's outcome: passed, failed or skipped, and why; seconds, bytes, numbers of tests."""

    entry: str
    outcome: str
    reason: str = ""
    build_seconds: float = 0
    test_seconds: float = 0
    image_bytes: int = 0
    tests_passed: int = 0
    tests_skipped: int = 0
    engine: str = ""
    date: str = ""
    fingerprint: str = ""  # of everything the result depends on


def counts(output: str) -> tuple[int, int]:
    """How many tests passed and were skipped, from pytest's last line."""
    summaries = re.findall(r"^=*\s*((?:\d+ \w+(?:, )?)+) in [\d.]+s", output, re.MULTILINE)
    numbers = re.findall(r"(\d+) (\w+)", summaries[-1]) if summaries else []
    of = {what: int(number) for number, what in numbers}
    return of.get("passed", 0), of.get("skipped", 0)


def duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def row(result: Result) -> tuple[str, ...]:
    ran = result.outcome != "skipped"
    passed = f"{result.tests_passed}" if ran else ""
    if result.tests_skipped:
        passed += f" ({result.tests_skipped} skipped)"
    outcome = result.outcome + (f": {result.reason}" if result.reason else "")
    return (
        *(result.entry, outcome.replace("|", "/").replace("\n", " "), passed),
        duration(result.build_seconds) if ran else "",
        duration(result.test_seconds) if ran else "",
        f"{result.image_bytes / 1e9:.2f} GB" if result.image_bytes else "",
    )


def table(results: Sequence[Result]) -> str:
    """A Markdown table that is also aligned for a terminal."""
    rows = [HEADER, *map(row, results)]
    widths = [max(len(line[i]) for line in rows) for i in range(len(HEADER))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in rows
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines) + "\n"


def write_between(file: Path, text: str) -> None:
    """Replace what stands between the two markers in a document."""
    before, begin, rest = file.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{file} has no {BEGIN} … {END} to write between")
    file.write_text(f"{before}{begin}\n{text}{end}{after}")


def load(file: Path) -> dict[str, Result]:
    """The last result of each entry; none where the file is missing or of another version."""
    try:
        return {entry: Result(**facts) for entry, facts in json.loads(file.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def save(file: Path, results: Mapping[str, Result]) -> None:
    """Whole or not at all, so that an interrupted run can go on."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    facts = {entry: asdict(result) for entry, result in results.items()}
    partial.write_text(json.dumps(facts, indent=2) + "\n")
    partial.replace(file)
