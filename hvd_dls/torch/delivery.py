"""The way of a step's buckets through their stages: what is complete goes out, what came in, on.

Without hosts that average first, payloads are gathered, and that is all.  With them, a bucket's
gradients are added up inside the host; one rank there gathers payloads with those of other hosts;
and hands on what came in.  With exchange="sparse_allreduce", before a bucket is gathered, its
entries go to the owners of its regions, who add them up.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Collection, Mapping

import numpy as np

from hvd_dls.core.session.gathering import Farewell
from hvd_dls.core.session.interrupts import Uninterrupted
from hvd_dls.core.session.session import Session
from hvd_dls.torch.exchange import Exchange, Pause, Stage

_PATIENCE = 1.0  # seconds between two looks whether the thread is still there; or for it to end
_living: weakref.WeakSet[Delivery] = weakref.WeakSet()


class Delivery:
    """Takes a session's buckets through their stages.

    Where hosts average first, or owners add up, a thread does, as long as anything is on its way:
    other ranks need what this one is to send or hand on, whatever its own thread does meanwhile.
    It may be waiting in another operation of Horovod for the very ranks that wait here.

    Args:
        session: whose buckets.
        exchange: theirs.
        lock: held by whoever uses the session while something may be on its way.
    """

    def __init__(self, session: Session, exchange: Exchange, lock: threading.RLock) -> None:
        self.exchange = exchange
        self._session = session
        self._lock = lock
        self._last = Stage.HAND_ON if session.grouped else Stage.GATHER
        self._moved = threading.Condition(lock)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None  # that the thread met
        self._closed = False
        _living.add(self)

    def send_ready(self) -> None:
        """Sends what is complete, but what a device or the host's ranks are still working on."""
        with self._lock:
            if not self._session.staged:
                self._send()
                return
            self._add_up(self._session.to_add_up())
            self._scatter(self._session.to_scatter())
            self._keep_moving()

    def wait_for_all(self) -> None:
        """Sends the rest, and waits until all ranks' payloads are there.

        Raises:
            DLSError: see ``Session.receive``.
            HorovodInternalError: a rank failed or left.
        """
        session = self._session
        if session.all_received and self.exchange.idle and self._error is None:
            return  # as with each layer but a step's first
        if session.staged:
            with self._lock:
                if session.grouped:
                    self._add_up(session.unfinished())
                else:
                    self._scatter(session.unfinished())
                self._keep_moving()
                self._wait_for_thread()
            return
        self._send(session.unfinished())
        if self.exchange.idle:
            return
        pause = Pause()
        with session.watch.waiting():
            while not self.exchange.idle:
                if self.exchange.take(self._last, session.receive):
                    pause = Pause()
                else:
                    pause.sleep()

    def abandon(self, farewell: Mapping[int, Farewell]) -> None:
        """Forgets what is on its way: see ``Exchange.abandon``."""
        with self._lock:
            self.exchange.abandon(farewell)
            self._error = None
            if self._session.staged:
                self._keep_moving()

    def close(self) -> None:
        """Ends the thread, if there is one: nobody waits for what is on its way any more."""
        with self._lock:
            self._closed, thread = True, self._thread
        if thread is not None:
            thread.join(_PATIENCE)

    def _send(self, rest: Collection[int] = ()) -> None:
        for bucket in [*self._session.ready(), *rest]:
            self.exchange.send(Stage.GATHER, bucket, self._session.payload(bucket))

    # Where something comes before the gathering -------------------------------------------------

    def _add_up(self, buckets: list[int]) -> None:
        for bucket in buckets:
            with Uninterrupted():  # what counts as sent is sent
                contribution = self._session.contribution(bucket)
                self.exchange.send(Stage.ADD_UP, bucket, contribution)
                if not self._session.sends(bucket):
                    header = self._session.header(bucket)
                    self.exchange.send(Stage.HAND_ON, bucket, header)

    def _scatter(self, buckets: list[int]) -> None:
        for bucket in buckets:
            with Uninterrupted():
                self.exchange.send(Stage.SCATTER, bucket, self._session.parts(bucket))

    def _keep_moving(self) -> None:
        """Has a thread move buckets on, if any are on their way."""
        with Uninterrupted():
            if self._thread is None and self._error is None and self.exchange.busy:
                self._thread = threading.Thread(
                    target=self._move_all, name="hvd_dls delivery", daemon=True
                )
                self._thread.start()

    def _wait_for_thread(self) -> None:
        if self._error is None and not self.exchange.idle:
            with self._session.watch.waiting():
                while self._error is None and not self.exchange.idle:
                    self._keep_moving()
                    self._moved.wait(_PATIENCE)
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _move_all(self) -> None:
        pause = Pause()
        while True:
            with self._lock:
                try:
                    moved = self._move()
                except BaseException as error:
                    self._error = error
                if self._error is not None or self._closed or not self.exchange.busy:
                    self._thread = None
                    self._moved.notify_all()
                    return
            if moved:
                pause = Pause()
            pause.sleep()

    def _move(self) -> bool:
        """Moves on what can be; returns whether anything could."""
        session, exchange = self._session, self.exchange
        moved = exchange.take(Stage.ADD_UP, session.added_up)
        if session.grouped:
            self._scatter(session.to_scatter())
        moved |= exchange.take(Stage.SCATTER, session.collected)
        self._send()
        if session.grouped:
            moved |= exchange.take(Stage.GATHER, self._hand_on)
        return moved | exchange.take(self._last, session.receive)

    def _hand_on(self, bucket: int, gathered: np.ndarray) -> None:
        self.exchange.send(Stage.HAND_ON, bucket, self._session.hand_on(bucket, gathered))


@atexit.register  # Python would end the thread anywhere, also within Horovod
def _close_all() -> None:
    for delivery in list(_living):
        delivery.close()
