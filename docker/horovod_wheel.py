#!/usr/bin/env python3
"""Build a Horovod wheel for the frameworks installed in this Python, once for each user.

Horovod 0.28.1, the last release, exists as a source archive only, and that does not build on
current frameworks. This script has pip download it, makes the changes of horovod_edits.py, builds
against the torch and TensorFlow of the Python that runs it, checks that the result imports, and
keeps it in ${XDG_CACHE_HOME:-~/.cache}/hvd_dls/wheels/<key>/, the key being a hash of everything
that changes the result (`gather_inputs`). Progress goes to stderr; the last line on stdout is the
wheel's path. Linux and the standard library suffice: a Dockerfile copies docker/horovod_*.py alone.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import horovod_cuda
from horovod_edits import Edit, edits

HOROVOD = "0.28.1"
SDIST_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")

# A framework's module, its name in Horovod's build switches, and the packages that can bring it.
FRAMEWORKS = {
    "torch": ("PYTORCH", ("torch",)),
    "tensorflow": ("TENSORFLOW", ("tensorflow-cpu", "tensorflow", "tensorflow-gpu", "tf-nightly")),
}
# Modules that Horovod's setup.py and package import; pip's names for them where they differ.
PYTHON_NEEDS = ("setuptools", "wheel", "cffi", "cloudpickle", "packaging", "psutil", "yaml")
PIP_NAMES = {"setuptools": "setuptools<81", "yaml": "pyyaml"}
# The caller's variables that steer compilers and Horovod's GPU support: passed on, and in the key.
PASSED_ON = re.compile(
    r"(CC|CXX|CPATH|LIBRARY_PATH|(C|CXX|LD)FLAGS|CUDA_HOME"
    r"|HOROVOD_(BUILD|CPU_OPERATIONS|CUDA|DEBUG|GPU|NCCL|ROCM)\w*)$"
)
# Headers that the sources forget to include, and GCC >= 13 no longer includes by the way.
FORGOTTEN_INCLUDES = "-include cstdint -include stdexcept -include string"
APT = "On Debian or Ubuntu: sudo apt-get install"

Inputs = dict[str, Any]
Builder = Callable[[Inputs, Path, Path], Path]


class WheelError(Exception):
    """There will be no wheel, for a reason the person at the keyboard can do something about."""


def say(text: str) -> None:
    over_progress = "\r\033[K" if sys.stderr.isatty() else ""
    print(f"{over_progress}horovod wheel: {text}", file=sys.stderr, flush=True)


def check_machine(environ: Mapping[str, str], python_include: str, needs_venv: bool) -> None:
    """Fail before anything is downloaded, naming all packages to install."""
    present = {
        "g++": shutil.which(shlex.split(environ.get("CXX", "c++"))[0]),
        "make": shutil.which("make") or shutil.which("ninja"),
        "cmake": shutil.which("cmake"),
        "python3-dev": (Path(python_include) / "Python.h").exists(),
        "python3-venv": not needs_venv or importlib.util.find_spec("ensurepip"),
    }
    if missing := " ".join(package for package, found in present.items() if not found):
        raise WheelError(f"missing on this machine: {missing}\n  {APT} {missing}")


def check_python_needs(needs: Sequence[str] = PYTHON_NEEDS) -> None:
    missing = [PIP_NAMES.get(name, name) for name in needs if not importlib.util.find_spec(name)]
    if missing:
        command = shlex.join([*PIP[:3], "install", *missing])
        raise WheelError(f"{sys.executable} lacks what Horovod needs\n  {command}")


def installed_frameworks(wanted: Sequence[str]) -> dict[str, str]:
    """Versions of the wanted frameworks, or of all that are installed when none is named."""
    found: dict[str, str] = {}
    for framework, (_, packages) in FRAMEWORKS.items():
        for package in packages:
            with contextlib.suppress(metadata.PackageNotFoundError):
                found.setdefault(framework, metadata.version(package))
    missing = [name for name in wanted if name not in found]
    if missing or not found:
        needed = " and ".join(missing) or "torch or tensorflow"
        raise WheelError(f"{sys.executable} has no {needed} to build against: install it first")
    return {name: found[name] for name in wanted or found}


def first_line(*command: str) -> str | None:
    """What a tool says of its version, or None where it is missing or does not know the option."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        said = subprocess.run(command, check=True, capture_output=True, text=True)
        return (said.stdout or said.stderr).splitlines()[0].strip()
    return None


