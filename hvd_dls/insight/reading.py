"""Reads logs: whatever is whole in them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hvd_dls.errors import DLSError
from hvd_dls.insight.lines import MODEL, STEP, VERSION


@dataclass(frozen=True)
class ModelLog:
    """One model's lines in a run.

    Attributes:
        number: of the model in the run.
        about: the last line that introduced it.
        layers: names of the L compressed layers.
        sizes: (L,) entries of each.
        steps: (T,) number of each line's step, ascending.
        k: (T, L) entries sent.
        thresholds: (T, L), without the loss scale; NaN where nothing was sent.
    """

    number: int
    about: dict[str, Any]
    layers: list[str]
    sizes: np.ndarray
    steps: np.ndarray
    k: np.ndarray
    thresholds: np.ndarray
    _lines: list[dict[str, Any]]

    @property
    def rank(self) -> int:
        """That wrote it."""
        return int(self.about["rank"])

    @property
    def world_size(self) -> int:
        """Number of ranks at the end."""
        return int(self.about["world_size"])

    def column(self, name: str) -> np.ndarray:
        """(T,) of a field of each line; NaN where it has no number."""
        return _numbers(line.get(name) for line in self._lines)

    def seconds(self, part: str) -> np.ndarray:
        """(T,) seconds of a part, or of "total", in the steps of each line."""
        return _numbers(line["seconds"].get(part) for line in self._lines)


@dataclass(frozen=True)
class Run:
    """What a file holds.

    Attributes:
        name: of the file.
        models: at least one line of each.
        ignored: lines that were not whole, or not a log's.
    """

    name: str
    models: list[ModelLog]
    ignored: int


def read_run(path: Path, name: str | None = None) -> Run:
    """Reads a file of JSON lines.

    Where a step is there twice (training went on from an earlier checkpoint), the later one counts,
    and what came after the earlier one does not.

    Args:
        path: of the file.
        name: to call it by; None: the file's.

    Raises:
        DLSError: it cannot be read, is of a newer format, or has no step.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DLSError(f"{path}: {error.strerror}") from error
    about: dict[int, dict[str, Any]] = {}
    lines: dict[int, dict[int, dict[str, Any]]] = {}
    ignored = 0
    for line in _objects(content):
        if line is None or not _fits(line, about):
            ignored += 1
        elif line["kind"] == MODEL:
            if line["version"] > VERSION:
                raise DLSError(
                    f"{path}: written by hvd_dls {line.get('hvd_dls')} in version "
                    f"{line['version']} of the format; this one reads up to {VERSION}: update it"
                )
            number = line["model"]
            if number in about and about[number]["layers"] != line["layers"]:
                lines[number] = {}  # other layers are compressed now: only these can be drawn
            about[number] = line
        else:
            steps = lines.setdefault(line["model"], {})
            while steps and next(reversed(steps)) >= line["step"]:
                steps.popitem()
            steps[line["step"]] = line
    models = [
        _model(number, about[number], list(steps.values()))
        for number, steps in lines.items()
        if steps
    ]
    if not models:
        raise DLSError(f"{path}: no step of a log of hvd_dls in it ({ignored} lines ignored)")
    return Run(name or path.stem, models, ignored)


def _objects(content: bytes) -> Iterator[dict[str, Any] | None]:
    """The file's lines; None for one that is no JSON object."""
    for line in content.split(b"\n"):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        yield value if isinstance(value, dict) else None


def _fits(line: dict[str, Any], about: dict[int, dict[str, Any]]) -> bool:
    """Whether a line is one of a log, and has what is read from it."""
    try:
        if line["kind"] == MODEL:
            same = len(line["layers"]) == len(line["sizes"])
            return same and all(isinstance(line[x], int) for x in _OF_MODEL)
        n_layers = len(about[line["model"]]["layers"])
        return (
            line["kind"] == STEP
            and len(line["k"]) == len(line["thresholds"]) == n_layers
            and isinstance(line["seconds"], dict)
            and isinstance(line["steps"], int)
            and line["steps"] > 0
            and isinstance(line["step"], int)
        )
    except (KeyError, TypeError):
        return False


_OF_MODEL = ("version", "model", "rank", "world_size")


def _model(number: int, about: dict[str, Any], lines: list[dict[str, Any]]) -> ModelLog:
    thresholds = np.array([_numbers(line["thresholds"]) for line in lines])
    scale = _numbers(line.get("loss_scale", 1.0) for line in lines)
    thresholds = np.where(thresholds > 0, thresholds / scale[:, None], np.nan)
    return ModelLog(
        number=number,
        about=about,
        layers=list(about["layers"]),
        sizes=np.array(about["sizes"], np.int64),
        steps=np.array([line["step"] for line in lines]),
        k=np.array([_numbers(line["k"]) for line in lines]),
        thresholds=thresholds,
        _lines=lines,
    )


def _numbers(values: Iterable[Any]) -> np.ndarray:
    good = (value if isinstance(value, int | float) else np.nan for value in values)
    return np.array(list(good), np.float64)


__all__ = ["ModelLog", "Run", "read_run"]
