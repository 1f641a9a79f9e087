"""A step that does not end well leaves nothing behind, wherever it was interrupted."""

import contextlib
import copy
import os
import signal
import tempfile
import threading
import time
from pathlib import Path

import horovod.torch as hvd
import pytest
import torch
from torch import nn

from hvd_dls import DLSError, NonFiniteGradientError
from hvd_dls.torch import DLSCompressor
from tests.torch.with_ranks.test_training_options import everything, poisoned
from tests.torch.with_ranks.training import (
    SPARSE,
    assert_same_on_all_ranks,
    batch,
    flat,
    linear_loss,
    net,
    net_without_vectors,
    train,
    whole_numbers,
    wrap,
)

BUCKETS = pytest.mark.parametrize("bucket_bytes", [1, 32 << 20], ids=["buckets", "one bucket"])


class StoppedError(Exception):
    """What a user's code raises."""


def start(**options):
    """The same model on every rank and in every call, which trains to the same bits."""
    torch.manual_seed(1)
    model = net_without_vectors()
    compression = DLSCompressor(model.named_parameters(), density=0.05, **SPARSE, **options)
    return model, compression, wrap(model, compression)


def undisturbed(steps, **options):
    """Weights after these steps and no others."""
    model, _, optimizer = start(**options)
    train(model, optimizer, steps)
    return flat(model)


def odd() -> bool:
    return hvd.rank() == hvd.size() - 1


@contextlib.contextmanager
def stopped_in_backward(model):
    """When the last of three layers has been handed to Horovod, and no other."""
    hook = model[2].weight.register_hook(lambda gradient: raise_(StoppedError()))
    with pytest.raises(StoppedError):
        yield
    hook.remove()


@contextlib.contextmanager
def stopped_while_handed_over(model):
    """Ctrl-C between ``compress`` and Horovod's own record of the layer, the second of three."""
    original, calls = hvd.optimizer.allreduce_async_, []

    def allreduce_async_(*args, **kwargs):
        calls.append(1)
        return raise_(KeyboardInterrupt()) if len(calls) == 2 else original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hvd.optimizer, "allreduce_async_", allreduce_async_)
        with pytest.raises(KeyboardInterrupt):
            yield


def raise_(error):
    raise error


STOPPED = {"in backward": stopped_in_backward, "while handed over": stopped_while_handed_over}
GO_ON = {
    "load_state_dict": lambda optimizer, _: optimizer.load_state_dict(optimizer.state_dict()),
    "abandon_step": lambda _, compression: compression.abandon_step(),
}
EACH_STOP = pytest.mark.parametrize("stopped", STOPPED.values(), ids=STOPPED)
EACH_WAY_ON = pytest.mark.parametrize("go_on", GO_ON.values(), ids=GO_ON)


# On all ranks -----------------------------------------------------------------------------------


@BUCKETS
@EACH_STOP
@EACH_WAY_ON
def test_a_step_that_an_exception_ended_never_was(stopped, go_on, bucket_bytes):
    expected = undisturbed(range(4), bucket_bytes=bucket_bytes)
    model, compression, optimizer = start(bucket_bytes=bucket_bytes)
    train(model, optimizer, range(2))
    before = everything(model, optimizer, compression)
    for step, stop in ((7, stopped), (8, stopped_in_backward)):  # twice in a row
        with stop(model):
            train(model, optimizer, [step])
        go_on(optimizer, compression)
        assert everything(model, optimizer, compression) == before
    train(model, optimizer, range(2, 4))
    assert compression.last_step().step == 4
    assert torch.equal(flat(model), expected)
    assert_same_on_all_ranks(flat(model))


@pytest.mark.parametrize("bare", [True, False], ids=["bare", "named"])
@EACH_WAY_ON
def test_a_first_step_that_an_exception_ended_never_was(go_on, bare):
    expected = undisturbed(range(2))
    torch.manual_seed(1)
    model = net_without_vectors()
    named = None if bare else model.named_parameters()
    compression = DLSCompressor(named, density=0.05, **SPARSE)
    optimizer = wrap(model, compression)
    with stopped_in_backward(model):
        train(model, optimizer, [7])
    go_on(optimizer, compression)
    train(model, optimizer, range(2))
    assert torch.equal(flat(model), expected)
    assert_same_on_all_ranks(flat(model))


