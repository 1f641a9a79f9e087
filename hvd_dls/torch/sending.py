"""The way of a step's buckets through their stages: what is complete goes out, what came in, on.

Without hosts that average first, payloads are gathered, and that is all.  With them, a bucket's
gradients are added up inside the host; its owner there gathers payloads with those of other hosts;
and hands on what came in.
"""

from __future__ import annotations

import numpy as np

from hvd_dls.core.session.interrupts import Uninterrupted
from hvd_dls.core.session.session import Session
from hvd_dls.torch.exchange import Exchange, Pause, Stage


def send_ready(session: Session, exchange: Exchange) -> bool:
    """Sends what is complete, but what a device or the host's ranks are still working on.

    Returns:
        Whether anything has come in from the host's ranks, or been handed on to them.
    """
    moved = False
    if session.grouped:
        for bucket in session.to_add_up():
            _add_up(session, exchange, bucket)
        moved = exchange.take(Stage.ADD_UP, session.added_up)
    for bucket in session.ready():
        exchange.send(Stage.GATHER, bucket, session.payload(bucket))
    if session.grouped:
        moved |= _hand_on(session, exchange)
    return moved


def send_rest(session: Session, exchange: Exchange) -> None:
    """Sends buckets of which some layers take no part, and waits for devices."""
    for bucket in session.unfinished():
        if session.grouped:
            _add_up(session, exchange, bucket)
        else:
            exchange.send(Stage.GATHER, bucket, session.payload(bucket))


def wait_for_all(session: Session, exchange: Exchange) -> None:
    """Waits until all ranks' payloads are there.

    Raises:
        DLSError: see ``Session.receive``.
        HorovodInternalError: a rank failed or left.
    """
    last, pause = Stage.HAND_ON if session.grouped else Stage.GATHER, Pause()
    while not exchange.idle:
        moved = session.grouped and send_ready(session, exchange)
        moved |= exchange.take(last, session.receive)
        if moved:
            pause = Pause()
        else:
            pause.sleep()


def _add_up(session: Session, exchange: Exchange, bucket: int) -> None:
    with Uninterrupted():  # what counts as sent is sent
        exchange.send(Stage.ADD_UP, bucket, session.contribution(bucket))
        if not session.sends(bucket):
            exchange.send(Stage.HAND_ON, bucket, session.header(bucket))


def _hand_on(session: Session, exchange: Exchange) -> bool:
    def hand_on(bucket: int, gathered: np.ndarray) -> None:
        with Uninterrupted():
            exchange.send(Stage.HAND_ON, bucket, session.hand_on(bucket, gathered))

    return exchange.take(Stage.GATHER, hand_on)
