"""Memory of a training step, dense and compressed.

    python -m benchmarks.memory --models resnet50 bert-base

Each method is a job of its own on this machine (benchmarks.synthetic), and what is measured the
peak of the resident memory of rank 0, frameworks included. What counts is the difference from dense
training; beside it stands the same in multiples of the gradients' own memory. Dense training has
Horovod's fusion buffer (up to 128 MB), through which DLS sends only what goes dense anyhow; DLS has
numba and its compiled loops, which are measured, too, and are the same for any model. Momentum
correction is to be compared with dense training that has momentum in the optimizer.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.common.command_line import add_output_options, make_parser
from benchmarks.common.paths import ROOT
from benchmarks.common.reporting import markdown, pyplot, save_picture, write_json
from benchmarks.common.shapes import MODELS
from benchmarks.hosts.jobs import ENVIRONMENT, JobError, launcher, run_job

# Options of benchmarks.synthetic, by the name of the method.
METHODS = {
    "dense": ["--compression", "none"],
    "fp16": ["--compression", "fp16"],
    "layer-wise top-k, 1 %": ["--compression", "layerwise"],
    "DLS, 1 %": ["--compression", "dls"],
    "DLS, 1 %, bfloat16": ["--compression", "dls", "--values", "bfloat16"],
    "DLS, 0.1 %": ["--compression", "dls", "--density", "0.001"],
    "dense, momentum": ["--compression", "none", "--momentum", "0.9"],
    "DLS, 1 %, momentum correction": ["--compression", "dls", "--momentum", "0.9"],
}

# Prints the megabytes that hvd_dls takes in a process before it has seen a model.
COMPILE_ALL = """
import horovod.torch, psutil, numpy as np
before = psutil.Process().memory_info().rss
import hvd_dls.torch
from benchmarks.common.internals import elias_fano, find, settle
residual, gradient = np.zeros(1000, np.float32), np.arange(1000, dtype=np.float32)
found = find(residual, gradient, 10)
settle(residual, gradient, found.indices, None, [found[:2]], 1.0, gradient)
print((psutil.Process().memory_info().rss - before) / 2**20)
"""

Figures = dict[str, dict[str, Any]]  # of benchmarks.synthetic, by method


def megabytes_of_package() -> float:
    """Measures the memory of hvd_dls itself, with numba and its compiled loops."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE_ALL],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(done.stdout)


def measure(model: str, method: str, args: argparse.Namespace) -> dict[str, Any]:
    """Runs a job; returns the figures of benchmarks.synthetic.

    Args:
        model: one of MODELS.
        method: one of METHODS.
        args: the command line.

    Raises:
        JobError: a rank ended with an error.
    """
    options = ["--model", model, *METHODS[method]]
    options += ["--num-iters", "1", "--num-batches-per-iter", str(args.steps)]
    title = f"{model}, {method}"
    return run_job(launcher(args.ranks), "benchmarks.synthetic", options, title=title)


def show(model: str, found: Figures) -> None:
    """Prints a model's table."""
    entries = next(iter(found.values()))["entries"]
    gradients, dense = 4 * entries / 2**20, found["dense"]["peak_megabytes"]
    print(f"\n{model}: {entries:,} entries, gradients of {gradients:,.0f} MB\n")
    rows = []
    for method, figures in found.items():
        more = figures["peak_megabytes"] - dense
        beside = "-" if method == "dense" else f"{more:+,.0f} MB ({more / gradients:+.2f})"
        rows.append([method, f"{figures['peak_megabytes']:,.0f} MB", beside])
    print(markdown(["", "peak of rank 0", "beside dense (times the gradients)"], rows))


def draw(models: dict[str, Figures], path: Path) -> None:
    """Draws each method's peak, a panel for each model."""
    size = (6 * len(models), 3.5)
    figure, axes = pyplot().subplots(1, len(models), figsize=size, squeeze=False)
    for axis, (model, found) in zip(axes[0], models.items(), strict=True):
        axis.barh(list(found), [figures["peak_megabytes"] for figures in found.values()])
        axis.invert_yaxis()
        axis.set(title=model, xlabel="peak of rank 0, MB")
    figure.tight_layout()
    save_picture(figure, path, dpi=110)


def main() -> None:
    """Runs a job for each model and method, and shows their figures."""
    parser = make_parser("memory", __doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["resnet50", "bert-base"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    add_output_options(parser)
    args = parser.parse_args()
    models: dict[str, Figures] = {model: {} for model in args.models}
    with tqdm(total=len(models) * len(METHODS), unit="job", disable=None) as bar:
        for model, found in models.items():
            for method in METHODS:
                bar.set_postfix_str(f"{model}, {method}")
                try:
                    found[method] = measure(model, method, args)
                except JobError as problem:
                    sys.exit(f"memory: {problem}")
                bar.update()
    for model, found in models.items():
        show(model, found)
    package = megabytes_of_package()
    print(f"hvd_dls itself, with numba and its compiled loops: {package:,.0f} MB of that")
    if args.json:
        write_json({"peaks": models, "loops_megabytes": package}, args.json)
    if args.picture:
        draw(models, args.picture)


if __name__ == "__main__":
    main()
