"""Ctrl-C must not cut in two what has to be done whole."""

from __future__ import annotations

# Not ``signal``, whose functions spend 10 µs a call on giving numbers and handlers their names.
import _signal  # type: ignore[import-not-found]
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
            and _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler
        )
        if self._in_charge:
            _signal.signal(_signal.SIGINT, self._note)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._in_charge:
            _signal.signal(_signal.SIGINT, _signal.default_int_handler)
        if self._pressed:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: Any) -> None:
        self._pressed = True
