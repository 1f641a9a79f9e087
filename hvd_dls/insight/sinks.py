"""Where lines go: a file, a writer of TensorBoard's, a function."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from hvd_dls.core.session.base import SessionBase
from hvd_dls.insight.lines import Told, model_line, scalars_of, step_line

RANK = "{rank}"
_TRIES, _PAUSE = 20, 0.1  # to lock a file; seconds between two


class Sink(Protocol):
    """Takes what happened; called by one thread."""

    def model(self, number: int, session: SessionBase) -> bool:
        """A model comes, or goes on elsewhere; returns whether this rank logs it."""

    def step(self, told: Told) -> None:
        """A step of it ended."""

    def close(self) -> None:
        """Nothing comes any more."""


class JsonLines:
    """A file of JSON lines, appended to.

    Each line is written with one call.  If the process dies in it, the file ends with a part of a
    line; whoever appends begins a new one, and readers ignore it.

    Args:
        path: of the file: written by rank 0 alone, or, with ``{rank}`` in it, one by each rank.
    """

    def __init__(self, path: str) -> None:
        self._path, self._opened = path, ""
        self._file: int | None = None

    def model(self, number: int, session: SessionBase) -> bool:
        """See ``Sink``.

        Raises:
            OSError: the file cannot be opened, or another process writes to it.
        """
        path = self._path.replace(RANK, str(session.rank))
        if path != self._opened or (session.rank and RANK not in self._path):
            self.close()  # this rank has another number now
        if session.rank and RANK not in self._path:
            return False
        if self._file is None:
            self._file, self._opened = _opened(Path(path)), path
        self._write(model_line(number, session))
        return True

    def step(self, told: Told) -> None:
        """See ``Sink``."""
        self._write(step_line(told))

    def close(self) -> None:
        """See ``Sink``."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _write(self, line: dict[str, Any]) -> None:
        assert self._file is not None
        rest = json.dumps(line, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        while rest:
            rest = rest[os.write(self._file, rest) :]


def _opened(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    if not _locked(file):
        os.close(file)
        raise OSError(f"another process writes to {path}: give each a file of its own")
    size = os.fstat(file).st_size
    if size and os.pread(file, 1, size - 1) != b"\n":
        os.write(file, b"\n")
    return file


def _locked(file: int) -> bool:
    """Whether nobody else has it; who had it before may be about to close it."""
    for _ in range(_TRIES):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_PAUSE)
        except OSError:
            return True  # some file systems have no locks
        else:
            return True
    return False


class Scalars:
    """A writer of TensorBoard's, or any that has ``add_scalar(tag, value, step)``."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def model(self, number: int, session: SessionBase) -> bool:
        """See ``Sink``."""
        return True

    def step(self, told: Told) -> None:
        """See ``Sink``."""
        for tag, value in scalars_of(told).items():
            self._writer.add_scalar(tag, value, told.record.step)

    def close(self) -> None:
        """See ``Sink``; the writer stays open, it is its owner's."""
        if callable(flush := getattr(self._writer, "flush", None)):
            flush()


class Calls:
    """A function that takes each line as a dictionary."""

    def __init__(self, function: Callable[[dict[str, Any]], Any]) -> None:
        self._function = function

    def model(self, number: int, session: SessionBase) -> bool:
        """See ``Sink``."""
        self._function(model_line(number, session))
        return True

    def step(self, told: Told) -> None:
        """See ``Sink``."""
        self._function(step_line(told))

    def close(self) -> None:
        """See ``Sink``."""
