"""The time that Horovod's calls keep the training's own thread."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

_Method = TypeVar("_Method", bound=Callable[..., Any])


def on_the_watch(method: _Method) -> _Method:
    """A binding's method whose time is part of the ``total`` of the step in progress.

    What the first call does, in which ranks agree and the session is made, is not.
    """

    @functools.wraps(method)
    def timed(self: Any, *args: Any) -> Any:
        session = self.session
        if session is None or not session.watch.enter():
            return method(self, *args)
        try:
            return method(self, *args)
        finally:
            session.watch.leave()

    return timed  # type: ignore[return-value]
