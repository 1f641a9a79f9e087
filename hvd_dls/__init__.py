"""Dynamic Layer-wise Sparsification (DLS): gradient compression for Horovod.

Importing this package imports no framework.  The compressors live in ``hvd_dls.torch`` and are
passed to an unmodified Horovod as ``compression=DLSCompressor``.
"""

from hvd_dls.config import DLSConfig
from hvd_dls.errors import (
    CheckpointError,
    DLSError,
    NonFiniteGradientError,
    PayloadError,
    RanksDisagreeError,
    StateMismatchError,
)

__version__ = "0.2.0"

__all__ = [
    "CheckpointError",
    "DLSConfig",
    "DLSError",
    "NonFiniteGradientError",
    "PayloadError",
    "RanksDisagreeError",
    "StateMismatchError",
    "__version__",
]
