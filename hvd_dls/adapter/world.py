"""The ranks that exchange gradients, and whether they are still those that agreed."""

from __future__ import annotations

from typing import Any, NamedTuple

from horovod.common import process_sets


class World(NamedTuple):
    """The ranks of a process set, as one of them sees it.

    Attributes:
        rank: number of this process within the set.
        size: number of ranks, P.
        local_size: number of Horovod's processes on this host, which share its cores.
        set_id: of the process set.
        global_rank: number of this process among all of the job.
        local_rank: number of this process among those on this host.
        averages: whether Horovod divides sums over ranks by their number.
    """

    rank: int
    size: int
    local_size: int
    set_id: int
    global_rank: int = 0
    local_rank: int = 0
    averages: bool = True


class _Ranks(list[int]):
    """Ranks of the global process set, as Horovod keeps them; unequal to every list.

    ``hvd.init`` (horovod/common/process_sets.py, ``_init_process_sets``) puts a new list in its
    place where the one that is there is unequal to what the library tells.
    """

    def __ne__(self, other: object) -> bool:
        return True

    __hash__ = None


def epoch() -> Any:
    """An object that is the same until ``hvd.init()`` is called again.

    After that, Horovod's ranks may be others, and everything that they agreed on is void.
    """
    ranks = process_sets.global_process_set.ranks
    if not isinstance(ranks, _Ranks):
        ranks = process_sets.global_process_set.ranks = _Ranks(ranks or ())
    return ranks
