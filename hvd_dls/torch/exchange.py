"""Named, asynchronous allgathers of payloads."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, NamedTuple

import horovod.torch as hvd
import numpy as np
import torch
from horovod.common.exceptions import HorovodInternalError

from hvd_dls.adapter import epoch
from hvd_dls.adapter.hosts import HostSets
from hvd_dls.core.session.gathering import Farewell

_SHORTEST, _LONGEST, _SHARE = 2e-4, 3e-3, 1 / 8  # seconds between two looks; of the wait so far
_DONE, _ALONE = -1, -2  # instead of a handle: the result is there; there is nobody else


class Pause:
    """Sleeps between two looks at what one waits for: longer, the longer it has taken.

    Looking costs time of a processor that other ranks, and Horovod's own thread, may need.
    """

    def __init__(self) -> None:
        self._begun = time.monotonic()

    def sleep(self) -> None:
        """Sleeps for an eighth of the wait so far, within limits."""
        waited = time.monotonic() - self._begun
        time.sleep(min(max(_SHARE * waited, _SHORTEST), _LONGEST))


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
    pause = Pause()
    while not hvd.poll(handle):
        pause.sleep()
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


class Stage(Enum):
    """What an operation of a bucket does."""

    ADD_UP = "add"  # inside the host, gradients
    SCATTER = "scatter"  # to a bucket's owners, a part for each
    GATHER = "gather"  # payloads: of all ranks, or of one of each host
    HAND_ON = "hand_on"  # inside the host, what came in


# What is sent: parts for a bucket's owners, in their order, or one array.
_Sent = np.ndarray | list[np.ndarray]


class Operation(NamedTuple):
    """One of a bucket's operations."""

    stage: Stage
    bucket: int


class Exchange:
    """What is on its way of a model.

    A step that is abandoned leaves operations behind, which other ranks have not joined yet.  Until
    they do, the operations' names are in use, and what is to be sent under such a name waits.

    Args:
        label: of the model, the same on every rank.
        process_set: the ranks.
        host_sets: where the ranks of each host average their gradients first; or None.
    """

    def __init__(
        self, label: str, process_set: hvd.ProcessSet, host_sets: HostSets | None = None
    ) -> None:
        self._label = label
        self._sets = dict.fromkeys(Stage, process_set)
        if host_sets is not None:
            inside, across = host_sets
            self._sets |= {Stage.ADD_UP: inside, Stage.HAND_ON: inside}
            self._sets |= {Stage.SCATTER: across, Stage.GATHER: across}
        self._arrays: dict[Operation, _Sent] = {}  # what was not taken yet
        self._handles: dict[Operation, int] = {}
        # Of steps that were abandoned: operations not finished, and arrays not sent.
        self._stale: dict[Operation, int] = {}
        self._leaving: dict[Operation, list[_Sent]] = {}

    @property
    def idle(self) -> bool:
        """Whether nothing is on its way."""
        return not self._arrays

    @property
    def busy(self) -> bool:
        """Whether anything is on its way, or waits for a name that an abandoned step still uses."""
        return bool(self._arrays or self._leaving)

    def send(self, stage: Stage, bucket: int, array: _Sent) -> None:
        """Sends something on its way; what the host is to add up is overwritten."""
        self._arrays[Operation(stage, bucket)] = array
        self._start_waiting()

    def take(self, stage: Stage, take: Callable[[int, np.ndarray], None]) -> bool:
        """Hands over what has come in; waits for nothing.

        Args:
            stage: of the operations.
            take: given a bucket and the result; after an interrupt, perhaps once more.

        Returns:
            Whether there was anything.

        Raises:
            HorovodInternalError: a rank failed or left.
            Exception: whatever ``take`` raises; then that result is gone.
        """
        self._start_waiting()
        mine = [operation for operation in self._arrays if operation.stage is stage]
        done = [operation for operation in mine if self._is_done(operation)]
        for operation in done:
            handle = self._handles.get(operation, _ALONE)
            if handle >= 0:
                self._finish(operation, handle)
            array = self._arrays[operation]
            assert isinstance(array, np.ndarray)  # parts for owners have become theirs for this one
            try:
                take(operation.bucket, array)
            except KeyboardInterrupt:
                raise
            except BaseException:
                self._forget(operation)
                raise
            self._forget(operation)
        return bool(done)

    def _finish(self, operation: Operation, handle: int) -> None:
        try:
            result = hvd.synchronize(handle)
        except HorovodInternalError:
            del self._handles[operation]
            raise
        if isinstance(result, tuple):  # alltoall says how much came from whom, too
            result = result[0]
        self._arrays[operation], self._handles[operation] = result.numpy(), _DONE

    def _is_done(self, operation: Operation) -> bool:
        if self._sets[operation.stage] is None:  # alone
            return True
        handle = self._handles.get(operation)
        return handle is not None and (handle == _DONE or hvd.poll(handle))

    def _forget(self, operation: Operation) -> None:
        self._handles.pop(operation, None)
        del self._arrays[operation]

    def abandon(self, farewell: Mapping[int, Farewell]) -> None:
        """Forgets what is on its way.

        Args:
            farewell: what other ranks may wait for, by bucket.
        """
        leaving = [(op, array) for op, array in self._arrays.items() if op not in self._handles]
        for bucket, last in farewell.items():
            for stage, array in zip(Stage, last, strict=True):
                if array is not None:
                    leaving.append((Operation(stage, bucket), array))
        for operation, array in leaving:
            if self._sets[operation.stage] is not None:
                self._leaving.setdefault(operation, []).append(array)
        self._stale |= {op: handle for op, handle in self._handles.items() if handle >= 0}
        self._arrays, self._handles = {}, {}
        self._start_waiting()

    def _start_waiting(self) -> None:
        for operation, handle in list(self._stale.items()):
            if hvd.poll(handle):
                del self._stale[operation]
                with contextlib.suppress(HorovodInternalError):  # it concerns nobody any more
                    hvd.synchronize(handle)
        for operation, arrays in list(self._leaving.items()):
            if operation not in self._stale:
                self._stale[operation] = self._start(operation, arrays.pop(0))
                if not arrays:
                    del self._leaving[operation]
        for operation, array in self._arrays.items():
            begun = operation in self._handles or operation in self._stale
            if not begun and self._sets[operation.stage] is not None:
                self._handles[operation] = self._start(operation, array)

    def _start(self, operation: Operation, array: _Sent) -> int:
        stage, bucket = operation
        name = f"{self._label}.{bucket}"
        if isinstance(array, list):
            whole = torch.from_numpy(np.concatenate(array))
            splits = torch.tensor([len(part) for part in array], dtype=torch.int32)
            scattered: int = hvd.alltoall_async(
                whole, splits, name=f"{name}.{stage.value}", process_set=self._sets[stage]
            )
            return scattered
        if stage is Stage.GATHER:
            return start(name, array, self._sets[stage])
        name = f"{name}.{stage.value}"
        if stage is Stage.HAND_ON:
            return start(name, array, self._sets[stage])
        handle: int = hvd.allreduce_async_(
            torch.from_numpy(array), name=name, op=hvd.Sum, process_set=self._sets[stage]
        )
        return handle
