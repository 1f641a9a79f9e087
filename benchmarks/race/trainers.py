"""One training by one method, on one rank: some steps at a time, with its own clock."""

from __future__ import annotations

import time
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common.synthetic_model import make_compression
from benchmarks.convergence.settings import MOMENTUM, WARMUP
from benchmarks.convergence.tasks import Data, Task, batch, evaluate, loss, rate_at
from benchmarks.rounds.ddp import DDP, ONE_BUCKET_MB, connect
from benchmarks.rounds.measuring import interface_bytes, wait_for_all
from benchmarks.rounds.methods import Method

FEW_EXAMPLES = 250  # held-out examples for each point of a curve; the end takes all


class Trainer:
    """A task's training by a method, as a user would write it.

    SGD, momentum and learning rate are those of the task, found for dense training.  Sparse methods
    have momentum in the compressor, and their density falls in the first steps; PowerSGD is dense
    in as many, as its hook's users have it.

    Args:
        method: how gradients are exchanged.
        task: what is trained.
        data: of the task.
        seed: of first weights and the order of examples.
        steps: of the whole training.

    Attributes:
        method: how gradients are exchanged.
        seconds: so far, from when all ranks began until all were through, without evaluation.
        sent_bytes: so far, as the kernel counted them at the interface of this rank's host.
        curve: held-out losses and accuracy after ``step`` steps, and the seconds until then.
    """

    def __init__(self, method: Method, task: Task, data: Data, seed: int, steps: int) -> None:
        self.method, self._task, self._data = method, task, data
        self._seed, self._steps, self._done = seed, steps, 0
        self._model = task.make_model(seed)
        every = max(1, len(data.validation.inputs) // FEW_EXAMPLES)
        self._few = data.validation.part(slice(None, None, every))
        self.seconds, self.sent_bytes = 0.0, 0.0
        self.curve: dict[str, list[float]] = {"step": [], "seconds": [], "loss": [], "accuracy": []}
        if method.compression in DDP:
            self._forward: Any = self._make_ddp()
            self._optimizer: Any = self._sgd(MOMENTUM)
        else:
            self._forward, self._optimizer = self._model, self._with_horovod()

    def _sgd(self, momentum: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(self._model.parameters(), lr=1.0, momentum=momentum)

    def _with_horovod(self) -> Any:
        density, momentum, options = self.method.density, MOMENTUM, dict[str, Any]()
        if density is not None:
            options = {
                "density": density,
                "values": self.method.values,
                "momentum": MOMENTUM,
                "momentum_masking": self._task.masking,
                "warmup_steps": round(WARMUP.get(density, WARMUP[0.01]) * self._steps),
            }
            momentum = 0.0
        # Names of its own, so that Horovod's response cache knows each method's tensors.
        named = [(f"{self.method.name}/{n}", p) for n, p in self._model.named_parameters()]
        return hvd.DistributedOptimizer(
            self._sgd(momentum),
            named_parameters=named,
            compression=make_compression(self.method.compression, **options),
        )

    def _make_ddp(self) -> DistributedDataParallel:
        connect()
        powersgd = self.method.compression == "powersgd"
        options: dict[str, Any] = {"bucket_cap_mb": ONE_BUCKET_MB} if powersgd else {}
        # Statistics of batch norm stay each rank's own, as with Horovod: less to send.
        model = DistributedDataParallel(self._model, broadcast_buffers=False, **options)
        if powersgd:
            first = max(2, round(WARMUP[0.01] * self._steps))
            state = powerSGD_hook.PowerSGDState(
                None, self.method.rank or 1, start_powerSGD_iter=first
            )
            model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        elif self.method.compression == "ddp-fp16":
            model.register_comm_hook(None, default_hooks.fp16_compress_hook)
        return model

    def train(self, steps: int, interface: str | None) -> None:
        """Trains for some steps, then looks how far it has come.

        Args:
            steps: how many.
            interface: whose bytes to count.
        """
        wait_for_all()
        before, start = interface_bytes(interface), time.perf_counter()
        for step in range(self._done, self._done + steps):
            self._optimizer.param_groups[0]["lr"] = rate_at(self._task, step, self._steps)
            part = batch(self._task, self._data.training, self._seed, step, hvd.rank(), hvd.size())
            self._optimizer.zero_grad()
            loss(self._task, self._forward, part).backward()
            self._optimizer.step()
        wait_for_all()
        self.seconds += time.perf_counter() - start
        self.sent_bytes += float((interface_bytes(interface) - before)[1])
        self._done += steps
        if hvd.rank() == 0:
            point = (self._done, self.seconds, *evaluate(self._model, self._few))
            for column, value in zip(self.curve.values(), point, strict=True):
                column.append(float(value))

    def weights(self) -> np.ndarray:
        """All parameters, to be compared among ranks."""
        return torch.cat([p.detach().flatten() for p in self._model.parameters()]).numpy()

    def result(self) -> dict[str, Any]:
        """What rank 0 knows in the end."""
        held_out = evaluate(self._model, self._data.validation)
        return {
            "about": {"seed": self._seed, "steps": self._steps},
            "seconds": self.seconds,
            "sent_bytes": self.sent_bytes / self._steps,
            "loss": held_out[0],
            "accuracy": held_out[1],
            "curve": self.curve,
        }
