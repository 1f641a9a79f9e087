"""Trains with checkpoints and is killed, or goes on with other ranks: see test_checkpoints.

checkpoint_program.py survive FOLDER [KILL]    KILL: "step", "part" or "manifest"
checkpoint_program.py move FOLDER
"""

import os
import signal
import sys
from pathlib import Path

import horovod.torch as hvd
import torch
from torch import nn

from hvd_dls.adapter import exchanges
from hvd_dls.torch import DLSCompressor, load_checkpoint, save_checkpoint
from tests.torch.with_ranks.training import (
    SPARSE,
    assert_same_on_all_ranks,
    batch,
    flat,
    linear_loss,
    net_without_vectors,
    whole_numbers,
    wrap,
)

STEPS, EVERY = 16, 4


class Training:
    """All that a resumed training needs: optimizer, schedule, loss scale, dropout, warm-up."""

    def __init__(self):
        torch.manual_seed(1)
        self.model = nn.Sequential(net_without_vectors(), nn.Dropout(0.2))
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        self.compression = DLSCompressor(
            density=0.02,
            momentum=0.9,
            warmup_steps=10,
            bucket_bytes=4000,
            loss_scale=self.scaler.get_scale,
            **SPARSE,
        )
        plain = torch.optim.Adam(self.model.parameters(), lr=0.01, betas=(0.0, 0.999))
        self.optimizer = wrap(self.model, self.compression, plain)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 5, 0.5)
        self.step = 0
        torch.manual_seed(hvd.rank())

    def save(self, path):
        parts = ("model", "optimizer", "schedule", "scaler")
        state = {part: getattr(self, part).state_dict() for part in parts} | {"step": self.step}
        state["random"] = hvd.allgather_object(torch.get_rng_state())
        save_checkpoint(path, state, self.compression)

    def load(self, path):
        state = load_checkpoint(path, self.compression)
        if state is None:
            return
        for part in ("model", "optimizer", "schedule", "scaler"):
            getattr(self, part).load_state_dict(state[part])
        self.step = state["step"]
        torch.set_rng_state(state["random"][hvd.rank()])

    def one_step(self):
        self.optimizer.zero_grad()
        images, labels = batch(self.step)
        loss = nn.functional.cross_entropy(self.model(images), labels)
        self.scaler.scale(loss).backward()
        self.optimizer.synchronize()
        self.scaler.unscale_(self.optimizer)
        with self.optimizer.skip_synchronize():
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.step += 1

    def bits(self):
        (state,) = self.compression.state_dict()["models"]
        waiting = [*state["residuals"].values(), *state["velocities"].values()]
        return torch.cat([flat(self.model), *(a.double().flatten() for a in waiting)])


def kill_at(what):
    """Has a rank be killed in the middle of something that comes later."""

    def event(name, arguments):
        about = str(arguments[0]) if arguments else ""
        at_part = what == "part" and hvd.rank() == 1 and name == "open" and ".npz" in about
        at_manifest = what == "manifest" and hvd.rank() == 0 and name == "os.rename"
        if (at_part and arguments[1] == "w") or (at_manifest and "manifest" in about):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(event)


def survive(path, kill):
    training = Training()
    training.load(path)
    print(f"rank {hvd.rank()} goes on after step {training.step}", flush=True)
    begun = training.step
    while training.step < STEPS:
        if kill == "step" and training.step == begun + EVERY + 1 and hvd.rank() == 1:
            training.model[0][2].weight.register_hook(
                lambda gradient: os.kill(os.getpid(), signal.SIGKILL)
            )
        training.one_step()
        if training.step % EVERY == 0:
            if training.step == begun + 2 * EVERY:
                kill_at(kill)
            training.save(path)
    never_stopped = Training()
    while never_stopped.step < STEPS:
        never_stopped.one_step()
    assert torch.equal(training.bits(), never_stopped.bits())
    assert training.scaler.get_scale() == never_stopped.scaler.get_scale() > 2.0**10
    assert_same_on_all_ranks(flat(training.model))
    print(f"rank {hvd.rank()} came to the same", flush=True)


def move(path):
    """Nothing is lost on the way: weights move by all gradients, of whatever number of ranks."""
    exchanges._MANY = 3  # ranks from which "auto" takes owners: the exchange changes with them
    for op in (hvd.Average, hvd.Sum):
        torch.manual_seed(1)
        model = nn.Linear(40, 30, bias=False)
        nn.init.zeros_(model.weight)
        compression = DLSCompressor(density=0.1, exchange="auto", **SPARSE)
        sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        optimizer = wrap(model, compression, sgd, op=op)
        folder = path / str(op)
        state = load_checkpoint(folder, compression) or {"all": torch.zeros(30, 40), "step": 0}
        if "model" in state:
            model.load_state_dict(state["model"])
        step, everything = state["step"], state["all"]

        def train(gradient, optimizer=optimizer, model=model):
            optimizer.zero_grad()
            linear_loss(model.weight, gradient).backward()
            optimizer.step()

        for number in range(step, step + 3):
            train(whole_numbers((30, 40), number))
            drawn = [whole_numbers((30, 40), number, rank) for rank in range(hvd.size())]
            everything = everything + sum(drawn) / (hvd.size() if op == hvd.Average else 1)
        state = {"model": model.state_dict(), "all": everything, "step": step + 3}
        save_checkpoint(folder, state, compression, keep=1)
        assert compression.last_step() is None or compression.last_step().step == step + 3
        if hvd.size() > 1:
            assert not torch.allclose(-model.weight, everything)
        for _ in range(40):  # what waits goes out
            train(torch.zeros(30, 40))
        torch.testing.assert_close(-model.weight, everything, rtol=1e-5, atol=1e-3)
        assert_same_on_all_ranks(flat(model))
    print(f"rank {hvd.rank()} of {hvd.size()} lost nothing after {step} steps", flush=True)


def main():
    hvd.init()
    what, path, *kill = sys.argv[1:]
    if what == "survive":
        survive(Path(path), *(kill or [None]))
    else:
        move(Path(path))


if __name__ == "__main__":
    main()
