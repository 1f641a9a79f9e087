"""Errors of TensorFlow that mean that a rank is gone, told from all others.

Horovod's operations end with ``tf.errors.UnknownError`` then; but so do Python functions of a
graph, whatever their error is.  And Horovod knows its own by names in their text, which those of
named operations lack.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import tensorflow as tf
from horovod.common.elastic import run_fn
from horovod.common.exceptions import HorovodInternalError

from hvd_dls import errors
from hvd_dls.adapter.world import has_lost_its_ranks

_SIGNS = (
    "Horovod has been shut down",  # of all operations that are left
    "gloo/transport/",  # where errors of Gloo's come from, in the operation that met them
    *("HorovodAllreduce", "HorovodAllgather", "HorovodBroadcast"),  # what Horovod's run looks for
)
_OUR_NAMES = [
    name
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, Exception) and kind.__module__ == errors.__name__
]
_RUN = "hvd_dls.tensorflow.elastic"  # module of the function that knows them
_OURS = re.compile(rf"\b({'|'.join(_OUR_NAMES)}): ")


def tells_of_a_lost_rank(error: Exception) -> bool:
    """Whether an error came from Horovod's having lost a rank, and not from training itself."""
    text = error.message if isinstance(error, tf.errors.OpError) else str(error)
    if isinstance(error, errors.DLSError) or _OURS.search(text):
        return False  # raised on all ranks: it would come again
    if isinstance(error, tf.errors.UnknownError) and any(sign in text for sign in _SIGNS):
        return True
    return has_lost_its_ranks()


@contextmanager
def lost_ranks_told() -> Iterator[None]:
    """Context whose errors of lost ranks are raised as elastic Horovod's loop knows them.

    Raises:
        HorovodInternalError: a rank is gone.
    """
    try:
        yield
    # Horovod's functions raise ValueError once it has ended.
    except (tf.errors.OpError, ValueError) as error:
        if tells_of_a_lost_rank(error):
            raise HorovodInternalError(str(error)) from error
        raise


def refuse_horovods_run() -> None:
    """Refuses to go on within Horovod's own ``elastic.run``.

    Raises:
        DLSError: it is at work, on this thread.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != run_fn.__module__:
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None or (frame.f_back and frame.f_back.f_globals.get("__name__") == _RUN):
        return
    raise errors.DLSError(
        "Horovod's own elastic.run, with a DLSCompressor or a state of hvd_dls: it would end "
        "training without a word when a rank is lost within an operation of the compressor. "
        f"Decorate with {_RUN}.run (or hvd_dls.keras.elastic.run) instead"
    )
