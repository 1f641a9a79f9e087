"""The job runner itself: what it must never let pass."""

import time

import pytest

from tests.jobs import horovodrun


def test_a_failing_rank_fails_the_test_and_shows_its_output():
    rank = "os.environ.get('HOROVOD_RANK') or os.environ['OMPI_COMM_WORLD_RANK']"  # Gloo, MPI
    program = f"import os, sys; print('I am', {rank}); sys.exit(3)"
    with pytest.raises(pytest.fail.Exception, match=r"(?s)ended with.*I am 1"):
        horovodrun(2, ["-c", program], time_limit=60)


def test_a_hanging_rank_fails_the_test_within_the_time_limit_and_is_killed():
    program = "import time; print('waiting', flush=True); time.sleep(600)"
    begin = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match=r"(?s)still ran after 12 s.*waiting"):
        horovodrun(2, ["-c", program], time_limit=12)
    assert time.monotonic() - begin < 60
