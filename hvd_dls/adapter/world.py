"""The ranks that exchange gradients, and whether they are still those that agreed."""

from __future__ import annotations

import os
import sys
from types import FrameType
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


class Ranks(list[int]):
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
    if not isinstance(ranks, Ranks):
        ranks = process_sets.global_process_set.ranks = Ranks(ranks or ())
    return ranks


def own_rank() -> int | None:
    """This process's number among all; None before ``hvd.init()``, and once Horovod has ended."""
    basics: Any = process_sets._basics
    if basics is None or not basics.is_initialized():
        return None
    try:
        return int(basics.rank())
    except ValueError:  # its background thread has ended
        return None


def is_elastic() -> bool:
    """Whether the number of ranks may change; Horovod asks in the same way."""
    return bool(int(os.environ.get("HOROVOD_ELASTIC", 0)))


def within_elastic_run() -> bool:
    """Whether ``hvd.elastic.run`` is what calls (``run_fn``, horovod/common/elastic.py)."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != "horovod.common.elastic":
        frame = frame.f_back
    return frame is not None


def has_lost_its_ranks() -> bool:
    """Whether Horovod, once initialised, has ended by itself: it does when a rank is gone."""
    basics: Any = process_sets._basics
    if not basics.is_initialized():
        return False
    try:
        return 0 not in basics._get_process_set_ids_and_ranks()
    except ValueError:  # "not initialized properly": its background thread has ended
        return True
