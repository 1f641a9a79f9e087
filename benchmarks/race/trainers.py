"""One training by one method, on one rank: some steps at a time, with its own clock."""

from __future__ import annotations

import time
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch

from benchmarks.common.synthetic_model import make_compression
from benchmarks.convergence.settings import WARMUP
from benchmarks.convergence.tasks import Data, Task, batch, evaluate, loss, rate_at
from benchmarks.race.local_steps import Rounds
from benchmarks.race.tuning import tuning
from benchmarks.rounds.ddp import DDP, connect, with_ddp
from benchmarks.rounds.measuring import interface_bytes, wait_for_all
from benchmarks.rounds.methods import Method
from hvd_dls.torch import DLSCompressor, LocalSteps

# Learning rate and momentum of rounds, by what trains between them. Behind Adam, as DiLoCo has it;
# SGD with momentum wants plain averaging: with momentum on top, the first rounds leave too far.
OUTER = {"adam": (0.7, 0.9), "sgd": (1.0, 0.0)}
SPARSE_OUTER = {"adam": 2.5, "sgd": 1.0}  # learning rate of sparse rounds: docs/local-steps.md
SPARSE_WARMUP = 0.2  # share of these rounds
FEW_EXAMPLES = 250  # held-out examples for each point of a curve; the end takes all


class Trainer:
    """A task's training by a method, as a user would write it.

    Optimizers and learning rates are those of ``tuning``.  PowerSGD is dense for as many steps as
    the density takes to fall to 1 %, as its hook's users have it.

    Args:
        method: how gradients are exchanged.
        task: what is trained.
        data: of the task.
        seed: of first weights and the order of examples.
        steps: of the whole training, which the method may ask to be so many times longer.
        first: β₁ of Adam outside of a compressor; None: the task's.

    Attributes:
        method: how gradients are exchanged.
        seconds: so far, from when all ranks began until all were through, without evaluation.
        sent_bytes: so far, as the kernel counted them at the interface of this rank's host.
        curve: held-out losses and accuracy after ``step`` steps, and the seconds until then.
    """

    def __init__(
        self,
        method: Method,
        task: Task,
        data: Data,
        seed: int,
        steps: int,
        first: float | None = None,
    ) -> None:
        self.method, self._task, self._data = method, task, data
        steps *= method.longer
        self._seed, self._steps, self._done = seed, steps, 0
        self._model = task.make_model(seed)
        every = max(1, len(data.validation.inputs) // FEW_EXAMPLES)
        self._few = data.validation.part(slice(None, None, every))
        self.seconds, self.sent_bytes = 0.0, 0.0
        self.curve: dict[str, list[float]] = {"step": [], "seconds": [], "loss": [], "accuracy": []}
        self._tuning = tuning(task, method, steps, hvd.size(), first)
        self._forward: Any = self._model
        self._optimizer: Any = self._tuning.optimizer(self._model)
        self._set_up()

    def _set_up(self) -> None:
        """Puts what exchanges gradients around the optimizer, or the model."""
        if self.method.compression in DDP:
            connect()
            first = max(2, round(WARMUP[0.01] * self._steps))
            self._forward, _ = with_ddp(self._model, self.method, first)
            return
        # Names of its own, so that Horovod's response cache knows each method's tensors.
        named = [(f"{self.method.name}/{n}", p) for n, p in self._model.named_parameters()]
        self._optimizer = hvd.DistributedOptimizer(
            self._optimizer,
            named_parameters=named,
            compression=make_compression(self.method.compression, **self._tuning.options),
        )

    def train(self, until: int, interface: str | None) -> None:
        """Trains until so many steps are done, then looks how far it has come.

        Args:
            until: how many; of a longer training, so many times as many.
            interface: whose bytes to count.
        """
        until = self._end_of_turn(until * self.method.longer)
        if until == self._done:
            return
        wait_for_all()
        before, start = interface_bytes(interface), time.perf_counter()
        for step in range(self._done, until):
            self._step(step)
        wait_for_all()
        self.seconds += time.perf_counter() - start
        self.sent_bytes += float((interface_bytes(interface) - before)[1])
        self._done = until
        if hvd.rank() == 0:
            point = (self._done, self.seconds, *evaluate(self._model, self._few))
            for column, value in zip(self.curve.values(), point, strict=True):
                column.append(float(value))

    def _end_of_turn(self, until: int) -> int:
        """Returns how many steps of all are to be done in the end of a turn."""
        return until

    def _step(self, step: int) -> None:
        rate = self._tuning.rate * rate_at(self._task, step, self._steps)
        self._optimizer.param_groups[0]["lr"] = rate
        part = batch(self._task, self._data.training, self._seed, step, hvd.rank(), hvd.size())
        self._optimizer.zero_grad()
        loss(self._task, self._forward, part).backward()
        self._optimizer.step()

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


class LocalTrainer(Trainer):
    """A training by local steps: turns end with a round, and so does the training.

    Each rank has the optimizer of dense training for itself, and keeps its moments from round to
    round.
    """

    def _set_up(self) -> None:
        connect()
        outer = self.method.outer or OUTER["adam" if self._tuning.betas else "sgd"]
        self._rounds: Rounds | LocalSteps = Rounds(self._model, *outer)

    def _end_of_turn(self, until: int) -> int:
        assert self.method.every is not None
        return until if until == self._steps else until - until % self.method.every

    def _step(self, step: int) -> None:
        super()._step(step)
        assert self.method.every is not None
        if (step + 1) % self.method.every == 0 or step + 1 == self._steps:
            self._rounds.finish()


class SparseLocalTrainer(LocalTrainer):
    """A training by local steps whose changes are sparse: hvd_dls.torch.LocalSteps."""

    def _set_up(self) -> None:
        method, rounds = self.method, self._steps // (self.method.every or 1)
        usual = SPARSE_OUTER["adam" if self._tuning.betas else "sgd"]
        self._rounds = LocalSteps(
            self._model,
            DLSCompressor(density=method.density, warmup_steps=round(SPARSE_WARMUP * rounds)),
            every=self._steps + 1,  # rounds are ended from without
            lr=method.outer[0] if method.outer else usual,
        )


def make_trainer(method: Method, *about: Any) -> Trainer:
    """Makes the trainer of a method; for the arguments see ``Trainer``."""
    kinds = {"local": LocalTrainer, "local-dls": SparseLocalTrainer}
    return kinds.get(method.compression, Trainer)(method, *about)
