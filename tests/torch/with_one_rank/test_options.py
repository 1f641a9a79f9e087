"""One process trains as several do: every option holds.

With HOROVOD_ELASTIC=1 Horovod gives gradients to a compressor also where there is one process only.
"""

import copy

import horovod.torch as hvd
import pytest
import torch
from torch import nn

from hvd_dls import DLSError, NonFiniteGradientError
from hvd_dls.torch import DLSCompressor, join

LR = 0.05


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(20, 60), nn.ReLU(), nn.Linear(60, 5))


def wrap(model, compression, inner=None, **options):
    return hvd.DistributedOptimizer(
        inner or torch.optim.SGD(model.parameters(), lr=LR),
        named_parameters=model.named_parameters(),
        compression=compression,
        **options,
    )


def backward(model, step, factor=1.0):
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(8, 20, generator=generator)
    labels = torch.randint(0, 5, (8,), generator=generator)
    (factor * nn.functional.cross_entropy(model(inputs), labels)).backward()


def by_step(optimizer):
    optimizer.step()


def by_hand(optimizer):
    optimizer.synchronize()
    with optimizer.skip_synchronize():
        optimizer.step()


EACH_WAY = pytest.mark.parametrize("update", [by_step, by_hand])


def train(model, optimizer, steps, update=by_step, factor=1.0):
    for step in steps:
        optimizer.zero_grad()
        backward(model, step, factor)
        update(optimizer)


def flat(model):
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])


# Momentum -----------------------------------------------------------------------------------------


@EACH_WAY
@pytest.mark.parametrize("named", [True, False], ids=["named", "bare"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_is_the_optimizer_s(nesterov, named, update):
    plain, ours = net(), net()
    sgd = torch.optim.SGD(plain.parameters(), lr=LR, momentum=0.9, nesterov=nesterov)
    train(plain, wrap(plain, hvd.Compression.none, sgd), range(8), update)
    given = ours.named_parameters() if named else None
    compression = DLSCompressor(given, momentum=0.9, nesterov=nesterov, momentum_masking=False)
    train(ours, wrap(ours, compression), range(8), update)
    torch.testing.assert_close(flat(ours), flat(plain), rtol=1e-5, atol=1e-6)


@EACH_WAY
@pytest.mark.parametrize("named", [True, False], ids=["named", "bare"])
def test_adam_is_adamw(named, update):
    """Plain SGD behind it has a decoupled weight decay, and a learning rate that may change."""
    plain, ours, betas = net(), net(), (0.5, 0.99)
    adamw = torch.optim.AdamW(plain.parameters(), 0.003, betas, weight_decay=0.1)
    train(plain, wrap(plain, hvd.Compression.none, adamw), range(8), update)
    given = ours.named_parameters() if named else None
    sgd = torch.optim.SGD(ours.parameters(), 0.003, weight_decay=0.1)
    train(ours, wrap(ours, DLSCompressor(given, adam=betas), sgd), range(8), update)
    torch.testing.assert_close(flat(ours), flat(plain), rtol=1e-4, atol=1e-5)


def test_sparse_gradients_are_adam_s_too_if_they_are_to_be_dense():
    trained = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(20, 8, sparse=sparse), nn.Linear(8, 2))
        sgd = torch.optim.SGD(model.parameters(), lr=0.01)
        compression = DLSCompressor(adam=(0.5, 0.999))
        optimizer = wrap(model, compression, sgd, sparse_as_dense=sparse)
        for step in range(4):
            optimizer.zero_grad()
            model(torch.arange(5) + step).square().sum().backward()
            optimizer.step()
        trained.append(flat(model))
    torch.testing.assert_close(*trained)


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.SGD])
def test_momentum_in_both_is_refused_as_on_several(make):
    model = net()
    options = {"momentum": 0.9} if make is torch.optim.SGD else {}
    inner = make(model.parameters(), lr=LR, **options)
    optimizer = wrap(model, DLSCompressor(momentum=0.9), inner)
    with pytest.raises(DLSError, match="make it with"):
        train(model, optimizer, [0])


def test_several_backward_passes_make_one_step():
    trained = []
    for passes in (1, 2):
        model = net()
        compression = DLSCompressor(momentum=0.9, momentum_masking=False)
        optimizer = wrap(model, compression, backward_passes_per_step=passes)
        for step in range(4):
            optimizer.zero_grad()
            for _ in range(passes):
                backward(model, step, 1 / passes)
            optimizer.step()
        trained.append(flat(model))
    torch.testing.assert_close(*trained, rtol=1e-5, atol=1e-6)


def test_momentum_is_saved_and_goes_on():
    model = net()
    compression = DLSCompressor(momentum=0.9)
    optimizer = wrap(model, compression)
    train(model, optimizer, range(3))
    state = copy.deepcopy([x.state_dict() for x in (model, optimizer, compression)])
    train(model, optimizer, range(3, 6))
    again, compression = net(), DLSCompressor(momentum=0.9)
    optimizer = wrap(again, compression)
    for part, saved in zip((again, optimizer, compression), state, strict=True):
        part.load_state_dict(saved)
    train(again, optimizer, range(3, 6))
    assert torch.equal(flat(again), flat(model))


