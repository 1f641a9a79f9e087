"""A small training with hvd.elastic; what a test orders ends it.

Arguments: options of DLSCompressor in JSON, or "dense"; "given" if the state is given the
compressor.
"""

import json
import sys
import zlib

import horovod.torch as hvd
import torch

from tests.elastic.worker import die_if, order, say

OPTIONS = json.loads(sys.argv[1])
GIVEN = "given" in sys.argv[2:]
COMMIT = 3  # steps from one commit to the next


def main() -> None:
    hvd.init()
    torch.manual_seed(hvd.rank())
    model = torch.nn.Sequential(
        torch.nn.Linear(20, 50), torch.nn.Tanh(), torch.nn.Linear(50, 30), torch.nn.Linear(30, 1)
    )
    model[0].weight.register_hook(lambda gradient: die_if("die in backward"))
    compression = hvd.Compression.none
    if OPTIONS != "dense":
        from hvd_dls.torch import DLSCompressor

        compression = DLSCompressor(**OPTIONS) if OPTIONS else DLSCompressor
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.02),
        named_parameters=model.named_parameters(),
        compression=compression,
    )
    more = {"compression": compression} if GIVEN else {}
    state = hvd.elastic.TorchState(model=model, optimizer=optimizer, step=0, **more)
    say("start", rank=hvd.rank(), size=hvd.size())
    state.register_reset_callbacks([lambda: say("reset", rank=hvd.rank(), size=hvd.size())])
    train(state)
    say("end", rank=hvd.rank())


@hvd.elastic.run
def train(state) -> None:
    target = torch.linspace(-1, 1, 20)
    finish = False
    while not finish:
        generator = torch.Generator().manual_seed(1000 * state.step + hvd.rank())
        x = torch.randn(16, 20, generator=generator)
        state.optimizer.zero_grad()
        loss = ((state.model(x)[:, 0] - torch.sin(x @ target)) ** 2).mean()
        loss.backward()
        state.optimizer.step()
        state.step += 1
        say("step", **report(state, loss.item()))
        wish = torch.tensor(1.0 if order() == "finish" else 0.0)
        finish = bool(hvd.allreduce(wish, name="finish") > 0)
        if state.step % COMMIT == 0:
            state.commit()


def report(state, loss: float) -> dict[str, object]:
    weights = b"".join(p.detach().numpy().tobytes() for p in state.model.parameters())
    return {
        "step": state.step,
        "rank": hvd.rank(),
        "size": hvd.size(),
        "loss": loss,
        "weights": zlib.crc32(weights),
    }


main()
