"""Runs the benchmarks and rebuilds docs/results.md from what they print.

    python -m benchmarks.results                     # all, about an hour; the network needs root
    python -m benchmarks.results --only wire network # these; the others' last results stay
    python -m benchmarks.results --only              # only builds the page

Each benchmark's output is kept in build/results/: after an interruption, name the missing ones.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import date
from typing import NamedTuple

from benchmarks.common.command_line import make_parser
from benchmarks.common.paths import ROOT

KEPT = ROOT / "build" / "results"
PAGE = ROOT / "docs" / "results.md"
INTRODUCTION = """# Results

Made by `python -m benchmarks.results`, which runs each command below. Every ratio compares figures
of one run, taken in turn on the same data; spreads stand beside them. What was measured on a GPU
is in [gpu-results.md](gpu-results.md).
"""


class Benchmark(NamedTuple):
    """One section of the page.

    Attributes:
        title: of the section.
        options: of the command; {kept} is the folder of results.
        about: what the section begins with.
        module: the command; by default the one that is named like the section.
    """

    title: str
    options: str
    about: str
    module: str = ""


BENCHMARKS = {
    "selection": Benchmark(
        "Selection on one core",
        "--sizes 1e3 1e4 1e5 1e6 2.5e7 --densities 1e-3 1e-2 0.1 --repeats 5",
        "What the CPU pays for choosing: `find` reads residual and gradient and takes the k "
        "largest sums; `settle`, after the exchange, writes both. Beside it the usual ways to do "
        "the same, with the same work around them. The floor is one `np.add(residual, gradient, "
        "out=residual)`.",
    ),
    "wire": Benchmark(
        "Bytes on the wire",
        "",
        "Whole payloads, with headers and histograms, divided by their entries, against the "
        "entropy of the index set plus the values' bits.",
    ),
    "exchange": Benchmark(
        "Loopback: what DLS adds where the network is no bottleneck",
        "",
        "Two ranks, the 161 parameters of ResNet-50, no computation. What an entry and a layer "
        "cost: [work.md](work.md).",
    ),
    "network": Benchmark(
        "Four hosts, a model of 10.7 million parameters",
        "",
        "Hosts are network namespaces of one machine of few cores, joined by links of the given "
        "rate. A step is the exchange alone.",
    ),
    "network2": Benchmark(
        "Two hosts, ResNet-50",
        "--hosts 2 --model resnet50 --rounds 4",
        "The same with a rank for each core of this machine.",
        module="network",
    ),
    "network8": Benchmark(
        "Eight hosts, a model of 1.2 million parameters",
        "--hosts 8 --model mlp1m --rates 1gbit 100mbit --density 0.01 --rounds 3",
        "Eight ranks share the few cores of this machine: what is measured is mostly the wait for "
        "one of them.",
        module="network",
    ),
    "cycle": Benchmark(
        "How often Horovod looks for work: HOROVOD_CYCLE_TIME",
        "--hosts 2 --model resnet50 --rates 1gbit --density 0.01 --rounds 3 --cycle-times 0.1 1 5",
        "The same as the two hosts above, with Horovod's background thread waking up more and less "
        "often than every millisecond, its default.",
        module="network",
    ),
    "threads": Benchmark(
        "Selection on two threads",
        "--threads 2 --sizes 1e6 1e7 2.5e7 1e8 --densities 1e-4 1e-3 1e-2 --data normal "
        "--repeats 3",
        "As above, but ours on two threads (option `threads`), too; all else is on one.",
        module="selection",
    ),
    "memory": Benchmark(
        "Memory",
        "",
        "The peak of a rank's resident memory, two ranks.",
    ),
    "cost_model": Benchmark(
        "Does it pay on my network?",
        "{kept}/exchange.json {kept}/network.json",
        "A model of the step's cost, fitted to the measurements above, and what it says of more "
        'ranks and other links. Its rows of `exchange="sparse_allreduce"` rest on four hosts; '
        "fitted to 4, 8 and 16: [scale.md](scale.md#which-exchange-when).",
    ),
}


def command_of(name: str) -> list[str]:
    """Returns the arguments of the Python interpreter that run a benchmark."""
    benchmark = BENCHMARKS[name]
    options = benchmark.options.format(kept=KEPT.relative_to(ROOT)).split()
    return ["-m", f"benchmarks.{benchmark.module or name}", *options]


def run(name: str) -> bool:
    """Runs a benchmark and keeps its output; returns whether there is any.

    A benchmark that misses a target ends with an error, too, and its output is kept.
    """
    files = ["--json", f"{KEPT}/{name}.json", "--picture", f"{ROOT}/docs/images/{name}.png"]
    command = [*command_of(name), *files]
    print(f"\n== {' '.join(command)}", file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode and not done.stdout.strip():
        print(f"{name} ended with {done.returncode}", file=sys.stderr)
        return False
    header = f"{date.today()}, {os.cpu_count()} cores, {platform.machine()}"
    (KEPT / f"{name}.txt").write_text(f"{header}\n{done.stdout.strip()}\n")
    return True


def build_page() -> None:
    """Writes the page from all outputs that are kept."""
    parts = [INTRODUCTION]
    for name, benchmark in BENCHMARKS.items():
        kept = KEPT / f"{name}.txt"
        if not kept.exists():
            continue
        header, _, output = kept.read_text().partition("\n")
        parts.append(f"## {benchmark.title}\n\n{benchmark.about}\n")
        parts.append(f"`python {' '.join(command_of(name))}` ({header})\n")
        parts.append(f"```\n{output.strip()}\n```\n")
        if (ROOT / "docs" / "images" / f"{name}.png").exists():
            parts.append(f"![{benchmark.title}](images/{name}.png)\n")
    PAGE.write_text("\n".join(parts))


def main() -> int:
    """Runs what was asked for and builds the page; returns the exit status."""
    parser = make_parser("results", __doc__)
    parser.add_argument("--only", nargs="*", choices=BENCHMARKS, help="which to run (default: all)")
    options = parser.parse_args()
    KEPT.mkdir(parents=True, exist_ok=True)
    names = list(BENCHMARKS) if options.only is None else options.only
    failed = [name for name in names if not run(name)]
    build_page()
    print(f"{PAGE.relative_to(ROOT)} is made" + (f"; failed: {failed}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
