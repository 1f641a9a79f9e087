"""Copies of a compressor: of its options only, or refused."""

import copy
import pickle

import horovod.torch as hvd
import pytest
import torch
from torch import nn

from hvd_dls import DLSError
from hvd_dls.torch import DLSCompressor

COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda value: pickle.loads(pickle.dumps(value))}
pytestmark = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)


def trained():
    model = nn.Linear(40, 30)
    compression = DLSCompressor(momentum=0.5)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        named_parameters=model.named_parameters(),
        compression=compression,
    )
    model(torch.ones(2, 40)).sum().backward()
    optimizer.step()
    return model, compression


def test_options_travel(copied):
    compression = DLSCompressor(density=0.5, min_k=2, layer_density={"a.*": "dense"})
    assert copied(compression).config == compression.config
    assert copied(DLSCompressor) is DLSCompressor


def named():
    return DLSCompressor(nn.Linear(3, 3).named_parameters())


def in_a_process_set():
    return DLSCompressor(process_set=hvd.global_process_set)


def loaded():
    _, compression = trained()
    again = DLSCompressor(momentum=0.5)
    again.load_state_dict(compression.state_dict())
    return again


def with_loss_scale():
    return DLSCompressor(loss_scale=lambda: 1.0)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (named, "named_parameters"),
        (in_a_process_set, "process_set"),
        (loaded, "state"),
        (with_loss_scale, "loss_scale"),
    ],
)
def test_what_would_be_lost_is_refused_with_what_to_do(copied, make, what):
    with pytest.raises(DLSError, match=what) as error:
        copied(make())
    assert "make it" in str(error.value)


def test_what_has_trained_is_refused_with_what_to_do(copied):
    _model, compression = trained()
    with pytest.raises(DLSError, match="state_dict"):
        copied(compression)
