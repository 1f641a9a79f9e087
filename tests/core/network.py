"""Ranks of one process that each go their own way; payloads meet by name and number."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection, Sequence

import numpy as np

from hvd_dls.core.selection.passes_numpy import widened
from hvd_dls.core.session.interrupts import Uninterrupted
from hvd_dls.core.session.session import Session
from tests.core.ranks import Gradients


class Network:
    """As Horovod's: the n-th payload that a rank sends of a bucket meets the n-th of the others."""

    def __init__(self, n_ranks: int) -> None:
        self._sent: list[dict[int, list[np.ndarray]]] = [defaultdict(list) for _ in range(n_ranks)]

    def send(self, rank: int, bucket: int, payload: np.ndarray) -> int:
        """Sends a payload; returns its number, to ask for it later."""
        self._sent[rank][bucket].append(payload)
        return len(self._sent[rank][bucket]) - 1

    def gathered(self, bucket: int, number: int) -> np.ndarray | None:
        """What all ranks sent; None while some have not."""
        if any(len(sent[bucket]) <= number for sent in self._sent):
            return None
        return np.concatenate([sent[bucket][number] for sent in self._sent])

    @property
    def quiet(self) -> bool:
        """Whether no rank waits for another."""
        counts = [{b: len(p) for b, p in sent.items() if p} for sent in self._sent]
        return all(each == counts[0] for each in counts)


class WaitingError(Exception):
    """A rank waits for others, who have not sent what it waits for."""


class Rank:
    """A session and its part of the network: what an adapter is.

    Attributes:
        whole: what this rank has given to be reduced, of layers that go dense.
    """

    def __init__(self, session: Session, network: Network) -> None:
        self.session, self.network = session, network
        self.whole: Gradients = {}
        self._outstanding: deque[tuple[int, int]] = deque()

    def begin(self, away: Collection[str] = ()) -> None:
        """A step begins."""
        self.whole = {}
        self.session.begin(away)

    def compress(self, name: str, gradient: np.ndarray) -> None:
        """A gradient comes in."""
        session = self.session
        if session.is_sparse(name):
            bucket = session.compress(name, gradient)
        else:
            finite = session.dense_step or bool(np.isfinite(widened(gradient)).all())
            bucket = session.note(name, finite)
            self.whole[name] = (
                session.correct(name, gradient) if session.corrects else widened(gradient).copy()
            )
        self._send(bucket)

    def leave_out(self, name: str) -> None:
        """A layer takes no part on this rank."""
        if not self.session.is_sparse(name):
            layer = next(x for x in self.session.plan.layers if x.name == name)
            self.whole[name] = np.zeros(layer.size, layer.work_dtype)
        self._send(self.session.leave_out(name))

    def _send(self, bucket: int | None) -> None:
        if bucket is not None:
            with Uninterrupted():  # what counts as sent is sent
                number = self.network.send(self.session.rank, bucket, self.session.payload(bucket))
                self._outstanding.append((bucket, number))

    def send_rest(self) -> None:
        """Sends buckets of which some layers do not come in."""
        for bucket in self.session.unfinished():
            self._send(bucket)

    def receive(self) -> None:
        """Sends the rest, and takes all that is on its way.

        Raises:
            WaitingError: some of it has not arrived.
            DLSError: see ``Session.receive``.
        """
        self.send_rest()
        while self._outstanding:
            bucket, number = self._outstanding[0]
            gathered = self.network.gathered(bucket, number)
            if gathered is None:
                raise WaitingError
            self._outstanding.popleft()
            self.session.receive(bucket, gathered)

    def finish(self, name: str, out: np.ndarray, ranks: Sequence[Rank], scale: float = 1.0) -> None:
        """Writes the sum of a layer."""
        if name not in self.whole:
            self.session.decompress(name, out, scale)
            return
        with np.errstate(invalid="ignore", over="ignore"):
            reduced = ranks[0].whole[name].copy()
            for other in ranks[1:]:
                reduced += other.whole[name]
            reduced *= reduced.dtype.type(scale)
        counts = self.session.accept(name, reduced if self.session.dense_step else None)
        out[:] = reduced if counts else np.inf if self.session.marks_skipped else 0

    def abandon(self) -> dict[int, np.ndarray]:
        """Gives the step up, and tells the others; returns what it tells them."""
        farewell = self.session.abandon()
        for bucket, payload in farewell.items():
            self.network.send(self.session.rank, bucket, payload)
        self._outstanding.clear()
        return farewell


def outputs(session: Session, names: Collection[str]) -> Gradients:
    """Memory for the sums, full of what nobody may take for one."""
    layers = {layer.name: layer for layer in session.plan.layers}
    return {name: np.full(layers[name].size, np.nan, layers[name].work_dtype) for name in names}


def connect(sessions: Sequence[Session]) -> list[Rank]:
    """Each session as a rank of one network."""
    network = Network(len(sessions))
    return [Rank(session, network) for session in sessions]
