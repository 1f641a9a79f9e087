"""``tf.summary``'s writers, as logs take them.

What is written is what ``tf.summary.scalar`` writes, which only works where TensorBoard is
installed, too.
"""

from __future__ import annotations

import tensorflow as tf

_SCALAR = tf.compat.v1.SummaryMetadata()
_SCALAR.plugin_data.plugin_name = "scalars"
_SCALAR.data_class = 1  # DATA_CLASS_SCALAR of TensorFlow's summary.proto


class SummaryScalars:
    """A writer of ``tf.summary`` with the method that torch's and tensorboardX's have.

    Args:
        writer: as ``tf.summary.create_file_writer`` makes it.
    """

    def __init__(self, writer: tf.summary.SummaryWriter) -> None:
        self._writer = writer

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Writes one number; the default writer of the thread that calls stays as it is."""
        with self._writer.as_default(step):
            tf.summary.write(tag, tf.constant(value, tf.float32), metadata=_SCALAR)

    def flush(self) -> None:
        """Has what was written reach the file."""
        self._writer.flush()
