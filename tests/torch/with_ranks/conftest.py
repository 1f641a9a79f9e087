"""What every rank of a job needs."""

import horovod.torch as hvd
import pytest
import torch

from hvd_dls.torch import DLSCompressor


@pytest.fixture(scope="session", autouse=True)
def horovod(request):
    hvd.init()
    yield
    if not request.session.testsfailed:  # the first rank to end would end Horovod for all
        hvd.allreduce(torch.zeros(1), name="tests.ended")
    hvd.shutdown()


@pytest.fixture(autouse=True)
def fresh():
    """Same seed on every rank and test; the bare class knows no model."""
    torch.manual_seed(1)
    DLSCompressor._default_instance = None


@pytest.fixture(autouse=True)
def all_ranks_get_here(request):
    """No rank is in the next test while others are in this one."""
    yield
    if not request.session.testsfailed:
        hvd.allreduce(torch.zeros(1), name="test.ended")
