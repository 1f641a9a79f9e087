"""What stands around the selection: momentum, clipping, dense steps and warm-up, strategies."""

import re

import horovod.torch as hvd
import numpy as np
import pytest
import torch
from torch import nn

from hvd_dls.core.selection import threads
from hvd_dls.errors import DLSError
from hvd_dls.torch import DLSCompressor
from tests.torch.with_ranks.training import (
    SPARSE,
    assert_same_on_all_ranks,
    batch,
    flat,
    linear_loss,
    net,
    train,
    whole_numbers,
    wrap,
)

MOMENTUM = [{"momentum": 0.5}, {"momentum": 0.5, "nesterov": True}]


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.0625, **options)


@pytest.mark.parametrize("options", MOMENTUM, ids=str)
def test_momentum_at_density_one_is_the_optimizer_s_momentum(options):
    """Without masking; also of the layers that go dense, before and behind dense steps."""
    models = [net(), net()]
    models[1].load_state_dict(models[0].state_dict())
    plain = wrap(models[0], hvd.Compression.none, sgd(models[0], **options))
    compression = DLSCompressor(
        models[1].named_parameters(),
        density=1.0,
        momentum_masking=False,
        dense_steps=2,
        **options,
        **SPARSE,
    )
    corrected = wrap(models[1], compression, sgd(models[1]))
    train(models[0], plain, range(6))
    train(models[1], corrected, range(6))
    assert compression.last_step().step == 6
    assert torch.allclose(flat(models[0]), flat(models[1]), rtol=1e-4, atol=1e-5)
    assert_same_on_all_ranks(flat(models[1]))


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9, "warmup_steps": 4, "dense_steps": 1},
        {"clip_norm": 0.1, "clip_value": 0.01},
        {"clip_global_norm": 0.1, "momentum": 0.9},
        {"adam": (0.5, 0.999), "warmup_steps": 4, "dense_steps": 1},
        {"adam": (0.5, 0.999), "exchange": "sparse_allreduce"},
        {"strategy": "global"},
        {"strategy": "norm"},
        {"strategy": "hard", "threshold": 1e-3},
        {"layer_density": {"0.*": 0.5, "6.*": "dense"}},
        {"prior": "measured"},
        {"prior": "weight_norm", "values": "bfloat16"},
    ],
    ids=str,
)
def test_ranks_agree_and_learn(options):
    torch.manual_seed(0)
    model = net()
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    compression = DLSCompressor(model.named_parameters(), **{"density": 0.1} | SPARSE | options)
    optimizer = wrap(model, compression, sgd(model))
    before = flat(model)
    train(model, optimizer, range(8))
    assert compression.last_step().step == 8
    assert_same_on_all_ranks(flat(model))
    assert not torch.equal(before, flat(model))
    assert flat(model).isfinite().all()


@pytest.mark.parametrize("dense_steps", [0, 3])
def test_each_rank_clips_the_norm_of_its_whole_gradient(dense_steps):
    """At density 1 exactly as with clip_grad_norm_ before the exchange, if shares stay the same."""
    model, limit = nn.Linear(40, 30), 3000.0
    compression = DLSCompressor(
        model.named_parameters(),
        density=1.0,
        clip_global_norm=limit,
        dense_steps=dense_steps,
        **SPARSE,
    )
    optimizer = wrap(model, compression, torch.optim.SGD(model.parameters(), lr=1.0))
    shapes = [parameter.shape for parameter in model.parameters()]
    for step in range(6):
        before = flat(model)
        optimizer.zero_grad()
        each = [
            torch.cat([2.0**step * whole_numbers(s, 0, rank).flatten() for s in shapes])
            for rank in range(hvd.size())
        ]  # from one third of the limit to ten times as much
        split = each[hvd.rank()].split([s.numel() for s in shapes])
        for parameter, gradient in zip(model.parameters(), split, strict=True):
            linear_loss(parameter, gradient.view(parameter.shape)).backward()
        optimizer.step()
        left = [g * min(1, limit / g.norm().item()) for g in each]
        torch.testing.assert_close(
            before - flat(model), sum(left).double() / hvd.size(), rtol=1e-4, atol=1e-2
        )
    assert compression.last_step().step == 6
    assert_same_on_all_ranks(flat(model))


