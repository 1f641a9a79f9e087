"""Ranks with different numbers of batches: who has no more takes part with zeros.

Horovod's own ``hvd.join()`` does not work with allgather, which is how payloads travel.  So before
each step all ranks tell each other whether they have a batch.  Who has none gets an earlier one
again, and runs the same step on it: the same operations in the same order as all others, whatever
the step is.  Its gradients become zeros on the way (``zeroing.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

import horovod.tensorflow as hvd
import tensorflow as tf

from hvd_dls.errors import DLSError
from hvd_dls.tensorflow.templates import gather, hand_on
from hvd_dls.tensorflow.zeroing import Loop

_NAME = "hvd_dls.join"  # of the operations; Horovod's stall report shows it where a rank is missing
_NO_EXCHANGE = (
    "a turn of the loop over join(...) exchanged no gradients with DLSCompressor, so other ranks "
    "would have got those of batches that this rank does not have. Accepted are loops that make "
    "one step a batch, with hvd.DistributedGradientTape(..., compression=DLSCompressor), or with "
    "hvd_dls.keras.DistributedOptimizer without accumulation"
)


class Joining:
    """The ranks' loops over their batches: see ``join``.

    Attributes:
        has_data: whether the current batch is this rank's; otherwise it is there for the step only.
        extra_steps: steps that this rank took part in without data.
        last_rank: a rank (of all ranks of the job) that had data in the last step; -1 before one.
    """

    def __init__(self, batches: Iterable[Any], template: Any, process_set: hvd.ProcessSet) -> None:
        self.has_data = True
        self.extra_steps = 0
        self.last_rank = -1
        self._batches, self._template, self._process_set = batches, template, process_set
        self._alone = not process_set.included() or process_set.size() == 1
        self._loop: Loop | None = None

    def __enter__(self) -> Joining:
        if not tf.executing_eagerly():
            raise DLSError(
                "join(...) in a tf.function: the loop over batches must run in Python, and call a "
                "tf.function for each step"
            )
        loop = Loop()
        if not self._alone:
            loop.begin()
        self._loop = loop
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        loop, self._loop = self._loop, None
        if loop is not None and not self._alone:
            loop.end()

    def __iter__(self) -> Iterator[Any]:
        loop = self._loop
        if loop is None:
            raise DLSError("join(...) goes in a with: with join(dataset) as batches: for ...")
        if self._alone:
            yield from self._batches
            return
        source, batch = iter(self._batches), self._template
        set_id = self._process_set.process_set_id
        while True:
            following = next(source, None)
            if following is not None:
                batch = following
            asked = [following is not None, batch is not None]
            having, there = gather(asked, f"{_NAME}.{set_id}", self._process_set).T.tolist()
            if not any(having):
                break
            batch = hand_on(batch, there, f"{_NAME}.{set_id}.batch", self._process_set)
            self.has_data = following is not None
            self.extra_steps += not self.has_data
            self.last_rank = self._process_set.ranks[having.index(1)]
            loop.has_data.assign(self.has_data)
            before = loop.exchanges
            yield batch
            if self._loop is not loop:
                raise DLSError("the loop over join(...) goes on outside of its with block")
            if loop.exchanges == before:
                raise DLSError(_NO_EXCHANGE)
        self.has_data = True
        loop.has_data.assign(True)


def join(
    batches: Iterable[Any],
    template: Any = None,
    process_set: hvd.ProcessSet = hvd.global_process_set,
) -> Joining:
    """For ``with``: a loop over batches, of which ranks may have different numbers.

    The loop has as many turns on all ranks as the rank with most batches has.  A rank that has no
    more gets its last batch again, and its gradients become zeros before they are compressed or
    reduced: an average is over all ranks as ever, and weights change as on the other ranks.  What
    its residuals hold is sent in these steps.  With one process it is a loop over the batches.

    The training step must be traced within the block, and exchange gradients once for each batch.
    What it does besides, with the loss or the moving averages of batch normalisation, it does with
    the repeated batch: look at ``has_data``.

    Args:
        batches: a tf.data.Dataset, or whatever can be iterated; its items are nests of tensors and
            arrays, and none is None.
        template: a batch for a rank that has no batch at all; None: another rank's first one.
        process_set: the ranks that exchange gradients; all of them come in.

    Returns:
        A context manager, which gives itself, to be iterated: each time is an epoch.

    Raises:
        DLSError: inside: within a tf.function or another ``join``, or the step was traced outside,
            exchanges nothing or has gradients that are IndexedSlices; on all ranks.

    Example:
        >>> with join(dataset) as batches:
        ...     for images, labels in batches:
        ...         train_step(images, labels)
    """
    return Joining(batches, template, process_set)
