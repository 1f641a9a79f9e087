"""A worker of an elastic job with local steps; it says after each round which weights it has."""

import time
import zlib

import horovod.torch as hvd
import torch
from torch import nn

from hvd_dls.torch import DLSCompressor, LocalSteps
from tests.elastic.worker import die_if, order, say


def main():
    hvd.init()
    torch.manual_seed(hvd.rank())
    model = nn.Sequential(
        nn.Linear(20, 50), nn.BatchNorm1d(50), nn.Linear(50, 30), nn.Linear(30, 1)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    compression = DLSCompressor(density=0.05, dense_below=0)
    rounds = LocalSteps(model, compression, every=4, lr=2.0, momentum=0.5)
    model[0].weight.register_hook(lambda gradient: die_if("die in backward"))
    say("start", rank=hvd.rank(), size=hvd.size())
    state = hvd.elastic.TorchState(model=model, step=0, rounds=rounds)
    train(state, rounds, optimizer)


@hvd.elastic.run
def train(state, rounds, optimizer):
    world = hvd.broadcast_object(str(time.monotonic()), name="world")
    target = torch.linspace(-1, 1, 20)
    finished = False
    while not finished:
        generator = torch.Generator().manual_seed(1000 * state.step + hvd.rank())
        inputs = torch.randn(16, 20, generator=generator)
        optimizer.zero_grad()
        ((state.model(inputs)[:, 0] - inputs @ target) ** 2).mean().backward()
        optimizer.step()
        ended = rounds.step()
        state.step += 1
        if ended:
            tensors = [*state.model.parameters(), *state.model.buffers()]
            weights = zlib.crc32(b"".join(t.detach().numpy().tobytes() for t in tensors))
            told = {"world": world, "step": state.step, "size": hvd.size(), "weights": weights}
            say("step", rank=hvd.rank(), **told)
        time.sleep(0.03)
        finish = torch.tensor(float(order() == "finish"))
        finished = bool(hvd.allreduce(finish, name="finish") > 0)
        if state.step % 3 == 0:  # in the middle of a round, too
            state.commit()


if __name__ == "__main__":
    main()
