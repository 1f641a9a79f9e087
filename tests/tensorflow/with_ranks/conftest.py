"""What every rank of a job needs."""

import gc
import os

import horovod.tensorflow as hvd
import pytest
import tensorflow as tf

from hvd_dls.tensorflow import DLSCompressor
from tests.tensorflow.with_ranks.training import SPARSE, forget_traced


@pytest.fixture(scope="session", autouse=True)
def horovod(request):
    tf.config.threading.set_intra_op_parallelism_threads(1)
    (cpu,) = tf.config.list_physical_devices("CPU")  # as two: for variables on another device
    two = [tf.config.LogicalDeviceConfiguration(), tf.config.LogicalDeviceConfiguration()]
    tf.config.set_logical_device_configuration(cpu, two)
    os.environ["HOROVOD_DYNAMIC_PROCESS_SETS"] = "1"
    hvd.init()
    gc.freeze()  # collections need not look through all that was imported: tracing makes many
    yield
    if not request.session.testsfailed:  # the first rank to end would end Horovod for all
        hvd.allreduce(tf.zeros(1), name="tests.ended")
    hvd.shutdown()


@pytest.fixture(autouse=True)
def fresh():
    """Same seed on every rank and test."""
    tf.random.set_seed(1)
    yield
    forget_traced()


@pytest.fixture(autouse=True)
def all_ranks_get_here(request):
    """No rank is in the next test while others are in this one."""
    yield
    if not request.session.testsfailed:
        hvd.allreduce(tf.zeros(1), name="test.ended")


@pytest.fixture
def bare_class():
    """A class as users pass it, which knows no model yet.

    Horovod keeps what it traced with a class for the life of the process.
    """

    class Bare(DLSCompressor):
        _default_instance = DLSCompressor(density=0.05, **SPARSE)

    return Bare


@pytest.fixture(params=["eager", "tf.function"])
def mode(request):
    """How a training step runs."""
    return request.param
