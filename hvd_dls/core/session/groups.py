"""Ranks whose gradients are averaged before one of them sends for all: those of a host."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property

from hvd_dls.errors import DLSError


class Groups:
    """How the ranks are grouped, and which of a group sends what.

    A bucket has a *share*, one of ``shares``.  In each group the rank with this number selects and
    sends for all: it is the bucket's owner.  Without groups each rank is one.

    Args:
        sizes: ranks in each group, in rank order: the first group has the lowest ranks.
        rank: this one.

    Raises:
        DLSError: a group is empty, or the rank belongs to none.
    """

    def __init__(self, sizes: Sequence[int], rank: int) -> None:
        self.sizes = tuple(sizes)
        if min(self.sizes, default=0) < 1 or not 0 <= rank < sum(self.sizes):
            raise DLSError(f"rank {rank} in groups of {list(self.sizes)} ranks")
        self._starts = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        self.rank = rank
        self.own = bisect_right(self._starts, rank) - 1

    @classmethod
    def of_one(cls, world_size: int, rank: int) -> Groups:
        """Each rank a group of its own."""
        return cls([1] * world_size, rank)

    @property
    def world_size(self) -> int:
        """Number of ranks, P."""
        return sum(self.sizes)

    @property
    def count(self) -> int:
        """Number of groups: of payloads of each bucket that are added up."""
        return len(self.sizes)

    @property
    def trivial(self) -> bool:
        """Whether each rank is a group of its own, and nothing is averaged beforehand."""
        return max(self.sizes) == 1

    @property
    def shares(self) -> int:
        """Ranks of each group that send: those of the smallest group."""
        return min(self.sizes)

    @cached_property
    def share(self) -> int:
        """Number of this rank in its group: of the buckets that it sends."""
        return self.rank - self._starts[self.own]

    @property
    def weight(self) -> float:
        """What makes each rank's gradient its part of the group's average.

        Groups are averaged in the end, as ranks are without them.  Where groups are unequal, those
        of more ranks count for more, so that each rank counts alike.
        """
        return self.count / self.world_size

    @cached_property
    def mates(self) -> list[int]:
        """The ranks of this one's group, itself among them."""
        start = self._starts[self.own]
        return list(range(start, start + self.sizes[self.own]))

    def owners(self, share: int) -> list[int]:
        """The ranks that send the buckets of a share, one of each group."""
        return [start + share for start in self._starts]
