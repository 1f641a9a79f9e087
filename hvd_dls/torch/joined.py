"""Whether an exchange failed because a rank called ``hvd.join()``.

Horovod does not support allgather then, but its words seldom tell (tried over Gloo): what others
see is mostly a connection that was closed.  What tells is that a rank that has joined contributes
zeros to the reductions of others.
"""

from __future__ import annotations

from typing import Any

import horovod.torch as hvd
from horovod.common.exceptions import HorovodInternalError

from hvd_dls.torch.contexts import InFlight

_WHAT_TO_DO = (
    "DLSCompressor gathers its payloads, and Horovod does not support allgather while ranks have "
    "joined. Train in `with hvd_dls.torch.join(optimizer):` instead, without hvd.join(). Or give "
    "every rank the same number of batches."
)
_SHUT_DOWN = "Horovod has been shut down"  # what is seen of a process that ended or died


def explained(error: HorovodInternalError, record: Any, expected: float) -> HorovodInternalError:
    """The same error, and what to do if a rank has joined, or may have.

    Args:
        error: of an allgather.
        record: Horovod's handles in that step, by parameter.
        expected: what the reduction makes of a placeholder 1.0 while no rank has joined.
    """
    text = str(error)
    if "join" in text.lower() or _some_rank_gave_nothing(record or {}, expected):
        return HorovodInternalError(f"{text}\nA rank has called hvd.join(): {_WHAT_TO_DO}")
    if _SHUT_DOWN in text:
        return error
    return HorovodInternalError(
        f"{text}\nIf no process failed, a rank has called hvd.join(): {_WHAT_TO_DO}"
    )


def _some_rank_gave_nothing(record: dict[Any, Any], expected: float) -> bool:
    for handle, context in list(record.values()):
        if not isinstance(handle, int) or not isinstance(context, InFlight):
            continue
        try:
            if hvd.poll(handle):
                hvd.synchronize(handle)
                if context.placeholder.item() < expected * 0.999:
                    return True
        except (HorovodInternalError, ValueError, RuntimeError):  # failed, too
            continue
    return False
