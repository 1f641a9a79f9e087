"""Ctrl-C must not cut in two what has to be done whole."""

from __future__ import annotations

import signal
import threading
from types import TracebackType
from typing import Any


class Uninterrupted:
    """A block in which Ctrl-C is noted, and raised when the block is over.

    Python raises KeyboardInterrupt between any two operations of the main thread: also right after
    a compiled loop has changed a residual, and before anybody has noted that it has.  Handlers of
    the user's own are left alone.
    """

    def __enter__(self) -> None:
        self._pressed = False
        self._in_charge = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )
        if self._in_charge:
            signal.signal(signal.SIGINT, self._note)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._in_charge:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._pressed:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: Any) -> None:
        self._pressed = True