@BUCKETS
@EACH_STOP
def test_synchronize_brings_a_step_to_its_end_that_an_exception_cut_short(stopped, bucket_bytes):
    """Layers that had not come in take part with nothing; what has come in is not lost."""
    model = nn.Sequential(*(nn.ParameterList([torch.zeros(30, 40)]) for _ in range(3)))
    for part in model:
        part.weight = part[0]
    parameters = list(model.parameters())
    compression = DLSCompressor(
        model.named_parameters(), density=0.05, bucket_bytes=bucket_bytes, **SPARSE
    )
    sgd = torch.optim.SGD(parameters, lr=1)
    optimizer = wrap(model, compression, sgd, op=hvd.Sum)
    accumulated = [torch.zeros(30, 40) for _ in parameters]

    def backward(step):
        optimizer.zero_grad()
        sum(linear_loss(p, whole_numbers(p.shape, step)) for p in parameters).backward()

    for step in range(5):
        if step == 2:
            with stopped(model):
                backward(step)
        else:
            backward(step)
        for total, parameter in zip(accumulated, parameters, strict=True):
            if parameter.grad is not None:
                for rank in range(hvd.size()):
                    total += whole_numbers(parameter.shape, step, rank)
        optimizer.synchronize()
        with optimizer.skip_synchronize():
            optimizer.step()
    residuals = compression.state_dict()["models"][0]["residuals"].values()
    for number, (total, parameter, residual) in enumerate(
        zip(accumulated, parameters, residuals, strict=True)
    ):
        kept = hvd.allreduce(residual, op=hvd.Sum, name=f"kept.{number}")
        assert torch.equal(kept.reshape(30, 40) - parameter.detach(), total)  # lr = 1
    assert_same_on_all_ranks(flat(model))


def test_a_step_that_is_in_progress_is_not_in_the_state():
    model, compression, optimizer = start()
    train(model, optimizer, range(2))
    before = everything(model, optimizer, compression)
    images, labels = batch(2)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()
    assert everything(model, optimizer, compression) == before
    optimizer.step()
    assert everything(model, optimizer, compression) != before
    assert compression.last_step().step == 3


def test_abandoning_where_there_is_no_step_is_nothing():
    expected = undisturbed(range(4))
    model, compression, optimizer = start()
    compression.abandon_step()
    train(model, optimizer, range(2))
    compression.abandon_step()
    DLSCompressor.abandon_step()  # the class's default instance, which knows no model
    train(model, optimizer, range(2, 4))
    assert torch.equal(flat(model), expected)


def test_groups_and_several_backward_passes_can_be_abandoned():
    trained = []
    for disturbed in (False, True):
        torch.manual_seed(1)
        model = net_without_vectors()
        compression = DLSCompressor(density=0.05, **SPARSE)
        optimizer = wrap(model, compression, groups=2, backward_passes_per_step=2)
        train(model, optimizer, range(2), backward_passes=2)
        if disturbed:
            with stopped_in_backward(model):
                train(model, optimizer, [7], backward_passes=2)
            compression.abandon_step()
            for parameter in model.parameters():
                parameter.grad = None
            images, labels = batch(8)
            nn.functional.cross_entropy(model(images), labels).backward()  # one of two passes
            compression.abandon_step()
            optimizer.load_state_dict(optimizer.state_dict())  # which counts passes anew
        train(model, optimizer, range(2, 4), backward_passes=2)
        trained.append(flat(model))
        assert_same_on_all_ranks(trained[-1])
    assert torch.equal(*trained)


# NaN and Inf ------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["0.weight", "1.bias"], ids=["compressed", "dense"])
@pytest.mark.parametrize("own", [0.0, 0.9], ids=["optimizer's momentum", "our momentum"])
@pytest.mark.parametrize("how", ["step", "synchronize"])
def test_training_goes_on_after_a_gradient_that_was_not_finite(where, own, how):
    trained = []
    for bad in (False, True):
        torch.manual_seed(1)
        model = net()
        compression = DLSCompressor(model.named_parameters(), density=0.1, momentum=own, **SPARSE)
        inner = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0 if own else 0.9)
        optimizer = wrap(model, compression, inner)
        poisoned(model, optimizer, 0, "")
        before = everything(model, optimizer, compression)
        for value in (float("nan"), float("inf")) if bad else ():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(optimizer, "step", getattr(optimizer, how))
                with pytest.raises(NonFiniteGradientError):
                    poisoned(model, optimizer, 1, where, value)
            assert everything(model, optimizer, compression) == before
        poisoned(model, optimizer, 2, "")
        poisoned(model, optimizer, 3, "")
        assert compression.last_step().step == 3
        trained.append(flat(model))
        assert_same_on_all_ranks(trained[-1])
    torch.testing.assert_close(*trained, rtol=1e-6, atol=1e-6)


# On one rank ------------------------------------------------------------------------------------


@EACH_WAY_ON
def test_a_rank_that_gives_a_step_up_alone_is_named_to_the_others(go_on):
    """The others wait for it in the old step while it goes on with the next."""
    expected = undisturbed(range(4), bucket_bytes=1)
    model, compression, optimizer = start(bucket_bytes=1)
    train(model, optimizer, range(2))
    before = everything(model, optimizer, compression)
    if odd():
        with stopped_in_backward(model):
            train(model, optimizer, [7])
        go_on(optimizer, compression)
    else:
        with pytest.raises(DLSError, match=rf"rank(\(s\))? \[?{hvd.size() - 1}\b"):
            train(model, optimizer, [7])
    assert everything(model, optimizer, compression) == before
    train(model, optimizer, range(2, 4))
    assert compression.last_step().step == 4
    assert torch.equal(flat(model), expected)
    assert_same_on_all_ranks(flat(model))


