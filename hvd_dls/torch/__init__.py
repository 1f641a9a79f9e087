"""DLS for horovod.torch: ``compression=DLSCompressor``."""

from hvd_dls.torch import elastic, hooks
from hvd_dls.torch.advising import advise
from hvd_dls.torch.checkpoints import load_checkpoint, save_checkpoint
from hvd_dls.torch.compressor import DLSCompressor
from hvd_dls.torch.local_steps import LocalSteps
from hvd_dls.torch.uneven import join

__all__ = ["DLSCompressor", "LocalSteps", "advise", "join", "load_checkpoint", "save_checkpoint"]

hooks.install()
elastic.install()
