"""Horovod jobs across hosts, and jobs that leave figures."""

from __future__ import annotations

import sys

import pytest

from benchmarks.hosts.jobs import JobError, run_job
from tests.benchmarks.hosts.helpers import LIMIT
from tests.benchmarks.running import needs_hosts
from tests.jobs import ROOT, needs

ALLREDUCE = """
import socket
import torch
import horovod.torch as hvd

hvd.init()
total = hvd.allreduce(torch.full((500_000,), 1.0 + hvd.rank()), op=hvd.Sum, name="total")
# In one piece: mpirun mixes lines that are written in several.
print(f"{socket.gethostname()} of {hvd.cross_size()} got {total.unique().tolist()}\\n", end="")
"""


@needs_hosts
@pytest.mark.parametrize("controller", ["gloo", "mpi"])
def test_horovodrun_over_slow_links(hosts, controller):
    pytest.importorskip("torch")
    for host in hosts:
        host.set_rate("100mbit")
    before = [host.counters() for host in hosts]
    options = [f"--{controller}", "-np", "2", *hosts.horovodrun_options([1, 0, 1])]
    command = ["horovodrun", *options, sys.executable, "-c", ALLREDUCE]
    environment = {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    ended = hosts.run(command, time_limit=LIMIT, cwd=ROOT, env=environment)
    if "MPI support has not been built" in ended.stdout:
        pytest.skip("this Horovod has no MPI")
    assert ended.returncode == 0, ended.stdout
    for name in ("host0", "host2"):
        assert f"{name} of 2 got [3.0]" in ended.stdout
    # 2 MB have to cross each link, and no shared memory or loopback shall be a way around.
    sent = [
        host.counters().sent_bytes - old.sent_bytes for host, old in zip(hosts, before, strict=True)
    ]
    assert sent[0] > 2_000_000
    assert sent[2] > 2_000_000
    assert sent[1] < 100_000


@needs("torch", "horovod")
def test_a_job_that_fails_says_what_it_printed():
    """Here without a launcher, as the only process."""
    options = ["--methods", "dense", "--tail", "heavy"]
    with pytest.raises(JobError, match=r"(?s)^title: the job ended with 2:.*choice: 'heavy'"):
        run_job([], "benchmarks.rounds", options, title="title")
