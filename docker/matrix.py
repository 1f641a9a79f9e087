#!/usr/bin/env python3
"""Build and run the entries of docker-compose.test.yml, with docker, podman or buildah.

    python docker/matrix.py                             # all of them
    python docker/matrix.py test-cpu-gloo-py3_11-torch2_13
    python docker/matrix.py --list
    python docker/matrix.py --resume --write docs/docker.md

The compose file is the only description of the entries; `docker compose` runs the same. Where no
image can be pulled, debootstrap makes the base. What the builds and tests say goes to a log for
each entry; a table comes at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import bootstrap_base
import engines
import machine
import report
import yaml
from report import Result

FOLDER = Path(__file__).resolve().parent
COMPOSE = FOLDER / "docker-compose.test.yml"
# What goes into an image: a result holds as long as none of it changes.
INPUTS = ("docker", "hvd_dls", "tests", "setup.cfg", "pyproject.toml")
BUILD_LIMIT, TEST_LIMIT = 60 * 60, 30 * 60  # seconds
DISK_NEEDED = 15 * 10**9  # bytes, for an entry with what is built on the way to it


class SkipError(Exception):
    """This entry cannot run here, for a reason that is no fault of the entry."""


class FailError(Exception):
    """This entry ran, and failed."""


@dataclass(frozen=True)
class Entry:
    """One service of the compose file."""

    name: str
    image: str
    build: Mapping[str, str]  # context, dockerfile, target
    arguments: Mapping[str, str]
    environment: Mapping[str, str]
    command: Sequence[str]

    @property
    def base(self) -> str:
        return f"docker.io/library/debian:{self.arguments['DEBIAN']}-slim"


def filled(value: str) -> str:
    """A value of the compose file, its ${NAME:-default} taken from the environment."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda m: os.environ.get(m[1]) or m[2], value)


def read(compose: Path = COMPOSE) -> dict[str, Entry]:
    """The entries, in the file's order."""
    entries = {}
    for name, service in yaml.safe_load(compose.read_text())["services"].items():
        context = (compose.parent / service["build"]["context"]).resolve()
        build = {
            "context": str(context),
            "dockerfile": str(context / service["build"]["dockerfile"]),
            "target": service["build"]["target"],
        }
        entries[name] = Entry(
            name,
            service["image"],
            build,
            {name: filled(value) for name, value in service["build"].get("args", {}).items()},
            service.get("environment", {}),
            shlex.split(service.get("command", "")),
        )
    return entries


def fingerprint(entry: Entry, root: Path) -> str:
    """A hash of everything that a result depends on, as far as it is in this repository."""
    digest = hashlib.sha256(json.dumps(vars(entry), default=dict).encode())
    for name in INPUTS:
        files = [root / name] if (root / name).is_file() else sorted((root / name).rglob("*"))
        for file in files:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


class Line:
    """One updating line on a terminal; in a log, a line now and then, as a sign of life."""

    every = 30.0  # seconds

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.live = stream, stream.isatty()
        self.start = self.last = time.monotonic()
        self.title = ""

    def begin(self, title: str) -> None:
        self.title, self.start = title, time.monotonic()
        self.last = self.start - self.every if self.live else self.start

    def feed(self, text: str) -> None:
        now = time.monotonic()
        if now - self.last < (0.1 if self.live else self.every) or not text.strip():
            return
        self.last = now
        line = f"{self.title}  {report.duration(now - self.start)}  {text.strip()}"
        width = shutil.get_terminal_size().columns - 1 if self.live else 120
        print(f"\r\033[K{line[:width]}" if self.live else line[:width],
              end="" if self.live else "\n", file=self.stream, flush=True)  # fmt: skip

    def say(self, text: str) -> None:
        over = "\r\033[K" if self.live else ""
        print(over + text, file=self.stream, flush=True)


