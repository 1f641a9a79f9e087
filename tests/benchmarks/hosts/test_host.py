"""Commands on a host find what they find here, and ssh from host to host."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.hosts import Hosts
from tests.benchmarks.hosts.helpers import LIMIT
from tests.benchmarks.running import needs_hosts


@needs_hosts
def test_each_host_has_a_name_and_an_address_of_its_own(hosts):
    assert [host.name for host in hosts] == ["host0", "host1", "host2"]
    for host in hosts:
        assert host.run(["uname", "-n"], LIMIT).stdout == f"{host.name}\n"
        for other in hosts:
            ask = f"import socket; print(socket.gethostbyname('{other.name}'))"
            answer = host.run([sys.executable, "-c", ask], LIMIT).stdout
            assert answer == f"{other.address}\n"
    assert hosts.slots() == "host0:1,host1:1,host2:1"
    assert hosts.slots([1, 0, 4]) == "host0:1,host2:4"


@needs_hosts
def test_plain_ssh_leads_from_host_to_host_by_name_and_by_address(hosts):
    for host, other in ((hosts[0], hosts[1]), (hosts[1], hosts[2]), (hosts[2], hosts[2])):
        for target in (other.name, other.address):
            assert host.run(["ssh", target, "uname -n"], LIMIT).stdout == f"{other.name}\n"


@needs_hosts
def test_ssh_sessions_find_programs_and_modules(hosts, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/some where:/else")
    with Hosts(1) as made:
        said = made.run(["ssh", "host0", 'echo "$PYTHONPATH, $TMPDIR, $PATH"'], LIMIT).stdout
    assert said.startswith("/some where:/else, /run/tmp, ")
    assert str(Path(sys.executable).parent) in said


@needs_hosts
def test_status_output_directory_and_environment_of_a_command(hosts, tmp_path):
    command = ["sh", "-c", 'echo out; echo err >&2; pwd; echo "$WORD"; exit 7']
    ended = hosts.run(command, LIMIT, cwd=tmp_path, env={"WORD": "hello"})
    assert ended.returncode == 7
    assert ended.stdout == f"out\nerr\n{tmp_path}\nhello\n"
    assert hosts.run(["sh", "-c", "kill -TERM $$"], LIMIT).returncode == -signal.SIGTERM


@needs_hosts
def test_when_time_is_up_all_that_ran_on_any_host_is_killed(hosts):
    command = ["sh", "-c", "echo begun; ssh host1 sleep 1000 & ssh host2 sleep 1000"]
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        hosts.run(command, time_limit=5)
    assert caught.value.output == "begun\n"
    for host in hosts:
        listed = host.run(["sh", "-c", "cat /proc/[0-9]*/comm"], LIMIT).stdout
        assert "sleep" not in listed
        assert "sshd" in listed
