"""DLS for horovod.torch: ``compression=DLSCompressor``."""

from hvd_dls.torch import hooks
from hvd_dls.torch.compressor import DLSCompressor
from hvd_dls.torch.uneven import join

__all__ = ["DLSCompressor", "join"]

hooks.install()