def logged(
    command: Sequence[str], log: Path, line: Line, limit: float, environ: Mapping[str, str]
) -> str:
    """Run a command, its output in the log and its last line on show; return the output."""
    said: list[str] = []
    options: dict[str, Any] = {"text": True, "errors": "replace", "start_new_session": True}
    with log.open("a") as file:
        print(f"$ {shlex.join(command)}", file=file, flush=True)
        with subprocess.Popen(
            command,
            env={**os.environ, **environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            **options,
        ) as process:
            over = False

            def stop(*_: object) -> None:
                nonlocal over
                over = True
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

            signal.signal(signal.SIGALRM, stop)
            signal.setitimer(signal.ITIMER_REAL, limit)
            try:
                for text in process.stdout or ():
                    file.write(text)
                    file.flush()
                    said.append(text)
                    line.feed(text)
            except BaseException:  # an interrupt too: nothing shall outlive us
                stop()
                raise
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    if over:
        raise FailError(f"not done after {report.duration(limit)}")
    if process.returncode:
        raise FailError(f"{command[0]} {command[1]} ended with {process.returncode}")
    return "".join(said)


@contextlib.contextmanager
def timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    start = time.monotonic()
    try:
        yield
    finally:
        seconds[what] = time.monotonic() - start


class Matrix:
    """Runs entries with one engine and remembers what came of them."""

    def __init__(self, engine: engines.Engine, work: Path, line: Line) -> None:
        self.engine, self.work, self.line = engine, work, line
        self.logs = work / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)

    def ensure_base(self, name: str, suite: str, log: Path) -> None:
        """Have the base image: already here, pulled, or made by debootstrap."""
        if self.engine.has_image(name):
            return
        self.line.feed(f"pulling {name}")
        try:
            self.engine.pull(name)
            return
        except engines.EngineError as problem:
            not_pulled = str(problem)
        if os.geteuid() or not shutil.which("debootstrap"):
            raise SkipError(f"{name} cannot be pulled, and debootstrap is missing or not root's")
        self.line.say(f"{name} cannot be pulled: making it with debootstrap (half a minute)")
        with tempfile.TemporaryDirectory(dir=self.work) as folder, log.open("a") as file:
            print(not_pulled, file=file)
            tar = Path(folder) / "base.tar"
            try:
                bootstrap_base.make(suite, tar, file.write)
            except (bootstrap_base.BaseError, OSError, subprocess.CalledProcessError) as problem:
                raise SkipError(f"no base image: {problem}") from None
            self.engine.import_base(tar, name)

    def build(self, entry: Entry, settings: Path, log: Path) -> None:
        self.ensure_base(entry.base, entry.arguments["DEBIAN"], log)
        arguments = {**entry.arguments, **machine.proxies()}
        command = self.engine.build(entry.image, entry.build, arguments, settings)
        logged(command, log, self.line, BUILD_LIMIT, self.engine.environ)

    def run(self, entry: Entry, settings: Path) -> Result:
        """Build the entry's image and run its tests."""
        log = self.logs / f"{entry.name}.log"
        log.write_text("")
        result = Result(entry.name, "failed", engine=self.engine.name)
        seconds: dict[str, float] = {}
        passed = skipped = size = 0
        self.line.begin(f"{entry.name}: build")
        try:
            if (free := shutil.disk_usage(self.work).free) < DISK_NEEDED:
                raise SkipError(f"{free / 1e9:.0f} GB of disk free, {DISK_NEEDED / 1e9:.0f} wanted")
            with timed(seconds, "build"):
                self.build(entry, settings, log)
            size = self.engine.size(entry.image)
            self.line.begin(f"{entry.name}: tests")
            with (
                timed(seconds, "tests"),
                self.engine.run(entry.image, entry.command, entry.environment) as command,
            ):
                output = logged(command, log, self.line, TEST_LIMIT, self.engine.environ)
            passed, skipped = report.counts(output)
            result = replace(result, outcome="passed" if passed else "failed")
            result = result if passed else replace(result, reason="no test passed")
        except SkipError as problem:
            result = replace(result, outcome="skipped", reason=str(problem))
        except (FailError, engines.EngineError) as problem:
            result = replace(result, reason=str(problem))
            passed, skipped = report.counts(log.read_text(errors="replace"))
        return replace(
            result,
            build_seconds=seconds.get("build", 0),
            test_seconds=seconds.get("tests", 0),
            image_bytes=size,
            tests_passed=passed,
            tests_skipped=skipped,
            date=time.strftime("%Y-%m-%d"),
            fingerprint=fingerprint(entry, Path(entry.build["context"])),
        )


