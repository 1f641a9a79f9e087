"""The job runner itself: what it must never let pass."""

import re
import time

import psutil
import pytest

from tests.jobs import Job, horovodrun


def test_a_failing_rank_fails_the_test_and_shows_its_output():
    program = """
import os, sys, time
rank = os.environ.get("HOROVOD_RANK") or os.environ["OMPI_COMM_WORLD_RANK"]  # Gloo, MPI
if rank == "1":
    sys.exit("I am 1")
time.sleep(100_000)  # until the job is ended: or this rank could be what ends it
"""
    with pytest.raises(pytest.fail.Exception, match=r"(?s)ended with.*I am 1"):
        horovodrun(2, ["-c", program])


def test_a_hanging_rank_fails_the_test_after_the_time_limit_and_is_killed():
    # In one piece: mpirun mixes lines that are written in several.
    say = "print(f'waiting {os.getpid()}.\\n', end='', flush=True)"
    program = f"import os, time; {say}; time.sleep(100_000)"
    with Job(2, ["-c", program]) as job:
        while len(ranks := re.findall(r"waiting (\d+)\.", job.output())) < 2:
            assert job.runs(), job.output()
            time.sleep(0.1)  # however long it takes to start
        with pytest.raises(pytest.fail.Exception, match=r"(?s)still ran after 0.5 s.*waiting"):
            job.wait(0.5)
    while any(runs(int(rank)) for rank in ranks):
        time.sleep(0.1)  # they die when their turn comes


def runs(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
