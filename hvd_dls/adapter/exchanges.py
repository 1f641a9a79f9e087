"""How entries get from rank to rank: what was asked for, or what "auto" comes to."""

from __future__ import annotations

import os

from hvd_dls.config import ALLGATHER, AUTO, SPARSE_ALLREDUCE, DLSConfig
from hvd_dls.core.session.baselines import BASELINES
from hvd_dls.errors import DLSError

# Ranks that send, from which on owners were faster at the same density (docs/scale.md).
_MANY = 8


def exchange_of(config: DLSConfig, senders: int, on_device: bool = False) -> str:
    """The exchange that is meant: of "auto", the one that ``senders`` ranks are better off with.

    Args:
        config: the options.
        senders: ranks that send each bucket: all, or with ``hierarchical`` one of each host.
        on_device: whether some layers' passes are made on a device, if they can be: owners add up
            on the host.

    Raises:
        DLSError: an elastic job has not got it; on every rank alike.
    """
    exchange, elastic = config.exchange, os.environ.get("HOROVOD_ELASTIC") == "1"
    if exchange == AUTO:
        can = config.strategy not in BASELINES and not elastic and not on_device
        return SPARSE_ALLREDUCE if can and senders >= _MANY else ALLGATHER
    if exchange == SPARSE_ALLREDUCE and elastic:
        raise DLSError(
            f"exchange={exchange!r} in an elastic job: what owners have added up would be lost "
            "with a worker that leaves; leave exchange out"
        )
    return exchange
