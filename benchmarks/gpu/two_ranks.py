"""A training on two ranks that share one GPU, with fused kernels and without, beside dense.

    horovodrun -np 2 --gloo python -m benchmarks.gpu.two_ranks --device cuda

A small convolutional net whose parameters are all compressed, on pictures that are made here, with
Horovod's optimizer for torch.  After every 20th step ranks compare their parameters, to the bit.
Dense training comes last: a Horovod that was built without CUDA refuses its gradients.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from benchmarks.common.command_line import make_parser
from benchmarks.common.reporting import write_json
from benchmarks.gpu import report
from benchmarks.gpu.about import about, ways_found
from benchmarks.gpu.clock import statistics_of
from benchmarks.gpu.passes import (
    KERNELS,
    OPERATIONS,
    TOGETHER,
    Ways,
    chooses_kernels,
    on_device,
    ways,
)

DENSE, FP16 = "dense", "dense fp16"
DENSITY = 0.01
CLASSES, SIDE = 10, 16
COMPARE_EVERY, WARM_UP = 20, 10  # steps; those of the warm-up are not timed

Row = dict[str, Any]


def net() -> nn.Sequential:
    """Makes a net of 620,000 parameters, without vectors, the same on every rank."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128 * SIDE, 256, bias=False), nn.ReLU(),
        nn.Linear(256, CLASSES, bias=False),
    )  # fmt: skip
    for parameter in model.parameters():
        nn.init.kaiming_normal_(parameter)
    return model


class Pictures:
    """Pictures of ten kinds: a pattern of each kind, and noise; others on each rank.

    Args:
        device: where they are to be.
        rank: whose.
        count: of pictures in a batch.
    """

    def __init__(self, device: torch.device, rank: int, count: int) -> None:
        self._count = count
        patterns = torch.Generator().manual_seed(0)
        shape = (CLASSES, 3, SIDE, SIDE)
        self._patterns = torch.randn(shape, generator=patterns).to(device)
        self._generator = torch.Generator(device).manual_seed(1 + rank)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws pictures and their kinds."""
        device = self._patterns.device
        kinds = torch.randint(CLASSES, (self._count,), generator=self._generator, device=device)
        noise = torch.randn((self._count, 3, SIDE, SIDE), generator=self._generator, device=device)
        return 0.5 * self._patterns[kinds] + noise, kinds


@contextmanager
def passes_on(device: torch.device, way: str) -> Iterator[None]:
    """Has the compressor make its passes on the device in one way, also if that is a CPU."""
    from hvd_dls.torch import binding

    module = on_device()
    make: Any = module.Device
    if chooses_kernels():
        make = partial(make, kernels=way != OPERATIONS)
    together = None
    if way == TOGETHER:
        from hvd_dls.torch.kernels.together import Together

        together = Together()
    with (
        mock.patch.object(module, "Device", make),
        mock.patch.object(module, "together_on", return_value=together),
        mock.patch.object(module, "stays_on_device", return_value=True),
        mock.patch.object(binding, "stays_on_device", return_value=True),
    ):
        yield


def train(device: torch.device, compression: Any, args: argparse.Namespace) -> Row:
    """Trains; returns times, losses, and how often all ranks had the same parameters.

    Args:
        device: where.
        compression: makes the argument of Horovod's optimizer, of the model's named parameters.
        args: the command line.
    """
    import horovod.torch as hvd

    model = net().to(device)
    pictures = Pictures(device, hvd.rank(), args.batch)
    named = list(model.named_parameters())
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01),
        named_parameters=named,
        compression=compression(named),
    )
    steps, losses, times, same = args.steps, [], [], []
    for step in range(1, steps + 1):
        images, kinds = pictures.batch()
        _synchronize(device)
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), kinds)
        loss.backward()
        optimizer.step()
        _synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
        losses.append(loss.item())
        if step % COMPARE_EVERY == 0 or step == steps:
            same.append(_same_on_all_ranks(model))
    few = max(1, min(10, steps // 4))
    return {
        "steps": steps,
        "batch": args.batch,
        "entries": sum(parameter.numel() for _, parameter in named),
        "ms": statistics_of(times[WARM_UP:] or times),
        "loss": [sum(losses[:few]) / few, sum(losses[-few:]) / few],
        "compared": len(same),
        "same": sum(same),
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _same_on_all_ranks(model: nn.Module) -> bool:
    """Whether all ranks' parameters are the same, to the bit; on the host."""
    import horovod.torch as hvd

    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    mine = torch.tensor(list(digest.digest()), dtype=torch.uint8)
    everyone = hvd.allgather(mine[None], name="digest")
    return bool((everyone == mine).all())


def compressed(device: torch.device, found: Ways, way: str, args: argparse.Namespace) -> Row:
    """Trains with compression, in one way."""
    from hvd_dls.torch import DLSCompressor

    if way not in found.makers:
        return {"note": f"not measured: {found.notes.get(way) or found.notes[KERNELS]}"}
    options: dict[str, Any] = {"density": DENSITY, "dense_below": 0, "cost_rule": False}
    with passes_on(device, way):
        return train(device, lambda named: DLSCompressor(named, **options), args)


def dense(device: torch.device, args: argparse.Namespace, fp16: bool) -> Row:
    """Trains without our compression, if Horovod takes gradients of this device."""
    import horovod.torch as hvd

    kind = hvd.Compression.fp16 if fp16 else hvd.Compression.none
    try:
        hvd.allreduce(torch.ones(2, device=device), name=f"probe.{fp16}")
    except Exception as error:  # Horovod without CUDA: of several types
        return {"note": f"Horovod cannot reduce tensors of this device here: {error}"}
    return train(device, lambda named: kind, args)


def show(figures: Row, json: Path | None) -> None:
    """Writes what there is so far."""
    if json:
        write_json(figures, json)


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = make_parser("gpu.two_ranks", __doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, help="where rank 0 writes all figures")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64, help="pictures of each rank")
    args = parser.parse_args()
    if importlib.util.find_spec("horovod") is None:
        parser.error("Horovod is not installed; benchmarks.gpu alone needs none")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU: torch.cuda.is_available() is False; --device cpu is for a dry run")
    return args


def main() -> None:
    """Trains in all ways; ends with an error if ranks drifted apart, or nothing was learnt."""
    args = parse()
    import horovod.torch as hvd

    hvd.init()
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    found = ways(device)
    rows: list[Row] = []
    part = {"rows": rows, "complete": False}
    head = about(device) | ways_found(found)
    figures = {"about": head, "two_ranks": part}
    good = True
    for method in (TOGETHER, KERNELS, OPERATIONS, DENSE, FP16):
        if method in (DENSE, FP16):
            row = dense(device, args, method == FP16)
        else:
            row = compressed(device, found, method, args)
            good &= "note" in row or (
                row["same"] == row["compared"] and row["loss"][1] < row["loss"][0]
            )
        rows.append({"method": method, "ranks": hvd.size(), **row})
        if hvd.rank() == 0:
            show(figures, args.json)
    part["complete"] = True
    if hvd.rank() == 0:
        show(figures, args.json)
        print(report.section(figures), flush=True)
    sys.exit(not good)


if __name__ == "__main__":
    main()
