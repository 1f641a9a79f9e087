"""What a session knows of a step in progress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hvd_dls.core.balancing.sketch import WINDOW
from hvd_dls.core.selection.backend import Array, Future
from hvd_dls.core.selection.passes import Found
from hvd_dls.core.wire.buckets import Bucket
from hvd_dls.core.wire.payload import NOT_FINITE, Payload
from hvd_dls.errors import NonFiniteGradientError


@dataclass
class Step:
    """A step in progress.

    Attributes:
        gradients: (n,) of the compressed layers that have come in, by name.
        found: what each of them sends; None where the gradient was not finite.
        futures: the same of layers on a device that is still at work; or, of layers that go dense,
            whether they are finite.
        arrived: all layers that have come in, compressed or not.
        not_finite: those that go dense whose gradient was not.
        missing: how many layers of each bucket that was begun have not come in.
        kept: what rounding to 16 bits leaves of each layer's values, by bucket.
        sent: length of each payload that went out, by bucket.
        received: all ranks' payloads, by bucket.
        settled: layers whose residual and gradient are done.
        refused: why nothing of this step may enter residuals and weights.
        whole: histograms of gradients that were sent whole, if they are wanted.
    """

    gradients: dict[str, Array] = field(default_factory=dict)
    found: dict[str, Found | None] = field(default_factory=dict)
    futures: dict[str, Future[Any]] = field(default_factory=dict)
    arrived: set[str] = field(default_factory=set)
    not_finite: list[str] = field(default_factory=list)
    missing: dict[int, int] = field(default_factory=dict)
    kept: dict[int, list[np.ndarray | None]] = field(default_factory=dict)
    sent: dict[int, int] = field(default_factory=dict)
    received: dict[int, list[Payload]] = field(default_factory=dict)
    settled: set[str] = field(default_factory=set)
    refused: NonFiniteGradientError | None = None
    whole: dict[str, np.ndarray] = field(default_factory=dict)

    def found_not_finite(self, buckets: Sequence[Bucket]) -> list[tuple[str, int | None]]:
        """Layers and ranks whose payloads tell of NaN or Inf: the same on every rank."""
        payloads = [
            (buckets[bucket], rank, payload)
            for bucket, received in self.received.items()
            for rank, payload in enumerate(received)
        ]
        sparse: list[tuple[str, int | None]] = [
            (bucket.layers[position].name, rank)
            for bucket, rank, payload in payloads
            for position in np.flatnonzero(payload.status == NOT_FINITE)
        ]
        return sparse + [
            (payload.not_finite, rank)
            for _, rank, payload in payloads
            if payload.not_finite is not None
        ]

    def sketches(
        self, buckets: Sequence[Bucket], rows: Sequence[np.ndarray], world_size: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What ``Controller.advance`` takes: all ranks' sketches of the layers that took part.

        Args:
            buckets: of the model.
            rows: of each bucket's layers among the model's sparse ones.
            world_size: number of ranks, P.
        """
        shape = sum(map(len, rows)), world_size
        present = np.zeros(shape[0], bool)
        bases, counts = np.zeros(shape, np.int64), np.zeros((*shape, WINDOW))
        for bucket, payloads in self.received.items():
            own = rows[bucket]
            present[own] = [layer.name in self.found for layer in buckets[bucket].layers]
            for rank, payload in enumerate(payloads):
                bases[own, rank], counts[own, rank] = payload.bases, payload.counts
        chosen = np.flatnonzero(present)
        return chosen, bases[chosen], counts[chosen]
