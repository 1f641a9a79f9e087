"""Ranks of one process that each go their own way; payloads meet by name and number."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from hvd_dls.core.selection.passes_numpy import widened
from hvd_dls.core.session.gathering import Farewell
from hvd_dls.core.session.groups import Groups
from hvd_dls.core.session.interrupts import Uninterrupted
from hvd_dls.core.session.session import Session
from tests.core.ranks import Gradients


class Network:
    """As Horovod's: the n-th payload that a rank sends of a bucket meets the n-th of the others.

    And so do contributions inside a group.
    """

    def __init__(self, groups: Groups) -> None:
        n_ranks = groups.world_size
        self._groups = groups
        self.ranks: list[Rank] = []
        self._sent, self._added, self._scattered, self._handed = (
            [defaultdict[int, list[Any]](list) for _ in range(n_ranks)] for _ in range(4)
        )

    def contribute(self, rank: int, bucket: int, contribution: np.ndarray) -> int:
        """Sends a contribution; returns its number, to ask for the sum later."""
        self._added[rank][bucket].append(contribution)
        return len(self._added[rank][bucket]) - 1

    def hand_on(self, rank: int, bucket: int, array: np.ndarray) -> int:
        """Hands something on inside the group; returns its number."""
        self._handed[rank][bucket].append(array)
        return len(self._handed[rank][bucket]) - 1

    def total(self, ranks: Sequence[int], bucket: int, number: int) -> np.ndarray | None:
        """What these ranks contributed, added up; None while some have not."""
        there = self._of(self._added, ranks, bucket, number)
        return None if there is None else sum(there[1:], start=there[0])

    def scatter(self, rank: int, bucket: int, parts: list[np.ndarray]) -> int:
        """Sends parts to a bucket's owners; returns their number."""
        self._scattered[rank][bucket].append(parts)
        return len(self._scattered[rank][bucket]) - 1

    def parts_for(
        self, owner: int, ranks: Sequence[int], bucket: int, number: int
    ) -> np.ndarray | None:
        """What these ranks sent the owner of this number; None while some have not."""
        there = self._of(self._scattered, ranks, bucket, number)
        return None if there is None else np.concatenate([parts[owner] for parts in there])

    def handed_on(self, ranks: Sequence[int], bucket: int, number: int) -> np.ndarray | None:
        """What these ranks handed on; None while some have not."""
        there = self._of(self._handed, ranks, bucket, number)
        return None if there is None else np.concatenate(there)

    def _of(self, where, ranks: Sequence[int], bucket: int, number: int) -> list[Any] | None:
        there = [where[rank][bucket] for rank in ranks]
        return None if any(len(x) <= number for x in there) else [x[number] for x in there]

    def send(self, rank: int, bucket: int, payload: np.ndarray) -> int:
        """Sends a payload; returns its number, to ask for it later."""
        self._sent[rank][bucket].append(payload)
        return len(self._sent[rank][bucket]) - 1

    def gathered(self, ranks: Sequence[int], bucket: int, number: int) -> np.ndarray | None:
        """What these ranks sent; None while some have not."""
        there = self._of(self._sent, ranks, bucket, number)
        return None if there is None else np.concatenate(there)

    @property
    def quiet(self) -> bool:
        """Whether no rank waits for another."""
        routing = self.ranks[0].session.routing
        for bucket, senders in enumerate(routing.senders):
            everyone = range(len(self.ranks))
            grouped = not self._groups.trivial
            counts = {len(self._sent[rank][bucket]) for rank in senders}
            if self.ranks[0].session.owners is not None:
                counts |= {len(self._scattered[rank][bucket]) for rank in senders}
            if grouped:
                counts |= {len(self._added[r][bucket]) for r in everyone}
                counts |= {len(self._handed[r][bucket]) for r in everyone}
            if len(counts) > 1:
                return False
        return True


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
        self._adding: dict[int, int] = {}
        self._collecting: dict[int, int] = {}
        self._across: dict[int, int] = {}

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
        session, network = self.session, self.network
        with Uninterrupted():  # what counts as sent is sent
            if bucket is None:
                pass
            elif not session.staged:
                number = network.send(session.rank, bucket, session.payload(bucket))
                self._outstanding.append((bucket, number))
            elif not session.grouped:
                self._scatter(bucket)
            else:
                contribution = session.contribution(bucket)
                self._adding[bucket] = network.contribute(session.rank, bucket, contribution)
                if not session.sends(bucket):
                    number = network.hand_on(session.rank, bucket, session.header(bucket))
                    self._outstanding.append((bucket, number))
            self._send_ready()

    def _scatter(self, bucket: int) -> None:
        parts = self.session.parts(bucket)
        self._collecting[bucket] = self.network.scatter(self.session.rank, bucket, parts)

    def _send_ready(self) -> None:
        """What has been added up inside the group is taken, and sent; what comes in, handed on."""
        session, network = self.session, self.network
        if not session.staged:
            return
        mates, rank = session.groups.mates, session.rank
        for bucket, number in list(self._adding.items()):
            total = network.total(mates, bucket, number)
            if total is not None:
                session.added_up(bucket, total)
                del self._adding[bucket]
        if session.grouped:
            for bucket in session.to_scatter():
                self._scatter(bucket)
        for bucket, number in list(self._collecting.items()):
            senders = session.routing.senders[bucket]
            parts = network.parts_for(senders.index(rank), senders, bucket, number)
            if parts is not None:
                session.collected(bucket, parts)
                del self._collecting[bucket]
        for bucket in session.ready():
            number = network.send(rank, bucket, session.payload(bucket))
            if session.grouped:
                self._across[bucket] = number
            else:
                self._outstanding.append((bucket, number))
        for bucket, number in list(self._across.items()):
            gathered = network.gathered(session.routing.senders[bucket], bucket, number)
            if gathered is not None:
                del self._across[bucket]
                number = network.hand_on(rank, bucket, session.hand_on(bucket, gathered))
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
        for _ in range(4):
            for rank in self.network.ranks:  # they look by themselves, too
                with Uninterrupted():
                    rank._send_ready()
        if self._adding or self._collecting or self._across:
            raise WaitingError
        while self._outstanding:
            bucket, number = self._outstanding[0]
            gathered = self._gathered(bucket, number)
            if gathered is None:
                raise WaitingError
            self._outstanding.popleft()
            self.session.receive(bucket, gathered)

    def _gathered(self, bucket: int, number: int) -> np.ndarray | None:
        groups, network = self.session.groups, self.network
        if self.session.grouped:
            return network.handed_on(groups.mates, bucket, number)
        return network.gathered(range(groups.world_size), bucket, number)

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

    def abandon(self) -> dict[int, Farewell]:
        """Gives the step up, and tells the others; returns what it tells them."""
        farewell = self.session.abandon()
        self._tell(farewell)
        self._outstanding.clear()
        self._adding.clear()
        self._collecting.clear()
        self._across.clear()
        return farewell

    def load(self, state: Mapping[str, Any], rounds: np.ndarray) -> None:
        """Goes on from a state, as all ranks do.

        Args:
            state: of this rank.
            rounds: the largest of all ranks' ``Session.rounds``.
        """
        self.abandon()
        for farewell in self.session.sit_out(rounds):
            self._tell(farewell)
        self.session.load_state_dict(state)

    def _tell(self, farewell: Mapping[int, Farewell]) -> None:
        network, rank = self.network, self.session.rank
        for bucket, last in farewell.items():
            if last.contribution is not None:
                network.contribute(rank, bucket, last.contribution)
            if last.parts is not None:
                network.scatter(rank, bucket, last.parts)
            if last.payload is not None:
                network.send(rank, bucket, last.payload)
            if last.header is not None:
                network.hand_on(rank, bucket, last.header)


def outputs(session: Session, names: Collection[str]) -> Gradients:
    """Memory for the sums, full of what nobody may take for one."""
    layers = {layer.name: layer for layer in session.plan.layers}
    return {name: np.full(layers[name].size, np.nan, layers[name].work_dtype) for name in names}


def connect(sessions: Sequence[Session]) -> list[Rank]:
    """Each session as a rank of one network."""
    network = Network(sessions[0].groups)
    network.ranks = [Rank(session, network) for session in sessions]
    return network.ranks
