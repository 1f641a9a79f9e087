"""Gradients that are changed or used while they are on their way: refused, not trained wrongly.

Scripts without Horovod clip and unscale right behind ``backward()``.  With plain Horovod that is a
race, which is mostly won where networks are fast, so nobody notices.
"""

import horovod.torch as hvd
import pytest
import torch
from torch import nn

from hvd_dls import DLSError
from hvd_dls.torch import DLSCompressor
from tests.torch.with_ranks.training import (
    SPARSE,
    assert_same_on_all_ranks,
    batch,
    flat,
    net,
    net_without_vectors,
    train,
    wrap,
)


def backward(model, step, scaler=None):
    images, labels = batch(step)
    loss = nn.functional.cross_entropy(model(images), labels)
    (loss if scaler is None else scaler.scale(loss)).backward()


def clip(model, optimizer):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()


def clip_one_bias(model, optimizer):
    model[6].bias.grad.mul_(0.5)  # a layer that goes dense
    optimizer.step()


def replace(model, optimizer):
    for parameter in model.parameters():
        parameter.grad = parameter.grad.clamp(-0.01, 0.01)
    optimizer.step()


def clip_and_synchronize(model, optimizer):
    torch.nn.utils.clip_grad_value_(model.parameters(), 0.01)
    optimizer.synchronize()


def take_away(model, optimizer):
    model.zero_grad()
    optimizer.step()


@pytest.mark.parametrize("dense_steps", [0, 9], ids=["sparse", "dense"])
@pytest.mark.parametrize("change", [clip, clip_one_bias, replace, clip_and_synchronize, take_away])
def test_gradients_that_are_changed_on_their_way_are_refused(change, dense_steps):
    torch.manual_seed(0)
    model = net()
    compression = DLSCompressor(density=0.05, dense_steps=dense_steps, **SPARSE)
    optimizer = wrap(model, compression)
    train(model, optimizer, range(2))
    weights = flat(model)
    state = compression.state_dict()["models"][0]
    before = {name: residual.clone() for name, residual in state["residuals"].items()}
    optimizer.zero_grad()
    backward(model, 2)
    with pytest.raises(DLSError, match=r"was changed between backward.*optimizer\.synchronize"):
        change(model, optimizer)
    assert torch.equal(flat(model), weights)
    for name, now in compression.state_dict()["models"][0]["residuals"].items():
        assert torch.equal(now, before[name])  # the step did not take place
    train(model, optimizer, range(3, 5))
    assert not torch.equal(flat(model), weights)
    assert_same_on_all_ranks(flat(model), "changed")


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_scaler_that_does_not_wait_is_refused(scheduled):
    if not hasattr(torch.amp, "GradScaler"):
        pytest.skip("torch.amp.GradScaler, for the CPU too, came with torch 2.3")
    model, scaler = net(), torch.amp.GradScaler("cpu")
    compression = DLSCompressor(loss_scale=scaler.get_scale, density=0.05, **SPARSE)
    optimizer = wrap(model, compression)
    if scheduled:  # which puts a wrapper around step
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    backward(model, 0, scaler)
    weights = flat(model)
    with pytest.raises(DLSError, match=r"then scaler\.unscale_"):
        scaler.step(optimizer)
    assert torch.equal(flat(model), weights)
    compression.abandon_step()


def test_unscaling_too_early_is_refused():
    if not hasattr(torch.amp, "GradScaler"):
        pytest.skip("torch.amp.GradScaler, for the CPU too, came with torch 2.3")
    model, scaler = net(), torch.amp.GradScaler("cpu")
    optimizer = wrap(model, DLSCompressor(loss_scale=scaler.get_scale, density=0.05, **SPARSE))
    weights = flat(model)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step, scaler)
        if step == 1:
            scaler.unscale_(optimizer)
            with pytest.raises(DLSError, match=r"unscale_\(optimizer\) before optimizer\.sync"):
                optimizer.synchronize()
            assert torch.equal(flat(model), weights)
        else:
            optimizer.synchronize()
            scaler.unscale_(optimizer)
            with optimizer.skip_synchronize():
                scaler.step(optimizer)
            weights = flat(model)
        scaler.update()
    assert_same_on_all_ranks(flat(model), "unscaled")


