"""The end of a job whose hosts average first: who is through waits for those who are not.

A rank that has made its last step may be a moment ahead of another host's, which still hand on what
came in.  When its process ends, Horovod ends for all ranks.  So processes that end meet there.
"""

from __future__ import annotations

import atexit
import sys
import threading
import weakref
from collections.abc import Callable
from time import perf_counter
from typing import Any

from horovod.common import process_sets

from hvd_dls.core.session.session import Session

# Seconds after a rank's last step: who is not through by then is not on the way to it.
LIMIT = 10.0
_PATIENCE = 2.0  # seconds for the thread to end, once there is nothing to wait for

_models: weakref.WeakKeyDictionary[Session, tuple[int, weakref.WeakMethod[Callable[[], Any]]]]
_models = weakref.WeakKeyDictionary()
_leaving = threading.Event()
_thread: threading.Thread | None = None


def meet_at_exit(session: Session, set_id: int, meet: Callable[[], Any]) -> None:
    """Has this process, when it ends, wait for the other ranks, until LIMIT after the last step.

    To be called after ``hvd.init()``: what is registered last is called first at exit, and Horovod
    registers its shutdown.  A process that ends by an exception does not wait.

    Args:
        session: whose steps count.
        set_id: of the process set of its ranks.
        meet: a method that all ranks of the set call, and that returns when they all have.
    """
    global _thread
    _models[session] = set_id, weakref.WeakMethod(meet)
    if _thread is None:  # now: at exit, Python 3.12 starts no threads
        _thread = threading.Thread(target=_meet_all, name="hvd_dls leaving", daemon=True)
        _thread.start()
    atexit.unregister(_wait)
    atexit.register(_wait)


def _wait() -> None:
    ended = [session.watch.ended for session in _models if not session.in_step]
    left = max(ended, default=float("-inf")) + LIMIT - perf_counter()
    basics: Any = process_sets._basics
    if left > 0 and not hasattr(sys, "last_type") and basics.is_initialized():
        assert _thread is not None
        _leaving.set()
        _thread.join(left)
        if _thread.is_alive():
            # Horovod's own next step at exit: it ends what the thread waits for.  Python would end
            # a thread anywhere, and within Horovod's code that aborts the process.
            basics.shutdown()
            _thread.join(_PATIENCE)


def _meet_all() -> None:
    _leaving.wait()
    sets = {set_id: meet() for set_id, meet in _models.values()}
    for _, meet in sorted(sets.items(), key=lambda item: item[0]):
        if meet is not None:
            try:
                meet()
            except Exception:  # a rank is gone, or Horovod has ended: there is nobody to meet
                return
