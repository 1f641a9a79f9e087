"""The hosts on one machine that benchmarks run on: real namespaces, links, ssh and jobs."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.hosts import Hosts, HostsError, bits_per_second, why_not

ROOT = Path(__file__).resolve().parents[3]
LIMIT = 600  # seconds, for what takes far less

needs_hosts = pytest.mark.skipif(
    why_not() is not None, reason=f"no hosts can be made here: {why_not()}"
)

RECEIVE = """
import socket
server = socket.create_server(("", 5000))
print("listens", flush=True)
connection, _ = server.accept()
while connection.recv(1 << 20):
    pass
connection.sendall(b"all")
"""
SEND = """
import socket, sys, time
connection = socket.create_connection(("{to}", 5000))
start = time.monotonic()
connection.sendall(bytes({size}))
connection.shutdown(socket.SHUT_WR)
assert connection.recv(3)
print(time.monotonic() - start)
"""
ALLREDUCE = """
import socket
import torch
import horovod.torch as hvd

hvd.init()
total = hvd.allreduce(torch.full((500_000,), 1.0 + hvd.rank()), op=hvd.Sum, name="total")
# In one piece: mpirun mixes lines that are written in several.
print(f"{socket.gethostname()} of {hvd.cross_size()} got {total.unique().tolist()}\\n", end="")
"""


@pytest.fixture(scope="module")
def hosts():
    with Hosts(3) as made:
        yield made


@pytest.fixture(autouse=True)
def _full_speed(request):
    yield
    if "hosts" in request.fixturenames:
        for host in request.getfixturevalue("hosts"):
            host.set_rate(None)


def transfer(sender, receiver, size):
    """Seconds that `size` bytes take by TCP."""
    command = [sys.executable, "-c", RECEIVE]
    with receiver.popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "listens\n"
        sent = sender.run([sys.executable, "-c", SEND.format(to=receiver.name, size=size)], LIMIT)
    assert sent.returncode == 0, sent.stdout
    return float(sent.stdout)


def outside():
    """What making hosts must not change, as far as nobody else on this machine changes it."""
    files = [
        Path("/etc/hosts"),
        *Path("/etc/ssh").iterdir(),
        *Path("~/.ssh").expanduser().glob("*"),
    ]
    stamps = {str(file): file.stat().st_mtime_ns for file in files if file.exists()}
    there = [
        Path("~/.ssh").expanduser().exists(),
        Path("/run/sshd").exists(),
        Path("/run/here").exists(),
    ]
    there += [Path("/dev/shm/here").exists(), Path("/tmp/here").exists()]
    mounted = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    ours = {"/etc/ssh", "/etc/hosts", "/run", "/dev/shm", "/sys"}
    mounts = sorted(path for path in mounted if path in ours)
    return set(psutil.net_if_addrs()), stamps, there, mounts, os.uname().nodename


def marked(mark):
    """Processes with this number in their environment or arguments, in whatever namespace."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            words = [*process.environ().values(), *process.cmdline()]
            if process.pid != os.getpid() and any(mark in word for word in words):
                found.append(process)
    return found


@pytest.fixture
def mark(monkeypatch):
    """A number for `sleep`; afterwards, nothing may be left of what was started meanwhile."""
    mark = str(random.randrange(10**8, 10**9))
    monkeypatch.setenv("STARTED_BY_TEST", mark)
    before = outside()
    yield mark
    deadline = time.monotonic() + 600  # for clean-up by the kernel, when nobody could wait for it
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left
    assert outside() == before


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


@needs_hosts
def test_the_rate_holds_in_each_direction_and_can_be_changed(hosts):
    """Generous bounds, which only tell whether there is a rate at all.

    A busy machine is slower than a fast link, but not than one of 2 Mbit/s.
    """
    hosts[0].set_rate("1gbit")
    assert transfer(hosts[0], hosts[1], 50_000_000) > 0.3  # 0.4 s
    hosts[0].set_rate("2mbit")
    assert 3 < transfer(hosts[0], hosts[1], 1_000_000) < 60  # 4 s
    assert 3 < transfer(hosts[1], hosts[0], 1_000_000) < 60
    assert transfer(hosts[1], hosts[2], 1_000_000) < 3
    hosts[0].set_rate(None)
    assert transfer(hosts[0], hosts[1], 1_000_000) < 3


@needs_hosts
def test_counters_count_what_is_sent_and_received(hosts):
    before = [host.counters() for host in hosts]
    transfer(hosts[0], hosts[1], 10_000_000)
    after = [host.counters() for host in hosts]
    sent, received, idle = (
        [new - old for new, old in zip(*pair, strict=True)]
        for pair in zip(after, before, strict=True)
    )
    assert 10_000_000 < sent[2] < 11_000_000
    assert 10_000_000 < received[0] < 11_000_000
    assert sent[3] > 100
    assert received[1] > 100
    assert idle[0] < 10_000
    assert idle[2] < 10_000


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


def on_the_command_line(*arguments, time_limit=LIMIT):
    command = [sys.executable, "-m", "benchmarks.hosts", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # A harness that is killed takes its hosts with it.
    return subprocess.run(command, cwd=ROOT, env=environment, timeout=time_limit, **pipe)


@needs_hosts
def test_command_line_passes_hosts_and_the_exit_status_on():
    ended = on_the_command_line(
        "--hosts=3", "--slots=1,0,2", "--", "sh", "-c", "echo {hosts}; exit 5"
    )
    assert (ended.returncode, ended.stdout) == (5, "host0:1,host2:2\n")


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


@pytest.mark.parametrize("count", [0, -1, 201])
def test_numbers_of_hosts_that_cannot_be(count):
    with pytest.raises(ValueError, match=f"cannot make {count} hosts"):
        Hosts(count)


@pytest.mark.parametrize(
    "rate", ["fast", "", "100", "100 mbit", "-1mbit", "1kbit", "1000gbit", "mbit"]
)
def test_rates_that_cannot_be(rate):
    with pytest.raises(ValueError, match="is not one like '100mbit'"):
        Hosts(2, rate)


def test_rates_in_bits_per_second():
    rates = [bits_per_second(rate) for rate in ("100mbit", "2.5gbit", "500kbit", None)]
    assert rates == [10**8, 2_500_000_000, 500_000, None]


@needs_hosts
@pytest.mark.parametrize("slots", [[1], [1, 1, 1, 1], [-1, 1, 1], [0, 0, 0]])
def test_slots_that_do_not_fit(hosts, slots):
    with pytest.raises(ValueError, match="do not fit 3 hosts"):
        hosts.slots(slots)


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
        "benchmarks.hosts.cluster.UNSHARE", ("sh", "-c", "echo unshare: forbidden >&2")
    )
    with pytest.raises(HostsError, match="cannot make namespaces: unshare: forbidden"), Hosts(1):
        pass
