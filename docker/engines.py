"""Docker, podman and buildah, as far as the test matrix needs them.

All three build the same Dockerfile with nearly the same options. Buildah has no engine and needs
none of the kernel's cgroups, so it works inside a container or a sandbox where podman does not.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path


class EngineError(Exception):
    """This engine cannot do it, and why."""


def tried(*command: str, environ: Mapping[str, str] | None = None) -> str:
    """What a command prints; EngineError, with the end of what it said, if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
    except OSError as problem:
        raise EngineError(str(problem)) from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        raise EngineError(f"{' '.join(command[:3])}: {said[-1]}")
    return done.stdout.strip()


class Engine:
    """What docker and podman have in common; subclasses say where theirs differ."""

    name = "docker"
    build_options: tuple[str, ...] = ("--progress=plain",)
    run_options: tuple[str, ...] = ("--rm", "--shm-size=1g", "--init")
    inspect: tuple[str, ...] = ("image", "inspect")
    local = ""  # what comes before the name of an image that was never pulled

    def __init__(self) -> None:
        self.environ: dict[str, str] = {}

    def check(self) -> None:
        """Raise EngineError if it is missing or cannot work here."""
        if not shutil.which(self.name):
            raise EngineError(f"{self.name} is not installed")
        self.probe()

    def probe(self) -> None:
        self.call("info")
        self.call("buildx", "version")  # the builder before it knows neither mounts nor contexts

    def call(self, *arguments: str) -> str:
        return tried(self.name, *arguments, environ={**os.environ, **self.environ})

    def image(self, name: str) -> str:
        return self.local + name

    def has_image(self, name: str) -> bool:
        with contextlib.suppress(EngineError):
            return bool(self.call(*self.inspect, name))
        return False

    def pull(self, name: str) -> None:
        self.call("pull", "--quiet", name)

    def import_base(self, tar: Path, name: str) -> None:
        self.call("import", "--change", 'CMD ["bash"]', str(tar), name)

    def build(
        self, image: str, build: Mapping[str, str], arguments: Mapping[str, str], machine: Path
    ) -> list[str]:
        """The command that builds an image; `build` has context, dockerfile and target."""
        pairs = [f"--build-arg={name}={value}" for name, value in arguments.items()]
        return [
            *(self.name, "build", *self.build_options, *pairs),
            *(f"--build-context=machine={machine}", f"--target={build['target']}"),
            *(f"--tag={self.image(image)}", f"--file={build['dockerfile']}", build["context"]),
        ]

    @contextlib.contextmanager
    def run(
        self, image: str, command: Sequence[str], environ: Mapping[str, str]
    ) -> Iterator[list[str]]:
        """The command that runs a command in a new container of the image."""
        pairs = [f"--env={name}={value}" for name, value in environ.items()]
        yield [self.name, "run", *self.run_options, *pairs, self.image(image), *command]

    def size(self, image: str) -> int:
        """Bytes of the image."""
        return int(self.call("image", "inspect", "--format={{.Size}}", self.image(image)))


class Podman(Engine):
    name = "podman"
    build_options = ("--format=docker", "--layers", "--network=host", "--pull=never")
    run_options = ("--rm", "--shm-size=1g")
    local = "localhost/"

    def probe(self) -> None:
        """Whether containers start at all: `podman info` also works where none does."""
        self.call("info")
        command = ["podman", "run", "--rm", "--rootfs", "/:O", "true"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as problem:
            said = (getattr(problem, "stderr", None) or str(problem)).strip().splitlines()
            raise EngineError(f"podman starts no container: {said[-1]}") from None


class Buildah(Engine):
    name = "buildah"
    build_options = (*Podman.build_options, "--isolation=chroot")
    inspect = ("inspect", "--type=image")
    local = "localhost/"

    def probe(self) -> None:
        """Find a storage driver that works: overlay shares layers, vfs copies the whole image."""
        drivers = [os.environ.get("STORAGE_DRIVER") or "overlay", "vfs"]
        for driver in drivers:
            self.environ = {"STORAGE_DRIVER": driver}
            with contextlib.suppress(EngineError):
                self.call("info")
                return
        self.call("info")

    def import_base(self, tar: Path, name: str) -> None:
        with self.container("scratch") as container:
            self.call("add", "--quiet", container, str(tar), "/")
            self.call("config", "--cmd", "bash", container)
            self.call("commit", "--quiet", "--format=docker", container, name)

    @contextlib.contextmanager
    def container(self, image: str) -> Iterator[str]:
        container = self.call("from", "--pull-never", image)
        try:
            yield container
        finally:
            with contextlib.suppress(EngineError):
                self.call("umount", container)
            with contextlib.suppress(EngineError):
                self.call("rm", container)

    @contextlib.contextmanager
    def run(
        self, image: str, command: Sequence[str], environ: Mapping[str, str]
    ) -> Iterator[list[str]]:
        pairs = [f"--env={name}={value}" for name, value in environ.items()]
        # The host's network, so a host name that resolves there, as Horovod asks for.
        options = ["--isolation=chroot", "--hostname=localhost"]
        with self.container(self.image(image)) as container:
            yield ["buildah", "run", *options, *pairs, container, "--", *command]

    def size(self, image: str) -> int:
        """Bytes of the image: buildah rounds what it prints."""
        return parse_size(self.call("images", "--format={{.Size}}", self.image(image)))


ENGINES: dict[str, type[Engine]] = {"docker": Engine, "podman": Podman, "buildah": Buildah}


def parse_size(text: str) -> int:
    """'1.25 GB' → 1250000000."""
    number, unit = text.split()
    power = ("B", "KB", "MB", "GB", "TB").index(unit.upper())
    return round(float(number) * 1000.0**power)


def choose(wanted: str | None) -> Engine:
    """The wanted engine, or the first that works; EngineError says what is wrong with each."""
    problems = []
    for name in [wanted] if wanted else ENGINES:
        engine = ENGINES[name]()
        try:
            engine.check()
            return engine
        except EngineError as problem:
            problems.append(str(problem))
    raise EngineError("; ".join(problems))


def install_buildah() -> None:
    """Debian's buildah, which needs no daemon, and debootstrap for its base image."""
    if os.geteuid() or not shutil.which("apt-get"):
        raise EngineError("buildah can be installed by root on Debian or Ubuntu only")
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    tried("apt-get", "update", "--quiet=2", environ=environ)
    install = ["apt-get", "install", "--quiet=2", "--yes", "--no-install-recommends"]
    tried(*install, "buildah", "debootstrap", "ca-certificates", environ=environ)
