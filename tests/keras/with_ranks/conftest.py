"""What every rank of a job needs."""

import os

import horovod.tensorflow as hvd
import pytest
import tensorflow as tf


@pytest.fixture(scope="session", autouse=True)
def horovod():
    tf.config.threading.set_intra_op_parallelism_threads(1)
    os.environ["HOROVOD_DYNAMIC_PROCESS_SETS"] = "1"
    hvd.init()
    yield
    hvd.shutdown()


@pytest.fixture(autouse=True)
def all_ranks_get_here():
    yield
    hvd.allreduce(tf.zeros(1), name="test.ended")
