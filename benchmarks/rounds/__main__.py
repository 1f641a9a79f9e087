#!/usr/bin/env python3
"""Several ways to exchange the same gradients, in turns in one job: what exchange.py and network.py
run on each rank.

A step here is what is left when gradients cost nothing: they are drawn before the clock starts,
when all ranks wait for each other; the step is autograd handing them out, layer by layer, what
Horovod and the compressor do with them, and an optimizer that does nothing. A step takes as long as
the slowest rank. All ways have the same gradients' memory, and their turns come in another order in
each round.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch

from benchmarks.common.shapes import MODELS, Shapes, entries
from benchmarks.common.synthetic_model import (
    TAILS,
    Gradients,
    Still,
    Stopwatch,
    SyntheticModel,
    make_compression,
)
from hvd_dls.core.jit import HAVE_NUMBA
from hvd_dls.torch import DLSCompressor

MOST_STEPS = 40  # in a turn
INTERFACES = Path("/proc/self/net/dev")


@dataclass(frozen=True)
class Method:
    """A way to exchange gradients.

    Attributes:
        compression: "nothing" (no exchange at all), "none" (dense, as they are), "fp16",
            "layerwise" or "dls".
        density: of the sparse ones.
        values: type of the values they send.
    """

    compression: str
    density: float | None = None
    values: str = "float32"

    @classmethod
    def parse(cls, text: str) -> Method:
        """From "dense", "fp16", "nothing", "layerwise:0.01", "dls:0.01" or "dls:0.01:bfloat16"."""
        kind, *rest = text.split(":")
        if kind in ("layerwise", "dls") and rest:
            return cls(kind, float(rest[0]), *rest[1:])
        return cls({"dense": "none"}.get(kind, kind))

    @property
    def name(self) -> str:
        """As ``parse`` takes it."""
        if self.density is None:
            return {"none": "dense"}.get(self.compression, self.compression)
        values = "" if self.values == "float32" else f":{self.values}"
        return f"{self.compression}:{self.density:g}{values}"


class Way:
    """A method at work: a model of its own, with the gradients of all."""

    def __init__(
        self, method: Method, shapes: Shapes, gradients: Gradients, bucket_bytes: int | None
    ) -> None:
        self.method, self._gradients = method, gradients
        # Names of its own, so that Horovod's response cache knows each method's tensors.
        named = {f"{method.name}/{name}": shape for name, shape in shapes.items()}
        self._model = SyntheticModel(named, gradients.as_drawn, stand_in=True)
        self._parameters = [p for _, p in self._model.named_parameters()]
        self._optimizer: Any = Still(self._parameters)
        self.compression: Any = None
        self.records: list[dict[str, float]] = []
        if method.compression != "nothing":
            self.compression = self._wrap(bucket_bytes)

    def _wrap(self, bucket_bytes: int | None) -> Any:
        options: dict[str, Any] = {}
        if self.method.density is not None:
            options = {
                "density": self.method.density,
                "values": self.method.values,
                "named_parameters": self._model.named_parameters(),
            }
            options |= {"bucket_bytes": bucket_bytes} if bucket_bytes else {}
        compression = make_compression(self.method.compression, **options)
        self._optimizer = hvd.DistributedOptimizer(
            self._optimizer,
            named_parameters=self._model.named_parameters(),
            compression=compression,
        )
        return compression

    def step(self, interface: str | None = None) -> list[float]:
        """One step with new gradients.

        Args:
            interface: whose bytes to count.

        Returns:
            Seconds by the clock, seconds of this process on all processors, and the bytes that
            the interface received and sent from the step's beginning until all ranks were done.
        """
        self._gradients.draw_all()
        for parameter in self._parameters:
            parameter.grad = None
        loss = self._model()
        wait_for_all()
        before = interface_bytes(interface)
        start, cpu_start = time.perf_counter(), time.process_time()
        loss.backward()
        self._optimizer.step()
        taken = [time.perf_counter() - start, time.process_time() - cpu_start]
        wait_for_all()
        counted = interface_bytes(interface) - before
        if isinstance(self.compression, DLSCompressor):
            self._note()
        return [*taken, *counted]

    def _note(self) -> None:
        record = self.compression.last_step()
        self.records.append(
            {
                "sparse_bytes": record.sparse_bytes,
                "dense_bytes": record.dense_bytes,
                "entries": int(record.k.sum()),
                "spread": record.threshold_spread(),
            }
        )

    def handed_over(self) -> dict[str, float]:
        """Bytes a rank hands to Horovod's allgather and allreduce in a step, entries sent."""
        whole = 4.0 * sum(p.numel() for p in self._parameters)
        plain = {"nothing": 0.0, "none": whole, "fp16": whole / 2}
        if self.method.compression in plain:
            return {"allgather": 0.0, "allreduce": plain[self.method.compression], "entries": 0.0}
        mean = {key: np.mean([r[key] for r in self.records]) for key in self.records[0]}
        # What is sparse has a placeholder to reduce, a float64.
        ones = 8.0 * len(self.compression.last_step().names)
        return {
            "allgather": float(mean["sparse_bytes"]),
            "allreduce": float(mean["dense_bytes"]) + ones,
            "entries": float(mean["entries"]),
        }

    def unchanged(self) -> float | None:
        """Share of steps with payloads as long as in the step before."""
        lengths = [r["sparse_bytes"] for r in self.records]
        pairs = list(itertools.pairwise(lengths))
        return sum(a == b for a, b in pairs) / len(pairs) if pairs else None


def on_the_wire(handed_over: dict[str, float], ranks: int) -> float:
    """Bytes a rank sends in a step as rings do it, without any headers."""
    gathered = handed_over["allgather"] * (ranks - 1)
    return gathered + handed_over["allreduce"] * 2 * (ranks - 1) / ranks


