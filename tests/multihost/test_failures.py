"""A host loses its power in mid-training: every rank elsewhere has to end, and say why."""

from __future__ import annotations

import re
import subprocess
import time

import pytest

from benchmarks.hosts import Host, Hosts
from tests.jobs import ROOT, needs
from tests.multihost import launch

pytestmark = [launch.needs_hosts, needs("torch")]

# A dead host is silent: nobody hears that its connections are gone. These are the settings with
# which the others notice soon; docs/cluster.md explains them.
NOTICE = {
    "gloo": ["--gloo-timeout-seconds", "30"],
    "mpi": [
        "--mpi-args=--mca oob_tcp_keepalive_time 5 --mca oob_tcp_keepalive_intvl 2"
        " --mca oob_tcp_keepalive_probes 3"
    ],
}
START, END = 1200, 600  # seconds that this may take at most, on a busy machine too


def running(host: Host) -> str:
    """Command lines of the ranks on a host."""
    list_all = "for file in /proc/[0-9]*/cmdline; do tr '\\0' ' ' < $file && echo; done 2>/dev/null"
    lines = host.run(["sh", "-c", list_all], 600).stdout.splitlines()
    return "\n".join(line for line in lines if "torch_forever" in line)


def wait(condition, seconds: float, otherwise) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(otherwise(), pytrace=False)
        time.sleep(0.1)


# host0 is where horovodrun and mpirun are.
@pytest.mark.parametrize(("controller", "victim"), [("gloo", 1), ("mpi", 1), ("mpi", 0)])
def test_when_a_host_dies_all_ranks_elsewhere_end(controller, victim, tmp_path):
    log = tmp_path / "log"
    with Hosts(3) as hosts:
        command = launch.horovodrun(
            hosts, controller, [1, 1, 1], "torch_forever.py", tmp_path, *NOTICE[controller]
        )
        with log.open("w") as file:
            job = hosts[0].popen(
                command,
                cwd=ROOT,
                env=launch.ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        wait(
            lambda: len(list(tmp_path.glob("trains*.json"))) == 3 or job.poll() is not None,
            START,
            lambda: f"no training after {START} s:\n{log.read_text()}",
        )
        launch.skip_without_mpi(log.read_text())
        assert job.poll() is None, log.read_text()
        killed = time.time()
        hosts[victim].kill()
        survivors = [host for host in hosts if host is not hosts[victim]]
        wait(
            lambda: not any(running(host) for host in survivors),
            END,
            lambda: f"ranks left after {END} s: {[*map(running, survivors)]}\n{log.read_text()}",
        )
        print(f"all ranks gone after {time.time() - killed:.1f} s")
        assert job.wait(END) != 0
        output = log.read_text()
    print(f"horovodrun ended with {job.returncode}\n{output}")
    ended = [r for r in launch.reports(tmp_path) if "message" in r]
    if controller == "gloo":
        assert [r["host"] for r in ended] == [host.name for host in survivors]
        for r in ended:
            print(f"{r['host']}: {r['time'] - killed:.1f} s, {r['type']}: {r['message']}")
            assert r["type"] == "HorovodInternalError"
            assert re.search("been shut down|[Tt]imed? ?out|closed by peer", r["message"])
    else:  # mpirun ends the ranks, in the midst of waiting for the lost one
        assert not ended
        if victim != 0:
            assert "lost communication" in output
            assert f"on node host{victim}" in output
