"""DLS for horovod.torch: ``compression=DLSCompressor``."""

from hvd_dls.torch import elastic, hooks
from hvd_dls.torch.compressor import DLSCompressor

__all__ = ["DLSCompressor"]

hooks.install()
elastic.install()
