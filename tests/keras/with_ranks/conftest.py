"""What every rank of a job needs."""

import gc
import os

import horovod.tensorflow as hvd
import pytest
import tensorflow as tf


@pytest.fixture(scope="session", autouse=True)
def horovod():
    if hvd.is_initialized():  # in a job that runs other tests, too
        yield
        return
    tf.config.threading.set_intra_op_parallelism_threads(1)
    os.environ["HOROVOD_DYNAMIC_PROCESS_SETS"] = "1"
    hvd.init()
    gc.freeze()  # collections need not look through all that was imported: tracing makes many
    yield
    hvd.shutdown()


@pytest.fixture(autouse=True)
def all_ranks_get_here():
    yield
    hvd.allreduce(tf.zeros(1), name="test.ended")


@pytest.fixture
def compression(request):
    """By name; a test has one of its own."""
    from tests.keras.with_ranks.keras3 import COMPRESSIONS

    return COMPRESSIONS[request.param]()
