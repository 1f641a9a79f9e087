"""One rank of the long training: ``python -m benchmarks.soak`` starts it.

Gradients are whole numbers, and the optimizer subtracts what arrives, so nothing is ever rounded:
what all ranks have accumulated is what reached the weights, times the number of ranks, plus all
residuals, to the bit.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import horovod.torch as hvd
import numpy as np
import psutil
import torch

from benchmarks.common.command_line import make_parser
from benchmarks.common.reporting import write_json
from benchmarks.soak.events import Event, Fate
from hvd_dls import RanksDisagreeError
from hvd_dls.torch import DLSCompressor

SHAPES = {
    "conv1": (16, 3, 5, 5),
    "bias1": (16,),
    "conv2": (32, 16, 3, 3),
    "bias2": (32,),
    "fc1": (100, 288),
    "scale": (100,),
    "fc2": (100, 100),
    "fc3": (10, 100),
}
MISSING = 0.05  # how often a rank has no gradient for a layer
LARGEST = 4096.0  # of a gradient
EXACT = 2**24  # whole numbers that float32 holds


class Snapshot(NamedTuple):
    """All that a rank needs to go back to a step."""

    weights: dict[str, torch.Tensor]
    state: dict[str, Any]
    accumulated: dict[str, torch.Tensor]


class Soak:
    """A model, its optimizer, and accounts of what it was given.

    Args:
        args: the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.parameters = {
            name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()
        }
        self.compression = DLSCompressor(
            density=args.density,
            warmup_steps=args.steps // 5,
            bucket_bytes=40_000,  # several buckets
            cost_rule=False,
            nonfinite="skip",
            values=args.values,
        )
        self.optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(self.parameters.values(), lr=1.0),
            named_parameters=list(self.parameters.items()),
            compression=self.compression,
        )
        self.accumulated = {n: torch.zeros(s, dtype=torch.float64) for n, s in SHAPES.items()}
        self.fate = Fate(args.seed, args.often, hvd.size(), list(SHAPES))
        self.counts = dict.fromkeys((event.value for event in Event), 0)
        self.snapshot = self._snapshot()
        self._random = np.random.default_rng((args.seed, 1 << 41, hvd.rank()))

    def _snapshot(self) -> Snapshot:
        weights = {name: p.detach().clone() for name, p in self.parameters.items()}
        state = copy.deepcopy(self.compression.state_dict())
        return Snapshot(weights, state, {n: x.clone() for n, x in self.accumulated.items()})

    def step(self, number: int) -> None:
        """Makes one step, with whatever happens in it."""
        event, rank, layer = self.fate.event(number)
        if number == 0:
            event = Event.PLAIN  # there is no state yet
        self.counts[event.value] += 1
        if event is Event.RELOADED:
            self.compression.load_state_dict(copy.deepcopy(self.compression.state_dict()))
        elif event is Event.ROLLED_BACK:
            self._roll_back()
        gradients = self._gradients(number)
        if event is Event.SKIPPED and rank == hvd.rank():
            bad = self._random.choice([np.nan, np.inf, -np.inf])
            gradients.setdefault(layer, torch.zeros(SHAPES[layer])).view(-1)[-1] = float(bad)
        self.optimizer.zero_grad()
        if event is Event.ABANDONED:
            self._give_up(gradients, alone=rank == hvd.rank())
            return
        self._backward(gradients)
        skipped = self.compression.skipped_steps()
        self.optimizer.step()
        if self.compression.skipped_steps() == skipped:
            for name, gradient in gradients.items():
                self.accumulated[name] += gradient
        elif event is not Event.SKIPPED:
            raise AssertionError(f"step {number} was skipped for no reason")
        if number % 200 == 199:
            self.snapshot = self._snapshot()

    def _gradients(self, number: int) -> dict[str, torch.Tensor]:
        """This rank's gradients of whole numbers, of the layers that it has any for."""
        frozen, found = self.fate.frozen(number), {}
        for name, shape in SHAPES.items():
            self.parameters[name].requires_grad_(name != frozen)
            if name != frozen and self._random.random() >= MISSING:
                noise = 4 * self._random.standard_normal(shape, np.float32) ** 3
                found[name] = torch.from_numpy(noise.round().clip(-LARGEST, LARGEST))
        return found

    def _backward(self, gradients: dict[str, torch.Tensor]) -> None:
        losses = [
            (self.parameters[name] * gradient).sum()
            for name, gradient in gradients.items()
            if self.parameters[name].requires_grad
        ]
        if losses:
            torch.stack(losses).sum().backward()

    def _give_up(self, gradients: dict[str, torch.Tensor], alone: bool) -> None:
        """One rank gives the step up in the middle; the others are told."""
        if alone:
            self._backward(dict(list(gradients.items())[::2]))
            self.compression.abandon_step()
            return
        try:
            self._backward(gradients)
            self.optimizer.step()
        except RanksDisagreeError:
            return
        raise AssertionError("a rank gave its step up, and nothing told this one")

    def _roll_back(self) -> None:
        """All ranks go back to the last snapshot."""
        if not self.snapshot.state["models"]:
            return  # of before the first step
        self.compression.load_state_dict(copy.deepcopy(self.snapshot.state))
        for name, parameter in self.parameters.items():
            parameter.data.copy_(self.snapshot.weights[name])
            self.accumulated[name].copy_(self.snapshot.accumulated[name])

    def look(self, step: int) -> dict[str, Any]:
        """Compares all ranks, and what they were given with what became of it.

        Returns:
            Figures of this moment, on rank 0.

        Raises:
            AssertionError: ranks differ, or an entry is lost.
        """
        state = self.compression.state_dict()["models"][0]
        digest = hashlib.sha256(np.asarray(state["ratios"], np.int64).tobytes())
        largest = 0.0
        for name, parameter in self.parameters.items():
            weights = parameter.detach()
            digest.update(weights.numpy().tobytes())
            residual = state["residuals"].get(name, torch.zeros(weights.numel()))
            left = self.accumulated[name].view(-1) - residual.double()
            lost = hvd.allreduce(left, name=f"left.{name}", op=hvd.Sum).view_as(weights)
            lost += hvd.size() * weights.double()
            if lost.any():
                raise AssertionError(
                    f"step {step}, layer {name}: up to {lost.abs().max()} are lost or made up"
                )
            largest = max(largest, float(weights.abs().max()), float(residual.abs().max()))
        if hvd.size() * largest >= EXACT:
            raise AssertionError(f"step {step}: {largest} is too large for exact sums")
        if len(set(hvd.allgather_object(digest.hexdigest(), name="digests"))) > 1:
            raise AssertionError(f"step {step}: the ranks' weights or ratios differ")
        memory = psutil.Process().memory_info().rss / 2**20
        record = self.compression.last_step()
        assert record is not None
        return {
            "step": step,
            "steps made": record.step,
            "entries": int(record.k.sum()),
            "of": int(record.sizes.sum()),
            "spread": record.threshold_spread(),
            "largest weight": largest,
            "megabytes": max(hvd.allgather_object(memory, name="memory")),
        }


def main() -> None:
    """Trains; rank 0 writes figures."""
    parser = make_parser("soak.training", __doc__)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--look-every", type=int, required=True)
    parser.add_argument("--density", type=float, required=True)
    parser.add_argument("--values", required=True)
    parser.add_argument("--often", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--json", required=True)
    args = parser.parse_args()
    hvd.init()
    torch.set_num_threads(1)
    soak = Soak(args)
    looks = []
    for number in range(args.steps):
        soak.step(number)
        if (number + 1) % args.look_every == 0 or number + 1 == args.steps:
            looks.append(soak.look(number + 1))
            if hvd.rank() == 0:
                print(f"PROGRESS {number + 1}/{args.steps} exact", flush=True)
    if hvd.rank() == 0:
        figures = {"ranks": hvd.size(), "counts": soak.counts, "looks": looks}
        write_json(figures, Path(args.json))
    hvd.shutdown()


if __name__ == "__main__":
    main()
