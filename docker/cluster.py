#!/usr/bin/env python3
"""Try docker-compose.cluster.yml: start its nodes, run a job across two of them, stop them.

    python docker/cluster.py                       # the example below
    python docker/cluster.py -- horovodrun -np 4 -H node1:2,node2:2 python my_script.py

With docker or podman and their compose, that is three commands (docs/docker.md). Where neither
works, root can have the same image's nodes with buildah: each in a network namespace, with its own
address, name and sshd, joined by a bridge. That is what this script does.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import engines
import machine
import matrix
import report

COMPOSE = matrix.FOLDER / "docker-compose.cluster.yml"
EXAMPLE = "horovodrun -np 2 -H node1:1,node2:1 python examples/torch_digits.py --compression dls"
EXAMPLE += " --epochs 2 --no-cuda"
HOSTS = "127.0.0.1 localhost\n"
IN_HOME = ("sh", "-c", 'cd && exec "$@"', "sh")
ENV = "{{range .OCIv1.Config.Env}}{{println .}}{{end}}"
# `buildah run` is made for one command at a time in a container: a second one, when it ends, takes
# away what the first has mounted. So the commands enter the container's files by themselves.
UNSHARE = ("unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child")
ENTER = """
name=$1 root=$2 keys=$3 hosts=$4; shift 4
hostname "$name"
mount --bind "$keys" "$root/cluster"
mount --bind "$hosts" "$root/etc/hosts"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
cd /
exec chroot --userspec=1000:1000 --groups= "$root" "$@"
"""
NETWORK = "10.123.45"  # exists inside the namespaces only


def ip(*arguments: str) -> None:
    engines.tried("ip", *arguments)


@contextlib.contextmanager
def network(nodes: Sequence[str]) -> Iterator[dict[str, str]]:
    """A network namespace for each node and one for the bridge: node → its namespace."""
    prefix = f"hvd{os.getpid()}"
    spaces = {node: f"{prefix}-{node}" for node in nodes}
    switch = f"{prefix}-switch"
    made = []
    try:
        for space in (switch, *spaces.values()):
            ip("netns", "add", space)
            made.append(space)
        ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge", "up")
        for number, space in enumerate(spaces.values(), 1):
            port = f"port{number}"
            peer = ("peer", "name", "eth0", "netns", space)
            ip("-n", switch, "link", "add", port, "type", "veth", *peer)
            ip("-n", switch, "link", "set", port, "master", "bridge", "up")
            ip("-n", space, "address", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
            for interface in ("lo", "eth0"):
                ip("-n", space, "link", "set", interface, "up")
        yield spaces
    finally:
        for space in made:
            with contextlib.suppress(engines.EngineError):
                ip("netns", "delete", space)


class Nodes:
    """Containers of the node image, made by buildah, in namespaces of their own."""

    def __init__(self, engine: engines.Buildah, image: str, folder: Path) -> None:
        self.engine, self.image, self.folder = engine, image, folder
        self.prefixes: dict[str, list[str]] = {}

    @contextlib.contextmanager
    def up(self, names: Sequence[str], log: Path) -> Iterator[None]:
        """Start sshd on every node and wait until each is healthy."""
        keys, hosts = self.folder / "keys", self.folder / "hosts"
        keys.mkdir(mode=0o700)
        os.chown(keys, 1000, 1000)
        lines = [f"{NETWORK}.{number} {name}\n" for number, name in enumerate(names, 1)]
        hosts.write_text(HOSTS + "".join(lines))
        environ = self.engine.call("inspect", "--type=image", f"--format={ENV}", self.image).split()
        environ = ["env", "-i", "HOME=/home/hvd", *environ]
        running = []
        with contextlib.ExitStack() as stack:
            spaces = stack.enter_context(network(names))
            file = stack.enter_context(log.open("a"))
            for name in names:
                container = stack.enter_context(self.engine.container(self.image))
                root = self.engine.call("mount", container)
                inside = ["ip", "netns", "exec", spaces[name], *UNSHARE, "sh", "-euc", ENTER, "sh"]
                self.prefixes[name] = [*inside, name, root, str(keys), str(hosts), *environ]
            try:
                for name in names:
                    start = [*self.prefixes[name], "sh", "/etc/hvd_dls_node/start.sh"]
                    running.append(self.popen(start, stdout=file, stderr=file))
                for name in names:
                    self.wait_until_healthy(name)
                yield
            finally:
                for process in running:
                    stop(process)

    def popen(self, command: Sequence[str], **options: object) -> subprocess.Popen[bytes]:
        return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
            command, stdin=subprocess.DEVNULL, start_new_session=True, **options
        )

    def wait_until_healthy(self, name: str) -> None:
        """The image's health check."""
        deadline = time.monotonic() + 60
        while True:
            try:
                engines.tried(*self.prefixes[name], "ssh", "localhost", "true")
                return
            except engines.EngineError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a container's process and what it started, all in the session made for it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 15)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("command", nargs="*", metavar="COMMAND", help=f"default: {EXAMPLE}")
    options = parser.parse_args()
    command = options.command or shlex.split(EXAMPLE)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # clean up first
    line, work = matrix.Line(sys.stderr), matrix.work_folder(os.environ)
    entry = matrix.read(COMPOSE)["node1"]
    if os.geteuid() or not shutil.which("ip"):
        print("error: this needs root and Debian's package iproute2", file=sys.stderr)
        return 1
    try:
        engine = matrix.obtain_engine("buildah", True, line)
        assert isinstance(engine, engines.Buildah)
        runner = matrix.Matrix(engine, work, line)
        log = runner.logs / "cluster.log"
        log.write_text("")
        with tempfile.TemporaryDirectory(dir=work, prefix="cluster-") as folder:
            line.begin("cluster: build")
            settings = machine.write(Path(folder) / "machine", work.with_name("wheels"))
            runner.build(entry, settings, log)
            line.say(f"built {entry.image}, {engine.size(entry.image) / 1e9:.2f} GB")
            names = [f"node{number}" for number in range(1, options.nodes + 1)]
            nodes = Nodes(engine, engine.image(entry.image), Path(folder))
            start = time.monotonic()
            with nodes.up(names, log):
                line.say(f"{len(names)} nodes are healthy; running {shlex.join(command)}")
                code = nodes.popen([*nodes.prefixes["node1"], *IN_HOME, *command]).wait(600)
            line.say(f"ended with {code} after {report.duration(time.monotonic() - start)}")
            return int(code)
    except (engines.EngineError, matrix.FailError, matrix.SkipError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
