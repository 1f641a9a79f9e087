"""The command line that runs a command on hosts."""

from __future__ import annotations

import pytest

from tests.benchmarks.hosts.helpers import on_the_command_line
from tests.benchmarks.running import needs_hosts


@needs_hosts
def test_command_line_passes_hosts_and_the_exit_status_on():
    ended = on_the_command_line(
        "--hosts=3", "--slots=1,0,2", "--", "sh", "-c", "echo {hosts}; exit 5"
    )
    assert (ended.returncode, ended.stdout) == (5, "host0:1,host2:2\n")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--hosts=0", "--", "true"], "hosts: cannot make 0 hosts"),
        (["--rate=fast", "--", "true"], "hosts: rate 'fast' is not one like '100mbit'"),
        (["--slots=a", "--", "true"], "argument --slots: invalid"),
        ([], "the following arguments are required: command"),
    ],
)
def test_wrong_command_lines(arguments, complaint):
    ended = on_the_command_line(*arguments)
    assert ended.returncode == 2
    assert complaint in ended.stdout
    assert "Traceback" not in ended.stdout