def obtain_engine(wanted: str | None, install: bool, line: Line) -> engines.Engine:
    """An engine that works, installed now if need be and allowed."""
    try:
        return engines.choose(wanted)
    except engines.EngineError as problem:
        if not install or wanted not in (None, "buildah"):
            raise
        line.say(f"no engine works ({problem}): installing buildah and debootstrap with apt-get")
        engines.install_buildah()
        return engines.choose("buildah")


def parse(arguments: Sequence[str] | None, names: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("entries", nargs="*", metavar="ENTRY", help="which (default: all)")
    install = "if no engine works, install buildah (default: for root)"
    resume = "keep what passed and has not changed since"
    write = "write the table of all entries ever run between the markers in FILE"
    parser.add_argument("--list", action="store_true", help="name the entries, run nothing")
    parser.add_argument("--engine", choices=engines.ENGINES, help="default: the first that works")
    parser.add_argument(
        "--install", action=argparse.BooleanOptionalAction, default=not os.geteuid(), help=install
    )
    parser.add_argument("--resume", action="store_true", help=resume)
    parser.add_argument("--strict", action="store_true", help="a skipped entry is a failure")
    parser.add_argument("--write", type=Path, metavar="FILE", help=write)
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.entries if name not in names]:
        parser.error(f"no such entry: {', '.join(unknown)} (--list names them)")
    return options


def work_folder(environ: Mapping[str, str]) -> Path:
    base = environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).absolute() / "hvd_dls" / "matrix"


def main(arguments: Sequence[str] | None = None) -> int:
    entries = read()
    options = parse(arguments, list(entries))
    chosen = [entries[name] for name in options.entries] or list(entries.values())
    if options.list:
        print("\n".join(entry.name for entry in chosen))
        return 0
    for number in (signal.SIGINT, signal.SIGTERM):  # clean up, then end as the shell expects
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    line, work = Line(sys.stderr), work_folder(os.environ)
    kept = report.load(work / "results.json")
    now: list[Result] = []
    try:
        matrix = Matrix(obtain_engine(options.engine, options.install, line), work, line)
    except engines.EngineError as problem:
        now = [Result(e.name, "skipped", f"no engine: {problem}") for e in chosen]
    else:
        line.say(f"engine: {matrix.engine.name}; logs: {matrix.logs}")
        with tempfile.TemporaryDirectory(dir=work, prefix="machine-") as folder:
            settings = machine.write(Path(folder), work.with_name("wheels"))
            for entry in chosen:
                old = kept.get(entry.name)
                same = old and old.fingerprint == fingerprint(entry, FOLDER.parent)
                if options.resume and old and same and old.outcome == "passed":
                    result = old
                else:
                    result = matrix.run(entry, settings)
                    # Another run, of other entries, may have saved its own meanwhile.
                    kept = {**report.load(work / "results.json"), entry.name: result}
                    report.save(work / "results.json", kept)
                line.say(" | ".join(filter(None, report.row(result))))
                if result.outcome == "failed":  # not in the table, which goes to the docs
                    line.say(f"see {matrix.logs / result.entry}.log")
                now.append(result)
    print(report.table(now), end="")
    if options.write:
        missing = [Result(name, "skipped", "not run yet") for name in entries if name not in kept]
        ever = {**{r.entry: r for r in missing}, **kept}
        report.write_between(options.write, report.table([ever[name] for name in entries]))
    bad = {"failed", "skipped"} if options.strict else {"failed"}
    return int(any(result.outcome in bad for result in now))


if __name__ == "__main__":
    sys.exit(main())
