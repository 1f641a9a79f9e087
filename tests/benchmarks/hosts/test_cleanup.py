"""Nothing is left of hosts, however they end."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from benchmarks.hosts import Hosts
from tests.benchmarks.hosts.helpers import LIMIT, marked
from tests.benchmarks.running import needs_hosts
from tests.jobs import ROOT


@needs_hosts
def test_nothing_is_left_after_the_block_or_an_exception_or_a_failing_command(mark):
    with Hosts(2, "100mbit") as made:
        made.run(
            [
                "ssh",
                "host1",
                f'sleep {mark} >&- 2>&- & touch /run/here /dev/shm/here "$TMPDIR/here"; exit 3',
            ],
            LIMIT,
        )
        sleeping = made[1].popen(["sleep", mark])
        assert len(marked(mark)) > 5
    assert sleeping.wait(LIMIT) == -signal.SIGKILL
    with pytest.raises(ZeroDivisionError), Hosts(2) as made:
        raise ZeroDivisionError
    with pytest.raises(FileNotFoundError), Hosts(1) as made:
        made[0].popen(["true"], cwd="/", executable="/no/such/file")


@needs_hosts
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_after_a_signal(mark, ending):
    command = ["sh", "-c", f"ssh host1 sleep {mark} & sleep {mark} & echo begun; wait"]
    # What a shell runs in the background ignores SIGINT, and so would its children.
    harness = ["env", "--default-signal=INT", sys.executable, "-m", "benchmarks.hosts"]
    harness += ["--rate", "100mbit", "--", *command]
    with subprocess.Popen(harness, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "begun\n"
            assert len(marked(mark)) > 5
            process.send_signal(ending)
            assert process.wait(LIMIT) == (130 if ending == signal.SIGINT else -ending)
        finally:
            process.kill()


@needs_hosts
@pytest.mark.usefixtures("mark")
def test_nothing_is_left_when_the_harness_is_killed_while_it_makes_hosts():
    for delay in (0.05, 0.15, 0.25, 0.35):
        harness = [sys.executable, "-m", "benchmarks.hosts", "--hosts", "20", "--", "true"]
        with subprocess.Popen(harness, cwd=ROOT) as process:
            time.sleep(delay)
            process.kill()
