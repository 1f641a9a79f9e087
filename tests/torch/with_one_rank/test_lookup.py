"""Finding out whose a gradient is costs the same for every layer, however many there are."""

import cProfile
import os
import pstats

import horovod.torch as hvd
import pytest
import torch
from torch import nn

from hvd_dls.torch import DLSCompressor

pytestmark = pytest.mark.skipif(
    os.environ.get("HOROVOD_ELASTIC") != "1",
    reason="with one process, Horovod gives gradients to a compressor under HOROVOD_ELASTIC=1 only",
)


def calls_of_a_step(compression, layers: int, groups: int | None) -> int:
    """Python's calls in one step of the second of two models of equal layers."""
    models = []
    for _ in range(2):
        model = nn.ParameterList([torch.zeros(3, 2) for _ in range(layers)])
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            named_parameters=model.named_parameters(),
            compression=compression,
            groups=groups,
        )
        models.append(model)  # both live
        for step in range(3):
            profile = cProfile.Profile()
            optimizer.zero_grad()
            loss = sum(parameter.sum() for parameter in model)
            if step == 2:
                profile.enable()
            loss.backward()
            optimizer.step()
            profile.disable()
    return pstats.Stats(profile).total_calls


def our_calls(layers: int, groups: int | None) -> int:
    """Besides Horovod's own, of which some grow faster where there are groups."""
    ours = calls_of_a_step(DLSCompressor(density=0.1), layers, groups)
    return ours - calls_of_a_step(hvd.Compression.none, layers, groups)


@pytest.mark.parametrize("groups", [None, 2])
def test_calls_in_a_step_grow_as_the_number_of_layers(groups):
    few, many = our_calls(30, groups), our_calls(300, groups)
    assert few > 0
    assert many < 11 * few