# Clipping -----------------------------------------------------------------------------------------


def clipped(model, options):
    """What the options say, of every layer by itself."""
    for parameter in model.parameters():
        if "clip_value" in options:
            parameter.grad.clamp_(-options["clip_value"], options["clip_value"])
        if "clip_norm" in options:
            parameter.grad *= min(1, options["clip_norm"] / parameter.grad.norm().item())


@EACH_WAY
@pytest.mark.parametrize(
    "options",
    [{"clip_norm": 0.05}, {"clip_value": 0.01}, {"clip_norm": 0.05, "clip_value": 0.01}],
    ids=str,
)
def test_clipping_is_of_every_layer_s_own_gradient(options, update):
    plain, ours = net(), net()
    inner = torch.optim.SGD(plain.parameters(), lr=LR)
    for step in range(5):
        inner.zero_grad()
        backward(plain, step)
        clipped(plain, options)
        inner.step()
    train(ours, wrap(ours, DLSCompressor(**options)), range(5), update)
    torch.testing.assert_close(flat(ours), flat(plain), rtol=1e-5, atol=1e-7)


@EACH_WAY
def test_of_one_layer_clip_global_norm_is_clip_grad_norm(update):
    plain, ours = (nn.Linear(40, 30, bias=False) for _ in range(2))
    ours.load_state_dict(plain.state_dict())
    inner, rng = torch.optim.SGD(plain.parameters(), lr=LR), torch.Generator().manual_seed(0)
    optimizer = wrap(ours, DLSCompressor(clip_global_norm=0.5))
    for step in range(5):
        inputs = 10 ** (step - 2) * torch.randn(8, 40, generator=rng)  # some are longer
        for model, own in ((plain, inner), (ours, optimizer)):
            own.zero_grad()
            model(inputs).square().mean().backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        inner.step()
        update(optimizer)
    torch.testing.assert_close(flat(ours), flat(plain), rtol=1e-4, atol=1e-6)


# NaN and Inf --------------------------------------------------------------------------------------


@EACH_WAY
@pytest.mark.parametrize("use", ["class", "instance", "momentum"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [0, 2], ids=["first step", "third step"])
def test_nan_and_inf_raise_and_training_goes_on(step, value, use, update):
    momentum = {"momentum": 0.5} if use == "momentum" else {}
    model, compression = net(), DLSCompressor if use == "class" else DLSCompressor(**momentum)
    optimizer = wrap(model, compression)
    train(model, optimizer, range(step), update)
    before = flat(model)
    model[0].weight.register_hook(lambda gradient: gradient * value)
    with pytest.raises(NonFiniteGradientError, match=r"'0\.weight'"):
        train(model, optimizer, [step], update)
    assert torch.equal(flat(model), before)
    model[0].weight._backward_hooks.clear()
    train(model, optimizer, [step], update)
    assert flat(model).isfinite().all()
    assert not torch.equal(flat(model), before)


@EACH_WAY
@pytest.mark.parametrize("own", [0.0, 0.9], ids=["optimizer's momentum", "our momentum"])
def test_a_skipped_step_changes_nothing(own, update):
    trained = []
    for bad in (False, True):
        model = net()
        inner = torch.optim.SGD(
            model.parameters(), lr=LR, momentum=0 if own else 0.9, weight_decay=0 if own else 0.1
        )
        compression = DLSCompressor(nonfinite="skip", momentum=own)
        optimizer = wrap(model, compression, inner)
        train(model, optimizer, range(2), update)
        if bad:
            before = flat(model)
            hook = model[0].weight.register_hook(lambda gradient: gradient * float("inf"))
            train(model, optimizer, [7], update)
            hook.remove()
            assert torch.equal(flat(model), before)
        assert compression.skipped_steps() == bad
        train(model, optimizer, range(2, 4), update)
        trained.append(flat(model))
    assert torch.equal(*trained)


# What says nothing here ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"dense_steps": 2, "warmup_steps": 3}, {"strategy": "norm"}, {"prior": "measured"}],
    ids=str,
)
def test_without_such_options_training_is_that_without_compression(options):
    plain, ours = net(), net()
    train(plain, wrap(plain, hvd.Compression.none), range(4))
    train(ours, wrap(ours, DLSCompressor(density=0.1, **options)), range(4))
    assert torch.equal(flat(plain), flat(ours))


def test_join_does_nothing():
    model = net()
    optimizer = wrap(model, DLSCompressor())
    with join(optimizer) as joined:
        backward(model, 0)
        optimizer.step()
    assert (joined.extra_steps, joined.last_rank) == (0, -1)
