"""Everything in with_hosts/, on two hosts that this machine pretends to be."""

import pytest

from tests.jobs import controller, needs, pytest_on_ranks

pytestmark = [
    needs("tensorflow"),
    pytest.mark.skipif(controller() == "mpi", reason="mpirun sees that it is one machine"),
]

HERE = "tests/tensorflow/with_hosts"


def test_two_hosts_of_two_ranks_with_one_thread_for_operations():
    """With one thread, an operation that waits for another rank would wait for ever."""
    threads = {"TF_NUM_INTEROP_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1"}
    output = pytest_on_ranks(4, HERE, per_host=(2, 2), env=threads)
    assert output.count(" passed") == 4, output


def test_a_host_of_one_rank_and_one_of_two():
    chosen = "nothing_is_lost or density_one or keras"
    output = pytest_on_ranks(3, HERE, "-k", chosen, per_host=(1, 2))
    assert output.count(" passed") == 3, output
