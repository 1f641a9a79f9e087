"""Which bucket each layer travels in: fixed by the model, the same on every rank."""

from __future__ import annotations

import numpy as np

from hvd_dls.config import DLSConfig
from hvd_dls.core.balancing.plan import Plan
from hvd_dls.core.wire.buckets import make_buckets


class Routing:
    """The buckets of a model, and the way from a layer's name to its bucket.

    Args:
        plan: the layers.
        config: the options.

    Attributes:
        buckets: in the order in which backward completes them.
        members: names of each bucket's layers, compressed and watched.
        rows: of each bucket's compressed layers among the plan's sparse ones.

    Raises:
        DLSError: see ``make_buckets``.
    """

    def __init__(self, plan: Plan, config: DLSConfig) -> None:
        self.buckets = make_buckets(plan.layers, plan.sparse, config)
        self.members = [frozenset((*(x.name for x in b.layers), *b.watched)) for b in self.buckets]
        row = {layer.name: row for row, layer in enumerate(plan.sparse)}
        self.rows = [np.array([row[x.name] for x in b.layers]) for b in self.buckets]
        self._bucket_of = {
            name: number for number, names in enumerate(self.members) for name in names
        }
        self._position = {
            layer.name: (number, position)
            for number, bucket in enumerate(self.buckets)
            for position, layer in enumerate(bucket.layers)
        }

    def bucket_of(self, name: str) -> int | None:
        """Number of the bucket that a layer travels in, or that tells whether it is finite."""
        return self._bucket_of.get(name)

    def position(self, name: str) -> tuple[int, int]:
        """A compressed layer's bucket, and its number therein."""
        return self._position[name]