@EACH_WAY_ON
def test_a_step_that_one_rank_gives_up_when_the_others_have_all_they_need_is_found_out(go_on):
    """Their weights differ then: all are told so, and a checkpoint mends it."""
    expected = undisturbed(range(4))
    model, compression, optimizer = start()
    train(model, optimizer, range(2))
    checkpoint = copy.deepcopy([x.state_dict() for x in (model, optimizer, compression)])
    if odd():
        images, labels = batch(7)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        go_on(optimizer, compression)
    else:
        train(model, optimizer, [7])
    with pytest.raises(DLSError, match=r"rank(\(s\))? "):
        train(model, optimizer, [2])
    for part, state in zip((model, optimizer, compression), checkpoint, strict=True):
        part.load_state_dict(state)
    train(model, optimizer, range(2, 4))
    assert torch.equal(flat(model), expected)
    assert_same_on_all_ranks(flat(model))


def test_a_rank_that_gives_a_step_up_alone_begins_horovod_s_groups_that_are_missing():
    """Or those of its next step, which have the same names, would meet those of the others."""
    trained = []
    for disturbed in (False, True):
        torch.manual_seed(1)
        model = net_without_vectors()
        compression = DLSCompressor(density=0.05, bucket_bytes=1, **SPARSE)
        weights = list(model.parameters())
        optimizer = wrap(model, compression, groups=[weights[:2], weights[2:]])
        train(model, optimizer, range(2))
        if disturbed and odd():
            with stopped_in_backward(model):  # behind the last group
                train(model, optimizer, [7])
            compression.abandon_step()
        elif disturbed:
            with pytest.raises(DLSError, match=r"gave step 3 up"):
                train(model, optimizer, [7])
        train(model, optimizer, range(2, 4))
        assert compression.last_step().step == 4
        trained.append(flat(model))
        assert_same_on_all_ranks(trained[-1])
    assert torch.equal(*trained)


@pytest.fixture
def tmp_flags():
    """A folder that all ranks see, and in which they tell each other how far they are."""
    folder = tempfile.mkdtemp() if hvd.rank() == 0 else None
    return Path(hvd.broadcast_object(folder, name="flags"))


def wait_until(condition):
    while not condition():
        time.sleep(0.01)


@contextlib.contextmanager
def interrupted(after=0.5):
    """Ctrl-C, by a signal that is not ignored in background jobs."""
    before = signal.signal(signal.SIGUSR1, lambda *_: raise_(KeyboardInterrupt()))
    timer = threading.Timer(after, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        timer.cancel()
        timer.join()
        signal.signal(signal.SIGUSR1, before)


def test_ctrl_c_while_waiting_for_other_ranks(tmp_flags):
    """State can be saved, and a second ``synchronize()`` goes on waiting."""
    expected = undisturbed(range(4))
    model, compression, optimizer = start()
    train(model, optimizer, range(2))
    before = everything(model, optimizer, compression)
    flags = [tmp_flags / str(rank) for rank in range(hvd.size() - 1)]
    if odd():
        hook = model[1].weight.register_hook(
            lambda gradient: wait_until(lambda: all(flag.exists() for flag in flags))
        )
        train(model, optimizer, [2])
        hook.remove()
    else:
        with interrupted():
            train(model, optimizer, [2])
        assert everything(model, optimizer, compression) == before
        flags[hvd.rank()].touch()
        optimizer.synchronize()
        with optimizer.skip_synchronize():
            optimizer.step()
    train(model, optimizer, [3])
    assert compression.last_step().step == 4
    assert torch.equal(flat(model), expected)
    assert_same_on_all_ranks(flat(model))


@EACH_WAY_ON
def test_ctrl_c_while_waiting_for_the_first_gradient_of_other_ranks(go_on, tmp_flags):
    expected = undisturbed(range(2))
    model, compression, optimizer = start()
    flags = [tmp_flags / str(rank) for rank in range(hvd.size() - 1)]
    if odd():
        wait_until(lambda: all(flag.exists() for flag in flags))
    else:
        with interrupted():
            train(model, optimizer, [0])
        assert compression.state_dict()["models"] in ([], [{}])
        go_on(optimizer, compression)
        flags[hvd.rank()].touch()
    train(model, optimizer, range(2))
    assert compression.last_step().step == 2
    assert torch.equal(flat(model), expected)
    assert_same_on_all_ranks(flat(model))
