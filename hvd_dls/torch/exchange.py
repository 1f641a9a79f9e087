"""Named, asynchronous allgathers of payloads."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch
from horovod.common.exceptions import HorovodInternalError

from hvd_dls.adapter import epoch

_POLL = 2e-4  # seconds between two looks


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
    gathered: torch.Tensor = hvd.synchronize(handle)
    return gathered.numpy()


# Operations of ``gather`` that an interrupt left unfinished, by name and process set.
_unfinished: dict[tuple[str, int], tuple[Any, int]] = {}


def gather(name: str, array: np.ndarray, process_set: hvd.ProcessSet) -> np.ndarray:
    """All ranks' arrays (uint8), of any lengths, one after the other in rank order.

    If an interrupt ended the wait before, it goes on: what was sent then is what counts.

    Raises:
        HorovodInternalError: see ``finish``.
    """
    key = (name, process_set.process_set_id)
    begun = _unfinished.get(key)
    if begun is None or begun[0] is not epoch():
        begun = _unfinished[key] = epoch(), start(name, array, process_set)
    try:
        gathered = finish(begun[1])
    except HorovodInternalError:
        del _unfinished[key]
        raise
    del _unfinished[key]
    return gathered


class Exchange:
    """The payloads of a model that are on their way.

    A step that is abandoned leaves operations behind, which other ranks have not joined yet.  Until
    they do, the operations' names are in use, and what is to be sent under such a name waits.

    Args:
        label: of the model, the same on every rank.
        process_set: the ranks.
    """

    def __init__(self, label: str, process_set: hvd.ProcessSet) -> None:
        self._label = label
        self._process_set = process_set
        self._payloads: dict[int, np.ndarray] = {}  # of buckets that were not taken yet
        self._handles: dict[int, int] = {}
        # Of steps that were abandoned: operations not finished, and payloads not sent.
        self._stale: dict[int, int] = {}
        self._leaving: dict[int, list[np.ndarray]] = {}

    def send(self, bucket: int, payload: np.ndarray) -> None:
        """Sends a bucket's payload on its way."""
        self._payloads[bucket] = payload
        self._start_waiting()

    def receive(self, take: Callable[[int, np.ndarray], None]) -> None:
        """Waits for all that is on its way.

        It can be interrupted, and called again.

        Args:
            take: given a bucket and all ranks' payloads.

        Raises:
            HorovodInternalError: see ``finish``.
            Exception: whatever ``take`` raises.
        """
        while self._payloads:
            self._start_waiting()
            done = [bucket for bucket, handle in self._handles.items() if hvd.poll(handle)]
            for bucket in done:
                gathered = finish(self._handles.pop(bucket))
                del self._payloads[bucket]
                take(bucket, gathered)
            if not done:
                time.sleep(_POLL)

    def abandon(self, farewell: Mapping[int, np.ndarray]) -> None:
        """Forgets what is on its way.

        Args:
            farewell: payloads that other ranks may wait for, by bucket.
        """
        unsent = {b: p for b, p in self._payloads.items() if b not in self._handles}
        for bucket, payload in [*unsent.items(), *farewell.items()]:
            self._leaving.setdefault(bucket, []).append(payload)
        self._stale |= self._handles
        self._payloads, self._handles = {}, {}
        self._start_waiting()

    def _start_waiting(self) -> None:
        for bucket, handle in list(self._stale.items()):
            if hvd.poll(handle):
                del self._stale[bucket]
                with contextlib.suppress(HorovodInternalError):  # it concerns nobody any more
                    hvd.synchronize(handle)
        for bucket, payloads in list(self._leaving.items()):
            if bucket not in self._stale:
                self._stale[bucket] = self._start(bucket, payloads.pop(0))
                if not payloads:
                    del self._leaving[bucket]
        for bucket, payload in self._payloads.items():
            if bucket not in self._handles and bucket not in self._stale:
                self._handles[bucket] = self._start(bucket, payload)

    def _start(self, bucket: int, payload: np.ndarray) -> int:
        return start(f"{self._label}.{bucket}", payload, self._process_set)