def open_mpi(forced: bool | None) -> str | None:
    """Open MPI's version if Horovod shall use it: unless told otherwise, where it is installed."""
    version = None if forced is False else first_line("mpicxx", "--showme:version")
    if forced and not version:
        raise WheelError(f"--mpi needs Open MPI's headers\n  {APT} libopenmpi-dev openmpi-bin")
    return version


def arch_flags(cpuinfo: str) -> str:
    """The vector instructions that Horovod can use and this processor has."""
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    present = flags[1].split() if flags else []
    return " ".join(f"-m{name}" for name in ("f16c", "avx", "fma") if name in present)


def apply_edits(source: Path, changes: Sequence[Edit]) -> None:
    for path, old, new in changes:
        file = source / path
        text = file.read_text() if file.exists() else ""
        if old not in text:
            raise WheelError(f"cannot edit Horovod's {path}: nowhere does it say {old!r}")
        file.write_text(text.replace(old, new))


def build_environment(
    frameworks: Mapping[str, str], mpi: bool, cpuinfo: str, environ: Mapping[str, str]
) -> dict[str, str]:
    """The variables that steer Horovod's build."""
    switches = {"GLOO": True, "MXNET": False, "MPI": mpi}
    switches |= {switch: name in frameworks for name, (switch, _) in FRAMEWORKS.items()}
    cuda = horovod_cuda.builds_with_cuda(frameworks, environ)
    return {
        "HOROVOD_BUILD_ARCH_FLAGS": arch_flags(cpuinfo),
        **(horovod_cuda.build_variables(environ) if cuda else {}),
        **{name: value for name, value in environ.items() if PASSED_ON.match(name)},
        **{f"HOROVOD_WITH{'' if on else 'OUT'}_{name}": "1" for name, on in switches.items()},
        "CXXFLAGS": f"{environ.get('CXXFLAGS', '')} {FORGOTTEN_INCLUDES}".strip(),
        # The bundled Gloo asks for a CMake so old that CMake >= 4 refuses.
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",
        "CMAKE_GENERATOR": "Unix Makefiles" if shutil.which("make") else "Ninja",
    }


