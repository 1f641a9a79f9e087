"""What every rank of a job needs."""

import functools
import time

import horovod.torch as hvd
import horovod.torch.functions
import horovod.torch.mpi_ops
import horovod.torch.optimizer
import pytest
import torch

from hvd_dls.torch import DLSCompressor


def _asleep(spinning):
    """Horovod's wait, but asleep until there is nothing to wait for.

    Horovod looks without a pause, which takes the cores away from ranks that have work to do where
    there are more ranks than cores.
    """

    @functools.wraps(spinning)
    def synchronize(handle):
        while not hvd.poll(handle):
            time.sleep(5e-4)
        return spinning(handle)

    return synchronize


SPINNING = hvd.mpi_ops.synchronize
for module in (hvd, hvd.functions, hvd.mpi_ops, hvd.optimizer):
    module.synchronize = _asleep(SPINNING)


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
