"""Hosts as a whole: power failures, hosts that do not meet, and where none can be made."""

from __future__ import annotations

import signal

import pytest

from benchmarks.hosts import Hosts, HostsError
from tests.benchmarks.hosts.helpers import LIMIT, transfer
from tests.benchmarks.running import needs_hosts


@needs_hosts
def test_power_failure_of_one_host(hosts):
    with Hosts(3) as made:
        running = made[1].popen(["sleep", "1000"])
        made[1].kill()
        made[1].kill()
        assert running.wait(LIMIT) == -signal.SIGKILL
        for what in (made[1].counters, lambda: made[1].popen(["true"]), made[1].kill_processes):
            with pytest.raises(HostsError, match="host1 is off"):
                what()
        attempt = made.run(["ssh", "-o", "ConnectTimeout=1", "host1", "true"], LIMIT)
        assert attempt.returncode == 255
        assert made.run(["ssh", "host2", "true"], LIMIT).returncode == 0


@needs_hosts
def test_two_sets_of_hosts_do_not_meet():
    with Hosts(2) as ones, Hosts(2) as others:
        before = others[1].counters()
        transfer(ones[0], ones[1], 1_000_000)
        assert others[1].counters().received_bytes - before.received_bytes < 10_000
        assert others.run(["ssh", "host1", "true"], LIMIT).returncode == 0
    with pytest.raises(HostsError, match="have been used"), ones:
        pass


@pytest.mark.parametrize("count", [0, -1, 201])
def test_numbers_of_hosts_that_cannot_be(count):
    with pytest.raises(ValueError, match=f"cannot make {count} hosts"):
        Hosts(count)


@needs_hosts
@pytest.mark.parametrize("slots", [[1], [1, 1, 1, 1], [-1, 1, 1], [0, 0, 0]])
def test_slots_that_do_not_fit(hosts, slots):
    with pytest.raises(ValueError, match="do not fit 3 hosts"):
        hosts.slots(slots)


def test_without_the_tools_it_says_which_packages_are_missing(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda tool, path: None if tool in ("tc", "sshd") else tool)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    with pytest.raises(HostsError, match=r"missing packages.*: iproute2 openssh-server$"), Hosts(1):
        pass


def test_without_root_it_says_so(monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(HostsError, match="only root"), Hosts(1):
        pass


@needs_hosts
@pytest.mark.usefixtures("mark")
def test_what_the_kernel_forbids_is_told_in_its_words(monkeypatch):
    monkeypatch.setattr(
        "benchmarks.hosts.namespaces.UNSHARE", ("sh", "-c", "echo unshare: forbidden >&2")
    )
    with pytest.raises(HostsError, match="cannot make namespaces: unshare: forbidden"), Hosts(1):
        pass
