"""What the job's only rank needs."""

import horovod.torch as hvd
import pytest
import torch

from hvd_dls.torch import DLSCompressor


@pytest.fixture(scope="session", autouse=True)
def horovod():
    hvd.init()
    yield
    hvd.shutdown()


@pytest.fixture(autouse=True)
def fresh():
    """Same seed in every test; the bare class knows no model."""
    torch.manual_seed(1)
    DLSCompressor._default_instance = None
