#!/usr/bin/env python3
"""Try this package on a machine with a GPU, without network, in one go of a few minutes.

What the machine has (torch with CUDA, NumPy, a compiler) is used and left as it is. What is
missing comes from a bundle that docker/gpu_bundle.py has gathered, and goes into a folder of its
own, and so does Horovod, which is built first. Then come the parts of `all_parts`, each within its
own time limit; one that fails or hangs takes nothing from the others. `--device cpu` is a dry run:
the same parts, with tensors on the host.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import gpu_bundle
import gpu_report
from gpu_parts import PASSED, Part, Result, end_of, run_all

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "docker"
TOTAL = 540.0
LIMITS = {
    "build": 200,
    "tests": 150,
    "ranks": 120,
    "benchmark": 150,
    "two_ranks": 100,
    "build_nccl": 200,
    "nccl": 60,
}  # seconds
RANKS = 2
# Horovod's setup.py needs a setuptools from before this release.
SETUPTOOLS_TOO_NEW = 81
DEVICE_TESTS = ("tests/torch/test_on_device.py", "tests/torch/kernels")
RANK_TESTS = "tests/torch/with_ranks/test_on_device.py"
# With one rank NCCL works on any machine. Two ranks that share a GPU it refuses.
TRY_NCCL = """
import torch
import horovod.torch as hvd
hvd.init()
assert hvd.nccl_built()
ones = torch.ones(1_000_003, device="cuda")
assert torch.equal(hvd.allreduce(ones, op=hvd.Sum), ones)
print("allreduce through NCCL on", torch.cuda.get_device_name())
hvd.shutdown()
"""


def missing_wheels(files: Iterable[Path]) -> list[Path]:
    """The bundle's wheels of packages that this Python lacks, or has too new for Horovod."""
    return [file for file in files if file.suffix == ".whl" and is_missing(file)]


def is_missing(wheel: Path) -> bool:
    name = wheel.name.split("-")[0]
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return True
    return name == "setuptools" and int(version.split(".")[0]) >= SETUPTOOLS_TOO_NEW


def fill_target(target: Path, bundle: Path) -> Path:
    """Install what is missing in the folder `target`; returns Horovod's source archive."""
    files = list(gpu_bundle.verified(bundle))
    if wheels := missing_wheels(files):
        print("from the bundle:", *(wheel.name.split("-")[0] for wheel in wheels), flush=True)
        command = [*gpu_bundle.PIP, "install", "--quiet", "--no-index", "--no-deps", "--upgrade"]
        subprocess.run([*command, f"--target={target}", *map(str, wheels)], check=True)
    return next(file for file in files if file.name.startswith("horovod-"))


def build(device: str, sdist: Path, target: Path) -> list[str]:
    """The command that builds Horovod; for a dry run in the variant that `make` builds here.

    Built with CUDA but without HOROVOD_GPU_OPERATIONS, Horovod takes tensors on the GPU by way of
    the host: that works for ranks that share a GPU, too.
    """
    flavour = ["--frameworks", "torch", "--no-mpi"] if device == "cuda" else []
    script = [sys.executable, str(DOCKER / "horovod_wheel.py")]
    return [*script, "--sdist", str(sdist), "--target", str(target), *flavour]


def on_ranks(target: Path, *command: str) -> list[str]:
    launcher = [sys.executable, str(target / "bin" / "horovodrun"), "-np", str(RANKS), "--gloo"]
    return [*launcher, sys.executable, *command]


def test_parts(target: Path, device: str, limit: Mapping[str, float]) -> list[Part]:
    """The package's own tests on the device, in one process and on ranks that share it."""
    pytest = ["-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider"]
    pytest += ["--timeout-method=thread"]  # shows where a test hangs, a little before the end
    paths = [path for path in DEVICE_TESTS if (ROOT / path).exists()]
    alone = [sys.executable, *pytest, f"--timeout={limit['tests'] - 10:.0f}", *paths]
    # A dry run has nothing to do in the tests for a GPU, so it takes another one along.
    chosen = "gpu" if device == "cuda" else "gpu or test_groups_and_layers_that_go_dense"
    ranks = [*pytest, "-x", f"--timeout={limit['ranks'] - 10:.0f}", RANK_TESTS, "-k", chosen]
    environment = job_environment(limit["ranks"])
    return [
        Part("tests", alone, limit["tests"], ["build"]),
        Part("ranks", on_ranks(target, *ranks), limit["ranks"], ["build"], environment),
    ]