def wait_for_all() -> None:
    """A barrier that leaves the processor to those who are late; Horovod's own spins."""
    handle = hvd.allreduce_async(torch.zeros(1), name="wait for all")
    while not hvd.poll(handle):
        time.sleep(0.0003)
    hvd.synchronize(handle)


def interface_bytes(interface: str | None) -> np.ndarray:
    """(2,) bytes the kernel counted at an interface so far: received, sent; zeros for None."""
    if interface is None:
        return np.zeros(2)
    for line in INTERFACES.read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == interface:
            columns = numbers.split()
            return np.array([int(columns[0]), int(columns[8])], float)
    raise SystemExit(f"there is no network interface {interface!r} here")


def gathered(numbers: Sequence[float] | Sequence[list[float]], name: str) -> np.ndarray:
    """(ranks, ...) of all ranks' numbers."""
    mine = torch.from_numpy(np.array(numbers, np.float64)[None])
    everyone: np.ndarray = hvd.allgather(mine, name=f"gathered.{name}").numpy()
    return everyone


def turn(way: Way, steps: int, interface: str | None) -> dict[str, list[float]]:
    """Some steps of one way: the slowest rank's time, and the mean over ranks of all else."""
    taken = gathered([way.step(interface) for _ in range(steps)], f"taken.{steps}")
    return {
        "seconds": taken[:, :, 0].max(axis=0).tolist(),
        "cpu_seconds": taken[:, :, 1].mean(axis=0).tolist(),
        "received_bytes": taken[:, :, 2].mean(axis=0).tolist(),
        "sent_bytes": taken[:, :, 3].mean(axis=0).tolist(),
    }


def warm_up(way: Way, steps: int, seconds: float) -> int:
    """Lets ratios settle; returns how many steps a turn of so many seconds should have."""
    sparse = isinstance(way.compression, DLSCompressor)
    taken = [way.step()[0] for _ in range(steps if sparse else 1 if seconds < 10 else 2)]
    longest = float(gathered([taken[-1]], "warm").max())
    way.records.clear()
    return int(np.clip(round(seconds / longest), 1, MOST_STEPS))


def profile(way: Way, steps: int) -> dict[str, Any]:
    """Where the time of some steps goes on this rank: milliseconds a step, by part."""
    watch = Stopwatch()
    with watch.watching():
        total, total_cpu, *_ = np.array([way.step() for _ in range(steps)]).sum(axis=0).tolist()
    parts = {
        label: [1e3 * s / steps, 1e3 * watch.cpu_seconds[label] / steps]
        for label, s in watch.longest_first()
    }
    rest = total - sum(watch.seconds.values())
    parts["rest: autograd, Horovod's hooks, Python"] = [1e3 * rest / steps, float("nan")]
    parts["whole step (processor: of all threads)"] = [1e3 * total / steps, 1e3 * total_cpu / steps]
    return parts


def run(args: argparse.Namespace) -> dict[str, Any]:
    shapes = MODELS[args.model]()
    gradients = Gradients(shapes, args.tail, args.spread, seed=hvd.rank())
    methods = [Method.parse(text) for text in args.methods]
    ways = [Way(method, shapes, gradients, args.bucket_bytes) for method in methods]
    total, done = len(ways) * (args.rounds + 1) + bool(args.profile_steps), 0

    def tell(what: str) -> None:
        nonlocal done
        if hvd.rank() == 0:
            print(f"PROGRESS {done}/{total} {what}", flush=True)
        done += 1

    steps = []
    for way in ways:
        tell(f"warming up {way.method.name}")
        steps.append(warm_up(way, args.warmup, args.turn_seconds))
    turns: dict[str, list[dict[str, Any]]] = {method.name: [] for method in methods}
    for number in range(args.rounds):
        for i in np.random.default_rng(number).permutation(len(ways)):
            tell(f"round {number + 1}: {methods[i].name}")
            turns[methods[i].name].append(turn(ways[i], steps[i], args.interface))
    tell("done" if not args.profile_steps else "profile")
    profiles = {}
    for way in ways if args.profile_steps else []:
        profiles[way.method.name] = profile(way, args.profile_steps)
    return {
        "model": args.model,
        "entries": entries(shapes),
        "tensors": len(shapes),
        "ranks": hvd.size(),
        "about": {
            "numba": HAVE_NUMBA,
            "torch": torch.__version__,
            "threads": args.threads,
            "cores": os.cpu_count(),
        },
        "methods": {
            way.method.name: {
                "turns": turns[way.method.name],
                "handed_over": way.handed_over(),
                "claimed_wire_bytes": on_the_wire(way.handed_over(), hvd.size()),
                "unchanged_lengths": way.unchanged(),
                "spread": way.records[-1]["spread"] if way.records else None,
                "profile_ms": profiles.get(way.method.name),
            }
            for way in ways
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--methods", nargs="+", required=True, help="see Method.parse")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turn-seconds", type=float, default=1.0, help="for one way in a round")
    parser.add_argument("--warmup", type=int, default=20, help="steps for ratios to settle")
    parser.add_argument("--profile-steps", type=int, default=0, help="further steps, to see inside")
    parser.add_argument("--bucket-bytes", type=int)
    parser.add_argument("--interface", help="whose bytes to count")
    parser.add_argument("--tail", choices=TAILS, default="normal")
    parser.add_argument("--spread", type=float, default=100.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    hvd.init()
    torch.set_num_threads(args.threads)
    result = run(args)
    if hvd.rank() == 0:
        args.json.write_text(json.dumps(result))
    hvd.shutdown()


if __name__ == "__main__":
    main()