def test_by_hand_a_rank_s_own_gradient_can_be_clipped_exactly():
    """With a pass more than there are, gradients stay here until step(): see docs/tuning.md."""
    model = net()
    compression = DLSCompressor(model.named_parameters(), density=1.0, **SPARSE)
    optimizer = wrap(
        model,
        compression,
        torch.optim.SGD(model.parameters(), lr=1.0),
        backward_passes_per_step=2,
    )
    for step in range(3):
        before = flat(model)
        optimizer.zero_grad()
        images, labels = batch(step)
        (10 * nn.functional.cross_entropy(model(images), labels)).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert norm > 0.1
        own = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        optimizer.step()
        mean = hvd.allreduce(own, name="own")
        torch.testing.assert_close(before - flat(model), mean.double(), rtol=0, atol=1e-6)


def test_dense_steps_send_whole_gradients():
    model = nn.Linear(40, 30, bias=False)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    compression = DLSCompressor(model.named_parameters(), density=0.1, dense_steps=2, **SPARSE)
    optimizer = wrap(model, compression, torch.optim.SGD(model.parameters(), lr=1.0))
    for step in range(4):
        before = model.weight.detach().clone()
        optimizer.zero_grad()
        linear_loss(model.weight, whole_numbers((30, 40), step)).backward()
        optimizer.step()
        of_all = [whole_numbers((30, 40), step, rank) for rank in range(hvd.size())]
        whole = torch.equal(model.weight, before - sum(of_all) / hvd.size())
        assert whole == (step < 2)
        record = compression.last_step()
        assert record.step == step + 1
        assert (record.sparse_bytes == 0) == (step < 2)
    assert record.k.sum() == 120


def test_warmup_lowers_the_density_in_stairs():
    model = nn.Linear(40, 30, bias=False)
    compression = DLSCompressor(
        model.named_parameters(), density=0.01, warmup_steps=10, dense_steps=1, **SPARSE
    )
    optimizer = wrap(model, compression, sgd(model))
    sent = []
    for step in range(13):
        optimizer.zero_grad()
        linear_loss(model.weight, whole_numbers((30, 40), step)).backward()
        optimizer.step()
        sent.append(int(compression.last_step().k.sum()))
    stairs = [300, 150, 75, 38, 19]
    assert sent == [1200, *np.repeat(stairs, 2).tolist(), 12, 12]


# NaN and Inf ------------------------------------------------------------------------------------


def poisoned(model, optimizer, step, where, value=float("nan")):
    """A step with one bad entry in one gradient of the last rank."""
    optimizer.zero_grad()
    loss = 0
    for name, parameter in model.named_parameters():
        gradient = whole_numbers(parameter.shape, step)
        if name == where and hvd.rank() == hvd.size() - 1:
            gradient.view(-1)[0] = value
        loss = loss + linear_loss(parameter, gradient)
    loss.backward()
    optimizer.step()


def everything(model, optimizer, compression):
    """All state there is, as bytes."""
    state = compression.state_dict()["models"][0]
    parts = [flat(model), *state["residuals"].values(), *state["velocities"].values()]
    parts += [s["momentum_buffer"] for s in optimizer.state.values() if "momentum_buffer" in s]
    return b"".join(part.numpy().tobytes() for part in parts) + repr(state["ratios"]).encode()


@pytest.mark.parametrize("where", ["0.weight", "0.bias", "1.weight", "8.weight", "8.bias"])
@pytest.mark.parametrize("own", [0.0, 0.9], ids=["optimizer's momentum", "our momentum"])
def test_a_skipped_step_changes_nothing_at_all(where, own):
    model = net()
    compression = DLSCompressor(
        model.named_parameters(), density=0.1, nonfinite="skip", momentum=own, **SPARSE
    )
    inner = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0 if own else 0.9, weight_decay=1)
    optimizer = wrap(model, compression, inner)
    poisoned(model, optimizer, 0, "")
    before = everything(model, optimizer, compression)
    poisoned(model, optimizer, 1, where)
    assert everything(model, optimizer, compression) == before
    poisoned(model, optimizer, 2, where, float("inf"))
    assert everything(model, optimizer, compression) == before
    poisoned(model, optimizer, 3, "")
    assert everything(model, optimizer, compression) != before
    assert compression.last_step().step == 2
    assert compression.skipped_steps() == 2
    assert flat(model).isfinite().all()
    assert_same_on_all_ranks(flat(model))


def test_a_skipped_step_by_hand():
    """synchronize() and clipping by hand, as with dense training."""
    model = net()
    compression = DLSCompressor(model.named_parameters(), density=0.1, nonfinite="skip", **SPARSE)
    optimizer = wrap(model, compression)
    before = flat(model)
    images, labels = batch(0)
    nn.functional.cross_entropy(model(images * float("inf")), labels).backward()
    optimizer.synchronize()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with optimizer.skip_synchronize():
        optimizer.step()
    assert torch.equal(flat(model), before)
    train(model, optimizer, range(2))
    assert flat(model).isfinite().all()