def benchmark_parts(target: Path, device: str, out: Path, limit: Mapping[str, float]) -> list[Part]:
    def command(module: str, result: str) -> list[str]:
        return ["-m", module, "--device", device, "--json", str(out / result)]

    alone = [sys.executable, *command("benchmarks.gpu", "gpu.json")]
    if device == "cpu":
        alone.append("--quick")  # its times say nothing
    ranks = on_ranks(target, *command("benchmarks.gpu.two_ranks", "two_ranks.json"))
    environment = job_environment(limit["two_ranks"])
    return [
        Part("benchmark", alone, limit["benchmark"]),
        Part("two_ranks", ranks, limit["two_ranks"], ["build"], environment),
    ]


def nccl_parts(sdist: Path, work: Path, limit: Mapping[str, float]) -> list[Part]:
    folder = work / "nccl"
    command = build("cuda", sdist, folder)
    path = {"PYTHONPATH": python_path(folder, work / "site")}
    return [
        Part("build_nccl", command, limit["build_nccl"], (), {"HOROVOD_GPU_OPERATIONS": "NCCL"}),
        Part("nccl", [sys.executable, "-c", TRY_NCCL], limit["nccl"], ["build_nccl"], path),
    ]


def all_parts(device: str, sdist: Path, work: Path, out: Path, stretch: float = 1.0) -> list[Part]:
    """What is run, in this order: what matters most comes first."""
    limit = {name: seconds * stretch for name, seconds in LIMITS.items()}
    target = work / "site"
    return [
        Part("build", build(device, sdist, target), limit["build"]),
        *test_parts(target, device, limit),
        *benchmark_parts(target, device, out, limit),
        *(nccl_parts(sdist, work, limit) if device == "cuda" else ()),
    ]


def job_environment(limit: float) -> dict[str, str]:
    """As for the jobs that tests start, but ranks that miss each other say so within the limit."""
    return {
        "OMP_NUM_THREADS": "4",
        "HOROVOD_DYNAMIC_PROCESS_SETS": "1",
        "HOROVOD_START_TIMEOUT": f"{limit / 2:.0f}",
        "HOROVOD_GLOO_TIMEOUT_SECONDS": f"{limit / 2:.0f}",
        "HVD_DLS_TEST_RANKS": str(RANKS),
    }


def python_path(*folders: Path) -> str:
    return os.pathsep.join(map(str, (ROOT, *folders)))


def keep_build_logs(results: Sequence[Result], work: Path, out: Path) -> None:
    """Append to the log of a build that did not pass what the compilers said."""
    for result in results:
        if result.name.startswith("build") and result.outcome != PASSED:
            logs = sorted((work / "cache").rglob("*.log"), key=lambda log: log.stat().st_mtime)
            with (out / f"{result.name}.log").open("a") as file:
                file.writelines(log.read_text(errors="replace") for log in logs[-1:])
            result.tail = end_of(out / f"{result.name}.log")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    here = ROOT / "build"
    parser.add_argument("--bundle", type=Path, default=here / "gpu-bundle", help="made before")
    parser.add_argument("--out", type=Path, default=here / "gpu", help="for logs and summaries")
    parser.add_argument("--work", type=Path, default=here / "gpu-work", help="what is installed")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], help="parts")
    parser.add_argument("--total", type=float, default=TOTAL, help=f"seconds ({TOTAL:.0f})")
    slower = "what to multiply all limits by, where cores are few or busy"
    parser.add_argument("--stretch", type=float, default=1.0, help=slower)
    return parser.parse_args(arguments)


def selected(parts: Sequence[Part], only: Sequence[str]) -> list[Part]:
    names = [part.name for part in parts]
    if unknown := set(only) - set(names):
        raise ValueError(f"no part {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return [part for part in parts if not only or part.name in only]


def environment_of(device: str, work: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """Variables of all parts. Wheels for a GPU are cached in the work folder, with their logs."""
    cache = {"XDG_CACHE_HOME": str(work / "cache")} if device == "cuda" else {}
    return {**environ, **cache, "PYTHONPATH": python_path(work / "site")}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    out, work = options.out.resolve(), options.work.resolve()
    for folder in (out, work):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        sdist = fill_target(work / "site", options.bundle.resolve())
        wanted = all_parts(options.device, sdist, work, out, options.stretch)
        parts = selected(wanted, options.only)
    except (OSError, ValueError, subprocess.CalledProcessError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    os.environ.update(environment_of(options.device, work, os.environ))
    facts = gpu_report.machine(os.environ)
    done: list[Result] = []

    def report(result: Result) -> None:
        done.append(result)
        print(f"{result.name}: {result.outcome}, {result.seconds:.1f} s", flush=True)
        gpu_report.write(out, options.device, facts, done)

    results = run_all(parts, out, ROOT, options.total * options.stretch, report)
    keep_build_logs(results, work, out)
    gpu_report.write(out, options.device, facts, results)
    print("", (out / "summary.md").read_text(), sep="\n")
    return int(any(result.outcome != PASSED for result in results))


if __name__ == "__main__":
    sys.exit(main())
