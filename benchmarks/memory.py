#!/usr/bin/env python3
"""How much memory a training step needs, dense and compressed.

    python -m benchmarks.memory --models resnet50 bert-base

Each way to exchange is a job of its own on this machine (synthetic.py), and what is measured the
peak of the resident memory of rank 0, frameworks included. What counts is the difference from dense
training; beside it stands the same in multiples of the gradients' own memory. Dense training has
Horovod's fusion buffer (up to 128 MB), through which DLS sends only what goes dense anyhow; DLS has
numba and its compiled loops, which are measured, too, and are the same for any model. Momentum
correction is to be compared with dense training that has momentum in the optimizer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.common.reporting import markdown
from benchmarks.common.shapes import MODELS
from benchmarks.hosts.jobs import ROOT, SETTINGS, launcher

WAYS = {
    "dense": ["--compression", "none"],
    "fp16": ["--compression", "fp16"],
    "layer-wise top-k, 1 %": ["--compression", "layerwise"],
    "DLS, 1 %": ["--compression", "dls"],
    "DLS, 1 %, bfloat16": ["--compression", "dls", "--values", "bfloat16"],
    "DLS, 0.1 %": ["--compression", "dls", "--density", "0.001"],
    "dense, momentum": ["--compression", "none", "--momentum", "0.9"],
    "DLS, 1 %, momentum correction": ["--compression", "dls", "--momentum", "0.9"],
}

LOOPS = """
import horovod.torch, psutil, numpy as np
before = psutil.Process().memory_info().rss
import hvd_dls.torch
from hvd_dls.core.wire import elias_fano
from hvd_dls.core.selection import passes
residual, gradient = np.zeros(1000, np.float32), np.arange(1000, dtype=np.float32)
found = passes.find(residual, gradient, 10)
passes.settle(residual, gradient, found.indices, None, [found[:2]], 1.0, gradient)
print((psutil.Process().memory_info().rss - before) / 2**20)
"""


def of_loops() -> float:
    """MB that hvd_dls takes in a process before it has seen a model."""
    done = subprocess.run(
        [sys.executable, "-c", LOOPS],
        env={**os.environ, **SETTINGS, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(done.stdout)


def peak(model: str, way: str, args: argparse.Namespace) -> dict[str, Any]:
    """Figures of one job."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        script = [sys.executable, "-m", "benchmarks.synthetic", "--model", model]
        steps = ["--num-iters", "1", "--num-batches-per-iter", str(args.steps)]
        command = [*launcher(args.ranks), *script, *WAYS[way], *steps, "--json", str(file)]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **SETTINGS, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            sys.exit(f"memory: {model}, {way}: ended with {done.returncode}:\n{done.stdout}")
        figures: dict[str, Any] = json.loads(file.read_text())
        return figures


def show(model: str, found: dict[str, dict[str, Any]]) -> None:
    entries = next(iter(found.values()))["entries"]
    gradients, dense = 4 * entries / 2**20, found["dense"]["peak_megabytes"]
    print(f"\n{model}: {entries:,} entries, gradients of {gradients:,.0f} MB\n")
    rows = []
    for way, figures in found.items():
        more = figures["peak_megabytes"] - dense
        beside = "-" if way == "dense" else f"{more:+,.0f} MB ({more / gradients:+.2f})"
        rows.append([way, f"{figures['peak_megabytes']:,.0f} MB", beside])
    print(markdown(["", "peak of rank 0", "beside dense (times the gradients)"], rows))


def draw(jobs: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(jobs), figsize=(6 * len(jobs), 3.5), squeeze=False)
    for axis, (model, found) in zip(axes[0], jobs.items(), strict=True):
        axis.barh(list(found), [figures["peak_megabytes"] for figures in found.values()])
        axis.invert_yaxis()
        axis.set(title=model, xlabel="peak of rank 0, MB")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["resnet50", "bert-base"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--picture", type=Path, help="where to draw them (matplotlib)")
    args = parser.parse_args()
    jobs: dict[str, dict[str, dict[str, Any]]] = {}
    with tqdm(total=len(args.models) * len(WAYS), unit="job", disable=None) as bar:
        for model in args.models:
            jobs[model] = {}
            for way in WAYS:
                bar.set_postfix_str(f"{model}, {way}")
                jobs[model][way] = peak(model, way, args)
                bar.update()
    for model, found in jobs.items():
        show(model, found)
    loops = of_loops()
    print(f"hvd_dls itself, with numba and its compiled loops: {loops:,.0f} MB of that")
    if args.json:
        args.json.write_text(json.dumps({"peaks": jobs, "loops_megabytes": loops}, indent=1))
    if args.picture:
        draw(jobs, args.picture)


if __name__ == "__main__":
    main()
