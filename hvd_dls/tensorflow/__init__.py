"""DLS for horovod.tensorflow: ``compression=DLSCompressor``."""

from hvd_dls.tensorflow.compressor import DLSCompressor

__all__ = ["DLSCompressor"]
