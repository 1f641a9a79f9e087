"""Named, asynchronous allgathers of payloads."""

from __future__ import annotations

import time

import horovod.torch as hvd
import numpy as np
import torch
from horovod.common.exceptions import HorovodInternalError

_POLL = 2e-4  # seconds between two looks
# Horovod's own words do not tell: the joined rank's loop may have died and closed its connections.
_IF_JOINED = (
    "If no host or process failed, but a rank called hvd.join(): DLSCompressor gathers its "
    "payloads, and Horovod does not support allgather while ranks have joined. Give every rank the "
    "same number of batches instead."
)


def start(name: str, payload: np.ndarray, process_set: hvd.ProcessSet) -> int:
    """Starts to gather ``payload`` (uint8) from all ranks; returns Horovod's handle.

    Every operation has a name of its own: Horovod matches operations of different ranks by name,
    and ranks may reach them in different orders.
    """
    handle: int = hvd.allgather_async(torch.from_numpy(payload), name=name, process_set=process_set)
    return handle


def finish(handle: int) -> np.ndarray:
    """Waits for all ranks' payloads: (world size * length,) uint8, in rank order.

    Sleeping, because ``hvd.synchronize`` keeps a core busy while it waits (WaitAndClear in
    Horovod's torch/mpi_ops_v2.cc), which other ranks and Horovod's own thread may need.

    Raises:
        HorovodInternalError: a rank failed or left, as Horovod reports it; elastic training
            recovers from this very type.
    """
    while not hvd.poll(handle):
        time.sleep(_POLL)
    try:
        gathered: torch.Tensor = hvd.synchronize(handle)
    except HorovodInternalError as error:
        raise HorovodInternalError(f"{error}\n{_IF_JOINED}") from error
    return gathered.numpy()
