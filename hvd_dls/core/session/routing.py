"""Which bucket each layer travels in: fixed by the model, the same on every rank."""

from __future__ import annotations

import numpy as np

from hvd_dls.config import DLSConfig
from hvd_dls.core.balancing.plan import Plan
from hvd_dls.core.session.groups import Groups
from hvd_dls.core.wire.buckets import bucket_bytes_of, make_buckets
from hvd_dls.core.wire.layout import Bucket

_EACH = 2  # buckets that each rank of a group has to send at least, if there are layers enough


class Routing:
    """The buckets of a model, and the way from a layer's name to its bucket.

    Args:
        plan: the layers.
        config: the options.
        groups: of the ranks.

    Attributes:
        limit: bytes of gradients that travel together, but for layers that are larger.
        buckets: in the order in which backward completes them.
        members: names of each bucket's layers, compressed and watched.
        rows: of each bucket's compressed layers among the plan's sparse ones.
        senders: of each bucket, the ranks that send it, one of each group.
        sends: of each bucket, whether this rank does.
        owned: names of the layers that this rank selects from, and whose residuals it has.

    Raises:
        DLSError: see ``make_buckets``.
    """

    def __init__(self, plan: Plan, config: DLSConfig, groups: Groups) -> None:
        total = sum(layer.size * layer.itemsize for layer in plan.sparse)
        self.limit = bucket_bytes_of(config, groups.count)
        if groups.shares > 1:
            self.limit = min(self.limit, -(-total // (_EACH * groups.shares)))
        self.buckets = make_buckets(plan.layers, plan.sparse, config, self.limit)
        shares = _shared_out(self.buckets, groups.shares)
        self.senders = [groups.owners(share) for share in shares]
        self.sends = [share == groups.share for share in shares]
        self.owned = frozenset(
            layer.name
            for bucket, sends in zip(self.buckets, self.sends, strict=True)
            for layer in bucket.layers
            if sends
        )
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


def _shared_out(buckets: tuple[Bucket, ...], shares: int) -> list[int]:
    """Who sends each bucket: the largest first, each to the one that has least."""
    loads, shared = [0] * shares, [0] * len(buckets)
    for number in sorted(range(len(buckets)), key=lambda number: -buckets[number].size):
        shared[number] = loads.index(min(loads))
        loads[shared[number]] += buckets[number].size
    return shared
