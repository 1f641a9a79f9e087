"""``save_checkpoint`` and ``load_checkpoint`` for ``horovod.tensorflow``."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

from hvd_dls.adapter.loading import REFUSE, find
from hvd_dls.adapter.saving import resolved, save
from hvd_dls.adapter.together import Together
from hvd_dls.adapter.world import World

_PREFIX = "state"


def save_checkpoint(
    path: str | PathLike[str],
    checkpoint: tf.train.Checkpoint,
    compression: Any = None,
    *,
    keep: int = 2,
) -> Path:
    """Saves a checkpoint: rank 0's variables, and every rank's residuals beside it.

    To be called on all ranks, after the same step, not within a ``tf.function``.  It is complete or
    not there: whatever ends the job meanwhile, the checkpoint before can be loaded.

    Args:
        path: folder of all checkpoints; it is made.  Where ranks have disks of their own, each
            writes its part to its own.
        checkpoint: what rank 0 saves, a ``tf.train.Checkpoint`` of model, optimizer, counters.
        compression: the DLSCompressor, instance or class; None saves ``checkpoint`` alone.
        keep: how many checkpoints to keep, this one included.

    Returns:
        The checkpoint's own folder; ``tf.train.Checkpoint.read(folder / "state")`` reads rank 0's
        variables.

    Raises:
        CheckpointError: a rank could not write; on every rank alike.
        DLSError: gradients are being written, ranks are in different steps, or an argument is not
            accepted; on every rank alike.

    Example:
        >>> checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer)
        >>> save_checkpoint("checkpoints", checkpoint, compression)
    """

    def write(folder: Path) -> None:
        checkpoint.write(str(folder / _PREFIX))

    return save(path, _everyone(), compression, write, keep)


def load_checkpoint(
    path: str | PathLike[str],
    checkpoint: tf.train.Checkpoint,
    compression: Any = None,
    *,
    missing: str = REFUSE,
) -> Path | None:
    """Loads the newest complete checkpoint, on all ranks; on any number of them.

    Gives residuals and ratios to the compressor, then rank 0's values to the variables of every
    rank, also where the others do not see its files.  On another number of ranks, or with
    ``hierarchical`` changed, residuals and momentum are redistributed; see docs/checkpoints.md.

    Args:
        path: folder of checkpoints, or a single one's.
        checkpoint: as it was saved; what has no variables yet takes them when it has.
        compression: the DLSCompressor, instance or class, before its first step or later; None
            leaves residuals out.
        missing: "zeros" lets residuals be zero whose file is missing; "refuse" does not.

    Returns:
        The checkpoint's own folder; None if there is no complete checkpoint.

    Raises:
        CheckpointError: a file is missing or damaged, or variables have other shapes; on every rank
            alike.  Of what rank 0 saved, some variables may have been read then.
        StateMismatchError: it was saved with other options or layers; on every rank alike, before
            anything has changed.  Layers are known with the first step: then, if it has not been.
    """
    together = _everyone()
    found = find(path, together, compression, missing)
    if found is None:
        return None
    compressor = resolved(compression)
    if compressor is not None and found.state is not None:
        compressor.load_state_dict(found.state)

    def read() -> None:
        checkpoint.read(str(found.folder / _PREFIX)).assert_existing_objects_matched()

    together.do("load", read)
    return found.folder


class _Everyone(Together):
    def _gather(self, name: str, array: np.ndarray) -> np.ndarray:
        with tf.device("CPU:0"):
            return np.asarray(hvd.allgather(tf.constant(array), name=name))


def _everyone() -> _Everyone:
    return _Everyone(
        World(
            rank=hvd.rank(),
            size=hvd.size(),
            local_size=hvd.local_size(),
            set_id=0,
            global_rank=hvd.rank(),
            local_rank=hvd.local_rank(),
        )
    )
