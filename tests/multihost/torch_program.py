"""Run on every rank: trains, adds up gradients that are known, and reports what it found."""

import time

import horovod.torch as hvd
import torch
from torch import nn

from hvd_dls.torch import DLSCompressor
from tests.multihost.report import digest, identity, now, report, since
from tests.torch.with_ranks.training import (
    SPARSE,
    flat,
    linear_loss,
    net,
    net_without_vectors,
    train,
    whole_numbers,
    wrap,
)

STEPS = 5
SHAPES = {"hidden": (700, 400), "conv": (64, 64, 3, 3), "bias": (4000,)}


def learn(make):
    """What the parameters and ratios of a model are after some steps."""
    torch.manual_seed(1)
    model = make()
    before = digest(flat(model).numpy())
    compressor = DLSCompressor(model.named_parameters(), density=0.05, **SPARSE)
    train(model, wrap(model, compressor), range(10))
    after = digest(flat(model).numpy())
    return {"before": before, "after": after, "k": compressor.last_step().k.tolist()}


def add_up():
    """Checks that nothing is lost; what that took, and what the compressor says it sent."""
    model = nn.ParameterDict({n: nn.Parameter(torch.zeros(s)) for n, s in SHAPES.items()})
    compressor = DLSCompressor(model.named_parameters(), density=0.1)
    optimizer = wrap(model, compressor, torch.optim.SGD(model.parameters(), lr=1), op=hvd.Sum)
    received = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    said = {"sparse": 0, "dense": 0}
    hvd.barrier()
    start = now()
    for step in range(STEPS):
        optimizer.zero_grad()
        sum(linear_loss(p, whole_numbers(p.shape, step)) for p in model.values()).backward()
        optimizer.synchronize()
        for name, parameter in model.items():
            received[name] += parameter.grad
        with optimizer.skip_synchronize():
            optimizer.step()
        said["sparse"] += compressor.last_step().sparse_bytes
        said["dense"] += compressor.last_step().dense_bytes
    hvd.barrier()
    took = since(start)
    (state,) = compressor.state_dict()["models"]
    assert set(state["residuals"]) == {"hidden", "conv"}
    for name, shape in SHAPES.items():
        accumulated = sum(
            whole_numbers(shape, step, rank) for step in range(STEPS) for rank in range(hvd.size())
        )
        kept = torch.zeros(shape)
        if name in state["residuals"]:
            mine = state["residuals"][name].reshape(shape)
            kept = hvd.allreduce(mine, op=hvd.Sum, name=f"kept.{name}")
            assert kept.abs().sum() > 0
        assert torch.equal(received[name] + kept, accumulated)
    return {"took": took, "said": said, "k": compressor.last_step().k.tolist()}


hvd.init()
begun = time.monotonic()
report(
    identity(hvd),
    with_vectors=learn(net),
    without_vectors=learn(net_without_vectors),
    traffic=add_up(),
    seconds=time.monotonic() - begun,
)
hvd.shutdown()