def gather_inputs(
    frameworks: dict[str, str], mpi: str | None, environ: Mapping[str, str]
) -> Inputs:
    """Everything that changes the wheel, readable: it is hashed for the key and kept with it."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    cuda = horovod_cuda.builds_with_cuda(frameworks, environ)
    return {
        "horovod": HOROVOD,
        "sdist_sha256": SDIST_SHA256,
        "edits": edits(frameworks, sys.version_info[:2], cuda),
        "environment": build_environment(frameworks, bool(mpi), cpuinfo, environ),
        "frameworks": frameworks,
        "mpi": mpi,
        "python": f"{platform.python_implementation()} {sysconfig.get_config_var('SOABI')}",
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()),
        "compiler": first_line(*shlex.split(environ.get("CXX", "c++")), "--version"),
        **({"nvcc": horovod_cuda.version(environ)} if cuda else {}),
    }


def cache_key(inputs: Inputs) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def elapsed(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


class Progress:
    """Turns CMake's '[ 45%] Building …' into one updating line, or a line every tenth in a log."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream, self.clock, self.live = stream, clock, stream.isatty()
        self.start, self.percent = clock(), 0

    def feed(self, line: str) -> None:
        found = re.match(r"\s*\[\s*(\d+)%\]", line)
        before, self.percent = self.percent, max(self.percent, int(found[1]) if found else 0)
        if self.percent > before and (self.live or self.percent // 10 > before // 10):
            text = f"  compiling {self.percent:3d}%  {elapsed(self.clock() - self.start)}"
            print(f"\r{text}" if self.live else f"{text}\n", end="", file=self.stream, flush=True)


def run_logged(
    command: Sequence[str], log: Path, feed: Callable[[str], None] = lambda line: None, **popen: Any
) -> None:
    """Run a command with its output in the log; if it fails, the log's end is in the error."""
    tail: deque[str] = deque(maxlen=30)
    pipe = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    popen |= {**pipe, "text": True, "errors": "replace", "start_new_session": True}
    with log.open("a") as file, subprocess.Popen(command, **popen) as process:
        try:
            for line in process.stdout or ():
                file.write(line)
                tail.append(line)
                feed(line)
        except BaseException:  # an interrupt too: no compiler shall outlive us
            os.killpg(process.pid, signal.SIGTERM)
            raise
    if process.returncode:
        said = "".join(tail)
        raise WheelError(f"{shlex.join(command)} failed:\n{said}  The whole log: {log}")


def download_sdist(into: Path, log: Path) -> Path:
    say("downloading the source archive (4 MB)")
    options = ["--no-deps", "--no-binary=:all:", "--no-build-isolation", f"--dest={into}"]
    run_logged([*PIP, "download", *options, f"horovod=={HOROVOD}"], log)
    return checked(into / f"horovod-{HOROVOD}.tar.gz")


def checked(archive: Path) -> Path:
    """The source archive, if it is the one that this script knows."""
    if (actual := sha256(archive)) != SDIST_SHA256:
        raise WheelError(f"{archive.name} has sha256 {actual}, expected {SDIST_SHA256}")
    return archive


def build_wheel(inputs: Inputs, work: Path, log: Path, sdist: Path | None = None) -> Path:
    """Download (without an `sdist`), edit, compile, try; the wheel is left in `work`."""
    frameworks = inputs["frameworks"]
    cores, start = len(os.sched_getaffinity(0)), time.monotonic()
    expected = math.ceil((1 + 2.25 * len(frameworks)) * 2 / cores)
    against = ", ".join(f"{name} {version}" for name, version in frameworks.items())
    say(f"building Horovod {HOROVOD} for {against}, Gloo, {inputs['mpi'] or 'no MPI'}")
    say(f"this takes about {expected} min on {cores} cores, the first time only; log: {log}")
    shutil.unpack_archive(checked(sdist) if sdist else download_sdist(work, log), work)
    source = work / f"horovod-{HOROVOD}"
    apply_edits(source, inputs["edits"])
    ours = {name: value for name, value in os.environ.items() if not name.startswith("HOROVOD_")}
    environment = {**ours, **inputs["environment"], "MAKEFLAGS": f"-j{cores}"}
    command = [sys.executable, "setup.py", "--quiet", "bdist_wheel", f"--dist-dir={work}"]
    run_logged(command, log, Progress(sys.stderr).feed, cwd=source, env=environment)
    (wheel,) = work.glob("*.whl")
    check_imports(wheel, inputs, work / "installed", log)
    say(f"built and checked in {elapsed(time.monotonic() - start)}")
    return wheel


def check_imports(wheel: Path, inputs: Inputs, target: Path, log: Path) -> None:
    """Import each framework's module in a process of its own, as two do not go into one."""
    say("checking that the wheel imports")
    run_logged([*PIP, "install", "--no-deps", f"--target={target}", str(wheel)], log)
    # What Horovod needs may be on the path only: docker/gpu.py brings it along in a folder.
    path = [str(target), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    expected = (True, bool(inputs["mpi"]))
    for framework in inputs["frameworks"]:
        code = f"import horovod.{framework} as hvd\n"
        code += f"assert (hvd.gloo_built(), hvd.mpi_built()) == {expected}"
        run_logged([sys.executable, "-c", code], log, cwd=target, env=environment)


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def cache_root(environ: Mapping[str, str]) -> Path:
    base = environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).absolute() / "hvd_dls" / "wheels"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; the kernel releases the lock however its holder ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is building this wheel; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def obtain(root: Path, inputs: Inputs, build: Builder) -> Path:
    """The wheel for these inputs: from the cache if it is there and whole, else built now."""
    entry = root / cache_key(inputs)
    root.mkdir(parents=True, exist_ok=True)
    with locked(entry.with_suffix(".lock")):
        if entry.exists():
            try:
                return verified(entry)
            except (OSError, ValueError, KeyError, TypeError) as problem:
                say(f"the cached wheel is broken ({problem}): building it again")
                shutil.rmtree(entry)
        for leftover in root.glob(f"{entry.name}.*.partial"):  # from a build that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        work = Path(tempfile.mkdtemp(dir=root, prefix=f"{entry.name}.", suffix=".partial"))
        try:
            log = entry.with_suffix(".log")
            log.write_text("")
            return admit(build(inputs, work, log), inputs, entry)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def admit(wheel: Path, inputs: Inputs, entry: Path) -> Path:
    """Make a cache entry of the wheel; it appears whole, by a rename, or not at all."""
    facts = {"wheel": wheel.name, "bytes": wheel.stat().st_size, "sha256": sha256(wheel)}
    staged = wheel.parent / "entry"
    staged.mkdir()
    wheel.rename(staged / wheel.name)
    (staged / "manifest.json").write_text(json.dumps({**facts, "inputs": inputs}, indent=2) + "\n")
    staged.rename(entry)
    return entry / wheel.name


def verified(entry: Path) -> Path:
    """The entry's wheel, if that is what the manifest says and was built for this key."""
    manifest = json.loads((entry / "manifest.json").read_text())
    wheel: Path = entry / manifest["wheel"]
    if (size := wheel.stat().st_size) != manifest["bytes"]:
        raise ValueError(f"{wheel.name} has {size} bytes instead of {manifest['bytes']}")
    if sha256(wheel) != manifest["sha256"]:
        raise ValueError(f"{wheel.name} is not the file that was built")
    if cache_key(manifest["inputs"]) != entry.name:
        raise ValueError("its manifest describes another build")
    return wheel


def install(wheel: Path, target: Path | None) -> None:
    """Install in this Python, or in a folder that leaves it as it is."""
    say(f"installing {wheel}")
    where = ["--upgrade", f"--target={target}"] if target else ["--force-reinstall"]
    command = [*PIP, "install", "--quiet", "--no-index", "--no-deps", *where, str(wheel)]
    subprocess.run(command, check=True, stdout=sys.stderr)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    wanted = "what to build for, as in torch,tensorflow (default: what is installed)"
    mpi = "build with Open MPI besides Gloo (default: where its headers are installed)"
    parser.add_argument("--frameworks", type=lambda text: text.split(","), default=[], help=wanted)
    parser.add_argument("--mpi", action=argparse.BooleanOptionalAction, help=mpi)
    parser.add_argument("--sdist", type=Path, help=f"horovod-{HOROVOD}.tar.gz, to download nothing")
    parser.add_argument("--install", action="store_true", help="install the wheel in this Python")
    parser.add_argument("--target", type=Path, help="a folder to install the wheel in instead")
    parser.add_argument("--check", action="store_true", help="only look for what make needs")
    options = parser.parse_args(arguments)
    if unknown := set(options.frameworks) - set(FRAMEWORKS):
        parser.error(f"unknown framework: {', '.join(sorted(unknown))}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):  # clean up, then end as the shell expects
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        check_machine(os.environ, sysconfig.get_path("include"), needs_venv=options.check)
        if options.check:
            return 0
        check_python_needs()
        frameworks = installed_frameworks(options.frameworks)
        inputs = gather_inputs(frameworks, open_mpi(options.mpi), os.environ)
        build = functools.partial(build_wheel, sdist=options.sdist)
        wheel = obtain(cache_root(os.environ), inputs, build)
        if options.install or options.target:
            install(wheel, options.target)
    except (WheelError, OSError, subprocess.CalledProcessError) as problem:
        say(f"error: {problem}")
        return 1
    print(wheel)
    return 0


if __name__ == "__main__":
    sys.exit(main())
