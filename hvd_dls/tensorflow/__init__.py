"""DLS for horovod.tensorflow: ``compression=DLSCompressor``."""

from hvd_dls.tensorflow.advising import advise
from hvd_dls.tensorflow.checkpoints import load_checkpoint, save_checkpoint
from hvd_dls.tensorflow.compressor import DLSCompressor
from hvd_dls.tensorflow.uneven import join

__all__ = ["DLSCompressor", "advise", "join", "load_checkpoint", "save_checkpoint"]
