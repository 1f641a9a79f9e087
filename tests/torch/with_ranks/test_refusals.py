"""What cannot work ends in the same clear error on every rank, never in a hang."""

import horovod.torch as hvd
import pytest
import torch
from torch import nn

from hvd_dls import DLSError, NonFiniteGradientError
from hvd_dls.torch import DLSCompressor
from tests.torch.with_ranks.training import (
    SPARSE,
    flat,
    linear_loss,
    net,
    train,
    whole_numbers,
    wrap,
)


@pytest.fixture(autouse=True)
def all_ranks_get_here():
    yield
    hvd.allreduce(torch.zeros(1), name="test.ended")


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_raises_the_same_error_on_every_rank(poison):
    model = nn.ParameterList([nn.Parameter(torch.zeros(20, 30)) for _ in range(3)])
    compression = DLSCompressor(model.named_parameters(), density=0.05, **SPARSE)
    optimizer = wrap(model, compression, torch.optim.SGD(model.parameters(), lr=1))

    def backward(step, poisoned):
        gradients = [whole_numbers(p.shape, step) for p in model]
        if poisoned and hvd.rank() == 1:
            gradients[0][3, 4] = gradients[2][0, 0] = poison
        sum(linear_loss(p, g) for p, g in zip(model, gradients, strict=True)).backward()

    backward(0, poisoned=False)
    optimizer.step()
    weights = flat(model)
    before = {n: r.clone() for n, r in compression.state_dict()["models"][0]["residuals"].items()}
    optimizer.zero_grad()
    backward(1, poisoned=True)
    with pytest.raises(NonFiniteGradientError) as error:
        optimizer.step()
    assert error.value.where == [("0", 1), ("2", 1)]
    assert "'0' on rank 1" in str(error.value)
    assert torch.equal(flat(model), weights)
    for name, now in compression.state_dict()["models"][0]["residuals"].items():
        assert torch.equal(now, before[name])  # the step did not take place


def test_ranks_with_other_options_are_named():
    model = net()
    density = 0.05 if hvd.rank() == 0 else 0.06
    compression = DLSCompressor(model.named_parameters(), density=density, **SPARSE)
    with pytest.raises(DLSError, match=r"rank 1 has option density: 0\.06, rank 0: 0\.05"):
        train(model, wrap(model, compression), range(1))


def test_a_density_too_low_for_the_model_says_what_would_do():
    model = net()
    compression = DLSCompressor(density=1e-4, **SPARSE)
    optimizer = wrap(model, compression)
    with pytest.raises(DLSError, match=r"density=0\.0001 gives .*raise density to at least"):
        train(model, optimizer, range(1))


@pytest.mark.parametrize("explicit", [False, True])
def test_adasum_is_refused(explicit):
    model = net()
    compression = DLSCompressor(model.named_parameters()) if explicit else DLSCompressor
    optimizer = wrap(model, compression, op=hvd.Adasum)
    with pytest.raises(DLSError, match="Adasum"):
        train(model, optimizer, range(1))


@pytest.mark.parametrize("how", ["added", "unfrozen"])
def test_parameters_that_horovod_does_not_reduce_are_refused(how):
    """Horovod reduces only what needed a gradient when it wrapped the optimizer."""
    model = net()
    model[3].weight.requires_grad_(how == "added")
    optimizer = wrap(model, DLSCompressor(density=0.05, **SPARSE))
    train(model, optimizer, range(3))
    if how == "added":
        late = nn.Parameter(torch.zeros(3))
        optimizer.add_param_group({"params": [late], "lr": 0.1})
        late.grad = torch.ones(3)
        wanted = r"'without a name' of shape \(3,\)"
    else:
        model[3].weight.requires_grad_(True)
        wanted = "'3.weight'"
    optimizer.zero_grad()
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    if how == "added":
        late.grad = torch.ones(3)
    with pytest.raises(DLSError, match=f"{wanted}.*added or unfrozen after"):
        optimizer.step()
    optimizer.synchronize()  # what backward had started