def test_a_scaler_that_is_not_enabled_changes_nothing():
    """As torch's for GPUs is, on a machine without one."""
    if not hasattr(torch.amp, "GradScaler"):
        pytest.skip("torch.amp.GradScaler, for the CPU too, came with torch 2.3")

    def trained(scaler):
        torch.manual_seed(0)
        model = net_without_vectors()
        optimizer = wrap(model, DLSCompressor(density=0.05, **SPARSE))
        for step in range(2):
            optimizer.zero_grad()
            backward(model, step, scaler)
            optimizer.step() if scaler is None else scaler.step(optimizer)
        return flat(model)

    assert torch.equal(trained(torch.amp.GradScaler("cpu", enabled=False)), trained(None))


def test_what_was_averaged_is_not_compressed_again():
    model = net()
    optimizer = wrap(model, DLSCompressor(density=0.05, **SPARSE))
    train(model, optimizer, range(1))
    optimizer.zero_grad()
    backward(model, 1)
    optimizer.synchronize()
    with pytest.raises(DLSError, match=r"with optimizer\.skip_synchronize"):
        optimizer.step()
    with optimizer.skip_synchronize():
        optimizer.step()
    assert_same_on_all_ranks(flat(model), "once")


@pytest.mark.parametrize("none", [True, False])
def test_a_step_after_an_update_that_was_left_out(none):
    """``synchronize()`` without ``step()``, as after a gradient that is too large."""
    model = net()
    without_momentum = torch.optim.SGD(model.parameters(), lr=0.05)
    optimizer = wrap(model, DLSCompressor(density=0.05, **SPARSE), without_momentum)
    for step in range(4):
        model.zero_grad(set_to_none=none)
        if step != 1 or hvd.rank() > 0:  # a rank without data
            backward(model, step)
        if step in (0, 2):
            optimizer.synchronize()
        else:
            optimizer.step()
        if step == 2:
            hvd.broadcast_optimizer_state(optimizer, 0)  # it makes a step of its own
    assert_same_on_all_ranks(flat(model), "left.out")


def test_an_update_by_a_rank_s_own_gradients_is_refused():
    model = net()
    compression = DLSCompressor(density=0.05, **SPARSE)
    optimizer = wrap(model, compression)
    backward(model, 0)
    with (
        pytest.raises(DLSError, match=r"drifted apart.*within skip_synchronize"),
        optimizer.skip_synchronize(),
    ):
        optimizer.step()
    compression.abandon_step()


def test_a_closure():
    """torch's optimizers call it within Horovod's ``step``, when that has synchronized."""
    losses = []

    def trained(by_closure):
        torch.manual_seed(0)
        model = net()
        optimizer = wrap(model, DLSCompressor(density=0.05, **SPARSE))
        if not by_closure:
            train(model, optimizer, range(3))
        for step in range(3) if by_closure else ():

            def closure(step=step):
                optimizer.zero_grad()
                backward(model, step)
                optimizer.synchronize()
                losses.append(step)

            with optimizer.skip_synchronize():
                optimizer.step(closure)
        return flat(model)

    torch.testing.assert_close(trained(True), trained(False), rtol=0, atol=1e-6)
    assert losses == [0, 1, 2]

    model = net()
    compression = DLSCompressor(density=0.05, **SPARSE)
    optimizer = wrap(model, compression)
    with pytest.raises(DLSError, match="closure that calls backward"):
        optimizer.step(lambda: backward(model, 0))
    compression.abandon_step()
    hvd.allreduce(torch.zeros(1), name="closure.ended")
