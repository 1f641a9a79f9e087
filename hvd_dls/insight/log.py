"""A log of a training: told at the end of steps, writing in a thread."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import numpy as np

from hvd_dls.core.session.base import SessionBase
from hvd_dls.core.session.tally import period_between
from hvd_dls.core.session.telemetry import StepRecord
from hvd_dls.errors import DLSError
from hvd_dls.insight.lines import Told
from hvd_dls.insight.sinks import Calls, JsonLines, Scalars, Sink

_log = logging.getLogger("hvd_dls")
_MOST = 10_000  # steps that may wait to be written
_PATIENCE = 10.0  # seconds that closing waits for what is still to be written

_Sums = tuple[np.ndarray, float]
_Step = tuple[SessionBase, StepRecord, _Sums, _Sums, int]
_open: weakref.WeakSet[Log] = weakref.WeakSet()


class Log:
    """Observes sessions, and has a thread write down the first step and every few.

    What a step costs the training is handing a few references over; see ``benchmarks/insight.py``.

    Args:
        sink: where lines go.
        every: number of steps from one line to the next.
        name: of the target, for messages.
        ended: called when the log is closed.
    """

    def __init__(self, sink: Sink, every: int, name: str, ended: Callable[[Log], None]) -> None:
        self._sink, self._every, self._name, self._ended = sink, every, name, ended
        # Of each session, the sums at its last line.
        self._last: weakref.WeakKeyDictionary[SessionBase, _Sums] = weakref.WeakKeyDictionary()
        self._queue: SimpleQueue[_Step | threading.Event | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False
        # The thread's own: sessions it knows, and whether they are logged; models by their layers.
        self._known: weakref.WeakKeyDictionary[SessionBase, bool] = weakref.WeakKeyDictionary()
        self._numbers: dict[tuple[str, ...], int] = {}
        self._dropped = 0
        _open.add(self)

    def __call__(self, session: SessionBase) -> None:
        """A step of a session ended: to be called on the training's own thread."""
        record = session.last_step
        then = self._last.get(session)
        if record is None or self._closed or (then is not None and record.step % self._every):
            return
        now = session.tally.sums
        self._last[session] = now
        if self._queue.qsize() >= _MOST:
            self._dropped += 1
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._write_all, name="hvd_dls log", daemon=True)
            self._thread.start()
        before = session.tally.sums_before if then is None else then
        self._queue.put((session, record, before, now, session.skipped))

    def flush(self) -> None:
        """Waits until all steps so far are written."""
        if self._thread is not None and self._thread.is_alive():
            written = threading.Event()
            self._queue.put(written)
            written.wait(_PATIENCE)

    def close(self) -> None:
        """Writes what is left, and ends; once more does nothing."""
        if self._closed:
            return
        self._closed = True
        self._ended(self)
        if self._thread is None:
            return
        self._queue.put(None)
        self._thread.join(_PATIENCE)
        if self._thread.is_alive() or self._dropped:
            _log.warning(
                "the log to %s could not be written fast enough: lines are missing", self._name
            )

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # In the thread ------------------------------------------------------------------------------

    def _write_all(self) -> None:
        good = True
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
            elif good:
                good = self._tried(lambda item=item: self._write(*item))  # type: ignore[misc]
        self._tried(self._sink.close)

    def _tried(self, write: Callable[[], None]) -> bool:
        """Whether it worked; what fails ends the log and not the training."""
        try:
            write()
        except Exception as error:
            _log.warning(
                "the log to %s ends, training goes on: %s: %s",
                self._name,
                type(error).__name__,
                error,
            )
            return False
        return True

    def _write(
        self, session: SessionBase, record: StepRecord, then: _Sums, now: _Sums, skipped: int
    ) -> None:
        names = tuple(layer.name for layer in session.plan.layers)
        number = self._numbers.setdefault(names, len(self._numbers))
        if session not in self._known:
            self._known[session] = self._sink.model(number, session)
        if self._known[session]:
            period = period_between(session.groups, record.sizes, then, now)
            self._sink.step(Told(number, record, period, skipped))


def make_log(target: Any, every: int, among: list[Any]) -> Log:
    """A log to a file, to a writer of scalars or to a function.

    Args:
        target: see ``BaseCompressor.log_to``.
        every: number of steps from one line to the next.
        among: logs, of which it is to be one until it is closed.

    Raises:
        DLSError: target or every is something else.
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise DLSError(f"every={every!r}: accepted is a whole number of steps, at least 1")
    sink: Sink
    if isinstance(target, str | os.PathLike):
        name = os.fspath(target)
        sink = JsonLines(name)
    elif callable(getattr(target, "add_scalar", None)):
        name, sink = type(target).__name__, Scalars(target)
    elif callable(target):
        name, sink = getattr(target, "__name__", type(target).__name__), Calls(target)
    else:
        raise DLSError(
            f"log_to({target!r}): accepted are the path of a file, a writer with "
            "add_scalar(tag, value, step), as torch.utils.tensorboard.SummaryWriter, and a "
            "function that takes a dictionary"
        )
    return Log(sink, every, name, lambda log: among.remove(log) if log in among else None)


@atexit.register
def _close_all() -> None:
    for log in list(_open):
        log.close()
