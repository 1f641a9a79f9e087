"""Images per second with random gradients: what exchanging them costs on your network.

    horovodrun -np 2 python -m benchmarks.synthetic --model resnet50 --compression dls

The flags and output lines are those of Horovod's pytorch_synthetic_benchmark.py, but a model is
only its parameters' shapes and gradients are noise, so that a step is nothing but communication,
plus --backward-ms, in which a real model would compute. A rate in images is therefore no training
speed; the same rate with another --compression tells what that saves.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import timeit
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch

from benchmarks.common.command_line import add_output_options, make_parser
from benchmarks.common.noise import TAILS
from benchmarks.common.reporting import pyplot, save_picture, write_json
from benchmarks.common.shapes import MODELS, entries
from benchmarks.common.stopwatch import Stopwatch
from benchmarks.common.synthetic_model import (
    COMPRESSIONS,
    Gradients,
    SyntheticModel,
    make_compression,
)
from hvd_dls.config import INDEX_CODES, VALUES, DLSConfig
from hvd_dls.torch import DLSCompressor


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = make_parser("synthetic", __doc__)
    parser.add_argument("--fp16-allreduce", action="store_true", help="same as --compression fp16")
    parser.add_argument("--model", choices=MODELS, default="resnet50")
    parser.add_argument("--batch-size", type=int, default=32, help="images a rank and step")
    parser.add_argument("--num-warmup-batches", type=int, default=10)
    parser.add_argument("--num-batches-per-iter", type=int, default=10)
    parser.add_argument("--num-iters", type=int, default=10)
    parser.add_argument("--compression", choices=COMPRESSIONS, default="none")
    parser.add_argument("--density", type=float, default=DLSConfig.density)
    parser.add_argument("--values", choices=VALUES, default=DLSConfig.values)
    parser.add_argument("--index-code", choices=INDEX_CODES, default=DLSConfig.index_code)
    parser.add_argument("--bucket-bytes", type=int, default=DLSConfig.bucket_bytes)
    parser.add_argument("--momentum", type=float, default=0.0, help="of SGD; of DLS, in its place")
    parser.add_argument("--backward-ms", type=float, default=0.0, help="sleep in each backward")
    parser.add_argument("--tail", choices=TAILS, default="normal", help="shape of the noise")
    parser.add_argument("--spread", type=float, default=100.0, help="between layers' scales")
    parser.add_argument("--threads", type=int, default=1, help="of torch on each rank")
    add_output_options(parser)
    args = parser.parse_args()
    if args.fp16_allreduce:
        args.compression = "fp16"
    return args


def log(text: str) -> None:
    """Prints a line, on rank 0 only."""
    if hvd.rank() == 0:
        print(text, flush=True)


class Benchmark:
    """A synthetic model and its optimizer.

    Args:
        args: the command line.

    Attributes:
        gradients: all that the model's backward returns.
        model: the synthetic model.
        compression: what Horovod's optimizer has been given.
        optimizer: Horovod's.
        lengths: of payloads, by step; empty if nothing is sparse.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        shapes = MODELS[args.model]()
        self.gradients = Gradients(shapes, args.tail, args.spread, seed=hvd.rank())
        self.model = SyntheticModel(
            shapes, self.gradients.draw, backward_seconds=args.backward_ms / 1e3
        )
        options = {
            name: getattr(args, name)
            for name in ("density", "values", "index_code", "bucket_bytes", "momentum")
        }
        self.compression = make_compression(args.compression, **options)
        named = list(self.model.named_parameters())
        of_optimizer = 0.0 if isinstance(self.compression, DLSCompressor) else args.momentum
        self.optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD([p for _, p in named], lr=0.01, momentum=of_optimizer),
            named_parameters=named,
            compression=self.compression,
        )
        self.lengths: list[int] = []

    def step(self) -> None:
        """Does a training step."""
        self.optimizer.zero_grad()
        self.model().backward()
        self.optimizer.step()
        if isinstance(self.compression, DLSCompressor) and (last := self.compression.last_step()):
            self.lengths.append(last.sparse_bytes)

    def bytes_per_step(self) -> dict[str, float]:
        """Returns the bytes that a rank hands to Horovod in a step, by operation."""
        whole = 4 * sum(t.numel() for t in self.gradients.tensors)
        if not isinstance(self.compression, DLSCompressor):
            return {"allreduce": whole / (2 if self.compression is hvd.Compression.fp16 else 1)}
        last = self.compression.last_step()
        dense = last.dense_bytes if last else whole
        return {"allgather": float(np.mean(self.lengths or [0])), "allreduce": float(dense)}

    def unchanged_lengths(self) -> float | None:
        """Returns the share of steps with payloads as long as in the step before.

        Horovod need not negotiate these.
        """
        pairs = list(itertools.pairwise(self.lengths))
        return sum(a == b for a, b in pairs) / len(pairs) if pairs else None


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark, printing Horovod's lines; returns all figures."""
    benchmark = Benchmark(args)
    log(f"Model: {args.model}")
    log(f"Batch size: {args.batch_size}")
    log(f"Number of CPUs: {hvd.size()}")
    log("Running warmup...")
    timeit.timeit(benchmark.step, number=args.num_warmup_batches)
    log("Running benchmark...")
    benchmark.lengths.clear()
    watch, rates, seconds = Stopwatch(), [], 0.0
    with watch.watching():
        for i in range(args.num_iters):
            taken = timeit.timeit(benchmark.step, number=args.num_batches_per_iter)
            rates.append(args.batch_size * args.num_batches_per_iter / taken)
            seconds += taken
            log(f"Iter #{i}: {rates[-1]:.1f} img/sec per CPU")
    mean, confidence = np.mean(rates), 1.96 * np.std(rates)
    log(f"Img/sec per CPU: {mean:.1f} +-{confidence:.1f}")
    size = hvd.size()
    log(f"Total img/sec on {size} CPU(s): {size * mean:.1f} +-{size * confidence:.1f}")
    steps = args.num_iters * args.num_batches_per_iter
    split = {label: 1e3 * s / steps for label, s in watch.longest_first()}
    split["rest (backward, optimizer)"] = 1e3 * seconds / steps - sum(split.values())
    return {
        "options": {k: v for k, v in vars(args).items() if k not in ("json", "picture")},
        "ranks": size,
        "entries": entries(MODELS[args.model]()),
        "images_per_second": rates,
        "step_ms": 1e3 * seconds / steps,
        "split_ms": split,
        "bytes": benchmark.bytes_per_step(),
        "unchanged_lengths": benchmark.unchanged_lengths(),
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def show(result: dict[str, Any]) -> None:
    """Prints what Horovod's benchmark does not: the parts of a step, bytes and memory."""
    log(f"\nStep: {result['step_ms']:.1f} ms on rank 0, of which")
    for label, milliseconds in result["split_ms"].items():
        log(f"  {milliseconds:8.2f} ms  {label}")
    for kind, count in result["bytes"].items():
        log(f"Bytes a rank handed to {kind} in a step: {count:,.0f}")
    log(f"Peak memory of rank 0, frameworks included: {result['peak_megabytes']:,.0f} MB")
    if result["unchanged_lengths"] is not None:
        log(
            f"Steps in which no payload changed its length (hits in Horovod's response cache): "
            f"{result['unchanged_lengths']:.0%}"
        )


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws the parts of a step."""
    figure, axis = pyplot().subplots(figsize=(9, 2.5))
    left = 0.0
    for label, milliseconds in result["split_ms"].items():
        axis.barh([0], [milliseconds], left=left, label=f"{label}: {milliseconds:.1f} ms")
        left += milliseconds
    axis.set(yticks=[], xlabel="milliseconds in a step", title=result["options"]["compression"])
    figure.legend(loc="outside lower center", ncols=3)
    figure.tight_layout(rect=(0, 0.35, 1, 1))
    save_picture(figure, path)


def main() -> None:
    """Runs the benchmark on each rank; rank 0 shows the figures."""
    args = parse()
    hvd.init()
    torch.set_num_threads(args.threads)
    result = run(args)
    show(result)
    if hvd.rank() == 0:
        if args.json:
            write_json(result, args.json)
        if args.picture:
            draw(result, args.picture)
    hvd.shutdown()


if __name__ == "__main__":
    main()
