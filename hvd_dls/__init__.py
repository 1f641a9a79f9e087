"""Dynamic Layer-wise Sparsification (DLS): gradient compression for Horovod.

Importing this package imports no framework.  The compressors live in ``hvd_dls.torch`` and are
passed to an unmodified Horovod as ``compression=DLSCompressor``.
"""

from typing import Any

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


def __getattr__(name: str) -> Any:
    if name == "DLSCompressor":
        raise ImportError(
            "there is a DLSCompressor for each framework: `from hvd_dls.torch import "
            "DLSCompressor`, or `from hvd_dls.tensorflow import DLSCompressor` (for Keras, too)"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
