"""Named, asynchronous allgathers of payloads."""

from __future__ import annotations

import horovod.torch as hvd
import numpy as np
import torch
from horovod.common.exceptions import HorovodInternalError

_IF_JOINED = (
    "If a rank called hvd.join(): DLSCompressor gathers its payloads, and Horovod does not support "
    "allgather while ranks have joined. Give every rank the same number of batches instead."
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

    Raises:
        HorovodInternalError: a rank failed or left, as Horovod reports it; elastic training
            recovers from this very type.
    """
    try:
        gathered: torch.Tensor = hvd.synchronize(handle)
    except HorovodInternalError as error:
        raise HorovodInternalError(f"{error}\n{_IF_JOINED}") from error
    return gathered.numpy()