@pytest.mark.parametrize("where", ["0.weight", "1.bias"])
def test_by_default_every_rank_raises_naming_layer_and_rank(where):
    model = net()
    compression = DLSCompressor(model.named_parameters(), density=0.1, **SPARSE)
    optimizer = wrap(model, compression)
    poisoned(model, optimizer, 0, "")
    with pytest.raises(ArithmeticError, match=f"layer '{where}' on rank {hvd.size() - 1};"):
        poisoned(model, optimizer, 1, where)


# Loss scaling -----------------------------------------------------------------------------------


def grad_scaler(**options):
    if not hasattr(torch.amp, "GradScaler"):
        pytest.skip("torch.amp.GradScaler, for the CPU too, came with torch 2.3")
    return torch.amp.GradScaler("cpu", **options)


def scaled_training(model, optimizer, scaler=None, overflow_at=()):
    """The recipe of Horovod's documentation for mixed precision; or without scaling."""
    scales = []
    for step in range(12):
        optimizer.zero_grad()
        images, labels = batch(step)
        if step in overflow_at and hvd.rank() == 0:
            images = images * float("inf")
        loss = nn.functional.cross_entropy(model(images), labels)
        if scaler is None:
            loss.backward()
            optimizer.step()
            continue
        scaler.scale(loss).backward()
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


@pytest.mark.parametrize("own", [{}, {"momentum": 0.5}, {"adam": (0.5, 0.999)}], ids=str)
def test_grad_scaler_gives_the_same_as_no_scaling(own):
    """With growing scales, to the bit; an overflow on one rank is skipped by all."""
    options = {"density": 0.1, **SPARSE, **own}
    models = [nn.Sequential(nn.Flatten(), nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 5))]
    hvd.broadcast_parameters(models[0].state_dict(), root_rank=0)
    models.append(nn.Sequential(nn.Flatten(), nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 5)))
    models[1].load_state_dict(models[0].state_dict())
    plain = DLSCompressor(models[0].named_parameters(), nonfinite="skip", **options)
    optimizer = wrap(models[0], plain, sgd(models[0]))
    scaled_training(models[0], optimizer, overflow_at=[5])

    scaler = grad_scaler(init_scale=1024.0, growth_interval=2)
    followed = DLSCompressor(models[1].named_parameters(), loss_scale=scaler.get_scale, **options)
    optimizer = wrap(models[1], followed, sgd(models[1]))
    scales = scaled_training(models[1], optimizer, scaler, overflow_at=[5])
    assert scales[4] > scales[5] < scales[11]  # halved by the overflow, then grown again
    assert followed.last_step().step == 11
    assert torch.allclose(flat(models[0]), flat(models[1]), rtol=1e-5, atol=1e-7)
    assert_same_on_all_ranks(flat(models[1]))


@pytest.mark.parametrize(
    ("make", "instead"),
    [
        (lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9), "momentum=0"),
        (torch.optim.Adam, "betas=(0.0, 0.999)"),
    ],
    ids=["SGD", "Adam"],
)
def test_momentum_in_both_is_refused(make, instead):
    model = net()
    compression = DLSCompressor(model.named_parameters(), momentum=0.9, **SPARSE)
    optimizer = wrap(model, compression, make(model.parameters()))
    with pytest.raises(DLSError, match=re.escape(f"make it with {instead}")):
        train(model, optimizer, [0])


def test_adam_without_a_first_moment_takes_the_compressor_s():
    model = net()
    compression = DLSCompressor(model.named_parameters(), density=0.1, momentum=0.9, **SPARSE)
    adam = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.0, 0.999))
    before = flat(model)
    train(model, wrap(model, compression, adam), range(3))
    assert compression.last_step().step == 3
    assert flat(model).isfinite().all()
    assert not torch.equal(flat(model), before)
    assert_same_on_all_ranks(flat(model))


def test_several_threads_give_the_same_bits(monkeypatch):
    monkeypatch.setattr(threads, "_LEAST", 1 << 19)
    trained = []
    for count in (1, 2):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 22_000, bias=False), nn.Linear(22_000, 5))
        compression = DLSCompressor(model.named_parameters(), density=0.01, threads=count, **SPARSE)
        optimizer = wrap(model, compression)
        train(model, optimizer, range(3))
        assert threads._count == count
        assert threads.of_use(48 * 22_000) == (count == 2)
        trained.append(flat(model))
        assert_same_on_all_ranks(trained[-1])
    threads.use(1)
    assert torch.equal(*trained)
