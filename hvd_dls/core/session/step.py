"""What a session knows of a step in progress."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from hvd_dls.core.selection.backend import Array, Future
from hvd_dls.core.selection.passes import Found
from hvd_dls.core.session.owners import Merged
from hvd_dls.core.session.routing import Routing
from hvd_dls.core.wire.layout import ABSENT, NOT_FINITE, SENT, Abandoned, Status
from hvd_dls.core.wire.payload import Payloads, Told
from hvd_dls.errors import DLSError, NonFiniteGradientError


class Step:
    """A step in progress: it gathers gradients and payloads, then it is settled, layer by layer.

    While it gathers, nothing that outlives the step has changed, so it can be forgotten.  Once the
    first layer is settled, all others have to be: what came in is here.

    Args:
        routing: of the model.
        away: names of layers whose buckets need not wait for them.

    Attributes:
        gradients: (n,) of the compressed layers that have come in, by name.
        found: what each of them sends; None where the gradient was not finite.
        futures: the same of layers on a device that is still at work; or, of layers that go dense,
            whether they are finite.
        k: entries that each of them is to send.
        arrived: all layers that have come in, compressed or not.
        left_out: those of them that take no part on this rank; once a bucket is added up, on no
            rank of the group.
        stayed_away: those of them that take no part on this rank.
        not_finite: those that go dense whose gradient was not.
        kept: what rounding to 16 bits leaves of each layer's values, by bucket.
        closed: buckets whose layers have been put together: no more can come in.
        added_up: those of them of which all ranks' of the group are together: see ``Averaging``.
        abandoned: why, of those of them of which a rank of the group is in another step, or gave it
            up.
        watched_in_group: what to tell of layers that go dense, for the whole group, by bucket.
        sent: length of each payload that went out, by bucket.
        host_bytes: that went to other ranks of the group.
        handed_on: buckets whose payloads, or a header, went to the other ranks of the group.
        scattered: length of what was sent to a bucket's owners, by bucket.
        collected: buckets of which all that send them have sent this owner its part.
        merged: what this rank has made of its region of a bucket, with exchange="sparse_allreduce".
        rounding: what rounding to 16 bits leaves of the sums that it hands out.
        told: what ranks said to it, of those buckets where some is in another step.
        received: all ranks' payloads, by bucket.
        settled: layers whose residual and gradient are done.
        given_up: whether another rank has told that it gave the step up.
        refused: why nothing of this step may enter residuals and weights.
        untouched: layers that came in and took no part on any rank.
        whole: histograms of gradients that were sent whole, if they are wanted.
    """

    def __init__(self, routing: Routing, away: Collection[str] = ()) -> None:
        self._routing = routing
        self._away = frozenset(away)
        self._awaited: dict[int, frozenset[str]] = {}  # layers that a bucket waits for, once begun
        self.gradients: dict[str, Array] = {}
        self.found: dict[str, Found | None] = {}
        self.futures: dict[str, Future[Any]] = {}
        self.k: dict[str, int] = {}
        self.arrived: set[str] = set()
        self.left_out: set[str] = set()
        self.stayed_away: set[str] = set()
        self.not_finite: set[str] = set()
        self.kept: dict[int, list[np.ndarray | None]] = {}
        self.closed: set[int] = set()
        self.added_up: set[int] = set()
        self.abandoned: dict[int, Abandoned] = {}
        self.watched_in_group: dict[int, dict[str, Status]] = {}
        self.sent: dict[int, int] = {}
        self.host_bytes = 0
        self.handed_on: set[int] = set()
        self.scattered: dict[int, int] = {}
        self.collected: set[int] = set()
        self.merged: dict[int, Merged] = {}
        self.rounding: dict[int, list[np.ndarray | None]] = {}
        self.told: dict[int, dict[int, Told]] = {}
        self.received: dict[int, Payloads] = {}
        self.settled: set[str] = set()
        self.given_up = False
        self.refused: NonFiniteGradientError | None = None
        self.untouched: frozenset[str] = frozenset()
        self.whole: dict[str, np.ndarray] = {}

    # Gathering ----------------------------------------------------------------------------------

    def check(self, name: str, left_out: bool = False) -> None:
        """Whether a layer may come in.

        Args:
            name: of the layer.
            left_out: whether it takes no part on this rank, and nothing will be sent of it.

        Raises:
            DLSError: it has come in before, or after its bucket was sent.
        """
        if name in self.arrived:
            raise DLSError(f"layer {name!r}: compressed twice before it was decompressed")
        if not left_out and self._routing.bucket_of(name) in self.closed:
            raise DLSError(
                f"layer {name!r}: its gradient came after those that it travels with were sent, "
                "because it was frozen or sparse when the step began; this step is lost, the next "
                "one has it"
            )

    def begin(self, bucket: int) -> None:
        """A bucket's first layer is about to come in, or one after it."""
        if bucket not in self._awaited:
            self._awaited[bucket] = self._routing.members[bucket] - self._away

    def arrive(self, name: str) -> None:
        """A layer that may comes in: one operation, which Ctrl-C cannot cut in two."""
        self.arrived.add(name)

    def stay_away(self, name: str) -> None:
        """A layer that may comes in, of which this rank has nothing."""
        self.left_out.add(name)
        self.stayed_away.add(name)
        self.arrived.add(name)

    def is_complete(self, bucket: int) -> bool:
        """Whether a bucket that has begun can be closed now, and waits for no layer."""
        return bucket not in self.closed and self._awaited[bucket] <= self.arrived

    @property
    def complete(self) -> bool:
        """Whether no bucket waits for a layer."""
        return all(members - self._away <= self.arrived for members in self._routing.members)

    def ready(self) -> list[int]:
        """Buckets that are complete, have not been closed, and need not wait for a device."""
        return [
            bucket
            for bucket in self._awaited
            if self.is_complete(bucket)
            if all(self.futures[name].ready() for name in self.working_on(bucket))
        ]

    def working_on(self, bucket: int) -> frozenset[str]:
        """Layers of a bucket of which a device has not been heard."""
        return self._routing.members[bucket] & self.futures.keys()

    @property
    def begun(self) -> list[int]:
        """Buckets of which some layer has come in, in order."""
        return sorted(self._awaited)

    @property
    def all_received(self) -> bool:
        """Whether all ranks' payloads of all buckets that have begun are there."""
        return self._awaited.keys() <= self.received.keys()

    def status_of_watched(self, bucket: int) -> dict[str, Status]:
        """What to tell of the layers that a bucket watches, by name; of the others, SENT."""
        if bucket in self.watched_in_group:
            return self.watched_in_group[bucket]
        told: dict[str, Status] = {}
        for name in self._routing.buckets[bucket].watched:
            if name in self.left_out or name not in self.arrived:
                told[name] = ABSENT
            elif name in self.not_finite:
                told[name] = NOT_FINITE
        return told

    # What all ranks sent ------------------------------------------------------------------------

    def layers_that_say(self, status: Status) -> list[tuple[str, int | None]]:
        """Layers and the ranks that say so of them, in all that was received; None: unknown."""
        said: list[tuple[str, int | None]] = []
        for number, payloads in self.received.items():
            bucket, senders = self._routing.buckets[number], self._routing.senders[number]
            names = [*(layer.name for layer in bucket.layers), *bucket.watched]
            told = np.concatenate([payloads.status, payloads.watched], axis=1)
            for row, i in np.argwhere(told == status).tolist():
                who: list[int | None] = [senders[row]]
                if payloads.from_owners:
                    who = [senders[rank] for name, rank in payloads.named if name == names[i]]
                said += [(names[i], rank) for rank in who or [None]]
        return said

    def thresholds_in_group(self, group: int) -> dict[str, float]:
        """The smallest magnitude that a group's other ranks sent of each of their layers.

        Where owners add up, of their sums: only a place to begin to look.
        """
        thresholds: dict[str, float] = {}
        for number, payloads in self.received.items():
            if self._routing.sends[number]:
                continue
            for position, layer in enumerate(self._routing.buckets[number].layers):
                row = 0 if payloads.from_owners else group
                _, values = payloads.received(position)[row]
                if len(values):
                    thresholds[layer.name] = float(np.abs(values).min())
        return thresholds

    def present(self, n_layers: int) -> np.ndarray:
        """(n_layers,) bool: of each of the plan's sparse layers, whether some rank sent it."""
        present = np.zeros(n_layers, bool)
        for number, payloads in self.received.items():
            present[self._routing.rows[number]] |= (payloads.status == SENT).any(axis=0)
        return present

    def sketches(self, rows: np.ndarray, n_layers: int) -> tuple[np.ndarray, np.ndarray]:
        """First bins and counts of all ranks' sketches of the layers in ``rows``, as they came."""
        senders = max(map(len, self.received.values()), default=1)
        window = next((payloads.counts.shape[2] for payloads in self.received.values()), 1)
        bases = np.zeros((n_layers, senders), np.int64)
        counts = np.zeros((n_layers, senders, window))
        for number, payloads in self.received.items():
            own = self._routing.rows[number]
            there = len(payloads)
            bases[own, :there] = payloads.bases.T
            counts[own, :there] = payloads.counts.swapaxes(0, 1)
        return bases[rows], counts[rows]
