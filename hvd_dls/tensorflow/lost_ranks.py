"""Errors of TensorFlow that mean that a rank is gone, told from all others.

Horovod's operations end with ``tf.errors.UnknownError`` then; but so do Python functions of a
graph, whatever their error is.  And Horovod knows its own by names in their text, which those of
named operations lack.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import tensorflow as tf
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
_OURS = re.compile(rf"\b({'|'.join(_OUR_NAMES)}): ")


def tells_of_a_lost_rank(error: Exception) -> bool:
    """Whether an error came from Horovod's having lost a rank, and not from training itself."""
    text = error.message if isinstance(error, tf.errors.OpError) else str(error)
    if isinstance(error, errors.DLSError) or _OURS.search(
        text
    ):  # raised on all ranks: it would come again
        return False
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
