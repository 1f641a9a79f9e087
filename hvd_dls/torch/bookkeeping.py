"""Horovod's own record of a step: which gradients it has handed over and not got back."""

from __future__ import annotations

import contextlib
import inspect
import logging
import time
from collections.abc import Callable, Collection, Iterator, Set
from functools import partial
from typing import Any

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError

_log = logging.getLogger("hvd_dls")
_POLL = 1e-3  # seconds between two looks
_PATIENCE = 60.0  # seconds to wait for what other ranks have to join
# What Horovod raises for operations that failed, and for all of them once it was shut down.
_FAILED = (HorovodInternalError, ValueError, RuntimeError)


def hand_over_rest(optimizer: Any, record: dict[Any, Any], sparse: Collection[int]) -> None:
    """Begins the reductions of a step that are missing, whatever they are to bring.

    Other ranks may wait for them; and the next step uses their names again.

    Args:
        optimizer: Horovod's.
        record: its handles in that step, by parameter or group; those that are begun are added.
        sparse: ids of parameters that Horovod never hands over, as their gradients are sparse.
    """
    for key, begin in rest_of(optimizer, record):
        # It fails if an interrupt came between the reduction's begin and Horovod's record of it,
        # and for all of them if Horovod was shut down.
        with contextlib.suppress(*_FAILED):
            record[key] = (
                _reduce_no_rows(optimizer, optimizer._parameter_names[key], key)
                if id(key) in sparse
                else begin()
            )


def rest_of(
    optimizer: Any, record: dict[Any, Any], singly: Set[int] = frozenset()
) -> Iterator[tuple[Any, Callable[[], tuple[Any, Any]]]]:
    """The reductions of a step that Horovod has not begun.

    Args:
        optimizer: Horovod's.
        record: its handles in that step, by parameter or group.
        singly: ids of parameters whose groups are not reduced as one.

    Yields:
        Parameter or group, and what begins its reduction; the same order on all ranks.
    """
    begun = {id(p) for p, (handle, _) in record.items() if handle is not None}
    for group in optimizer._group_counts:
        if not begun.isdisjoint(map(id, group)) or not singly.isdisjoint(map(id, group)):
            continue  # some had no gradient, so Horovod was beginning all of them one by one
        if id(group) not in begun:
            for parameter in group:
                if parameter.grad is None:  # as Horovod has it for one that it begins alone
                    parameter.grad = torch.zeros_like(parameter)
            yield group, partial(optimizer._grouped_allreduce_grad_async, group)
        begun.update(map(id, group))
    for _, parameter in names_and_parameters(optimizer):
        if id(parameter) not in begun:
            yield parameter, partial(optimizer._allreduce_grad_async, parameter)


def _reduce_no_rows(optimizer: Any, name: str, parameter: torch.Tensor) -> tuple[Any, None]:
    """Begins what Horovod does for an embedding's gradient, of no rows."""
    gradient = no_rows(parameter)
    handle = hvd.sparse_allreduce_async(
        gradient, name=name, op=optimizer.op, process_set=optimizer.process_set
    )
    return handle, None


def no_rows(parameter: torch.Tensor) -> torch.Tensor:
    """A sparse gradient of no rows, as of an embedding of which none was used."""
    rows = parameter.new_empty(0, *parameter.shape[1:])
    indices = torch.empty(1, 0, dtype=torch.int64, device=parameter.device)
    return torch.sparse_coo_tensor(indices, rows, parameter.shape)


def reductions_in(record: dict[Any, Any]) -> list[int]:
    """Handles of the reductions in Horovod's record of a step."""
    handles: list[Any] = []
    for handle, _ in record.values():
        if callable(handle):  # of a sparse gradient: it waits for two operations
            handles += inspect.getclosurevars(handle).nonlocals.values()
        else:
            handles.append(handle)
    return [handle for handle in handles if isinstance(handle, int)]


def wait_for(handles: Collection[int]) -> list[int]:
    """Waits for reductions, and drops what they bring.

    Those that some rank does not join are left to Horovod after a while.

    Returns:
        Handles of these.
    """
    pending = list(handles)
    end = time.monotonic() + _PATIENCE
    while pending := [handle for handle in pending if not _finished(handle)]:
        if time.monotonic() > end:
            _log.warning(
                "%d reductions of a step that was given up are not finished after %d s: some rank "
                "has not begun them",
                len(pending),
                _PATIENCE,
            )
            return pending
        time.sleep(_POLL)
    return pending


def _finished(handle: int) -> bool:
    try:
        if not hvd.poll(handle):
            return False
        hvd.synchronize(handle)
    except _FAILED:
        pass
    return True


def forget_step(optimizer: Any) -> None:
    """Makes Horovod's optimizer forget the step in progress, as its ``load_state_dict`` does."""
    optimizer._handles = {}
    optimizer._synchronized = False
    optimizer._should_synchronize = True
    for parameter in optimizer._allreduce_delay:
        optimizer._allreduce_delay[parameter] = optimizer.backward_passes_per_step
    for group in optimizer._group_counts:
        optimizer._group_counts[group] = 0


def names_and_parameters(optimizer: Any) -> list[tuple[str, torch.Tensor]]:
    """The parameters whose gradients Horovod reduces, in the order of the optimizer's groups."""
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    names, reduced = optimizer._parameter_names, optimizer._requires_update
    if not reduced:  # one process: Horovod reduces nothing
        reduced = {p for p in ordered if p.requires_grad}
    return [(names[p], p) for p in ordered if p in reduced]
