"""Which ranks share a host, and the process sets in which they average and exchange gradients."""

from __future__ import annotations

import os
import socket
import zlib
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from horovod.common import process_sets

from hvd_dls.adapter.world import World
from hvd_dls.core.session.groups import Groups
from hvd_dls.errors import DLSError


def row_of(world: World) -> np.ndarray:
    """What a rank says of its host, to be gathered: uint8."""
    first = world.global_rank - world.local_rank
    name = zlib.crc32(socket.gethostname().encode())
    return np.array([world.global_rank, first, name, world.local_size], np.int64).view(np.uint8)


def groups_of(gathered: np.ndarray, world: World) -> tuple[Groups, list[list[int]]]:
    """The ranks of each host.

    Args:
        gathered: all ranks' rows, in rank order.
        world: the ranks.

    Returns:
        The groups, and each host's ranks as ``hvd.rank()`` numbers them.

    Raises:
        DLSError: elastic training, or ranks of a host that do not follow each other; on every rank
            alike.
    """
    if os.environ.get("HOROVOD_ELASTIC") == "1":
        raise DLSError(
            "hierarchical=True in an elastic job: it needs process sets, which Horovod does not "
            "form anew when workers come and go; leave hierarchical out"
        )
    rows = gathered.view(np.int64).reshape(world.size, 4)
    hosts = [list(rows) for _, rows in groupby(rows.tolist(), key=lambda row: row[1:3])]
    for rows_of_host in hosts:
        # A process set may leave some of a host's ranks out.
        if world.set_id == 0 and len(rows_of_host) != rows_of_host[0][3]:
            raise DLSError(
                f"hierarchical=True: a host has {rows_of_host[0][3]} ranks, but only "
                f"{[row[0] for row in rows_of_host]} follow each other there; number the ranks "
                "host by host, as horovodrun does (mpirun: --map-by slot)"
            )
    ranks = [[row[0] for row in rows_of_host] for rows_of_host in hosts]
    return Groups([len(of_host) for of_host in ranks], world.rank), ranks


class HostSets(NamedTuple):
    """Process sets that this rank is in.

    Attributes:
        inside: the ranks of its host; None if it is alone there.
        across: the ranks that send the same buckets as it does, one of each host; None if it sends
            none.
    """

    inside: Any
    across: Any


def known_sets() -> dict[tuple[int, ...], int]:
    """The ids of the process sets that Horovod has, by their ranks.

    To be read while all ranks are sure to be there: when another has ended, Horovod knows none.
    """
    basics: Any = process_sets._basics
    sets: dict[int, list[int]] = basics._get_process_set_ids_and_ranks()
    return {tuple(ranks): number for number, ranks in sets.items()}


def host_sets(
    groups: Groups, hosts: list[list[int]], world: World, known: dict[tuple[int, ...], int]
) -> HostSets:
    """The process sets of this rank, made on all ranks if they are not there.

    Args:
        groups: the ranks of each host.
        hosts: the same as ``hvd.rank()`` numbers them.
        world: the ranks.
        known: see ``known_sets``; those that are made are added.

    Raises:
        DLSError: Horovod may not make process sets now; on every rank alike.
    """
    across = [[ranks[share] for ranks in hosts] for share in range(groups.shares)]
    wanted = [ranks for ranks in (*hosts, *across) if len(ranks) > 1]
    missing = [ranks for ranks in wanted if tuple(ranks) not in known]
    if missing and world.set_id != 0:
        raise _refusal(wanted, "the ranks of a process set cannot add others")
    for ranks in missing:
        try:
            known[tuple(ranks)] = process_sets.add_process_set(ranks).process_set_id
        except ValueError as error:
            raise _refusal(wanted, str(error)) from error

    def own(sets: list[list[int]]) -> Any:
        ranks = next((r for r in sets if world.global_rank in r and len(r) > 1), None)
        if ranks is None:
            return None
        process_set = process_sets.ProcessSet(ranks)
        process_set.process_set_id = known[tuple(ranks)]
        return process_set

    return HostSets(own(hosts), own(across))


def _refusal(wanted: list[list[int]], why: str) -> DLSError:
    sets = ", ".join(f"hvd.ProcessSet({ranks})" for ranks in wanted)
    return DLSError(
        "hierarchical=True needs process sets: of each host's ranks, and of those that exchange "
        f"between hosts. Call\n    hvd.init(process_sets=[{sets}])\n"
        "or, if all ranks train together, start the job with HOROVOD_DYNAMIC_PROCESS_SETS=1 in its "
        f"environment. (Horovod: {why})"
    )
