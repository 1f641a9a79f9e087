"""Ranks with different numbers of batches: see ``hvd_dls.torch.join``."""

import contextlib

import horovod.torch as hvd
import pytest
import torch
from torch import nn

from hvd_dls import DLSError, NonFiniteGradientError, RanksDisagreeError
from hvd_dls.torch import DLSCompressor, LocalSteps, join
from tests.torch.with_ranks.test_missing_layers import residual_of
from tests.torch.with_ranks.training import (
    SPARSE,
    assert_same_on_all_ranks,
    batch,
    flat,
    linear_loss,
    net,
    net_without_vectors,
    whole_numbers,
    wrap,
)


def batches(epoch=0, rank=None):
    """More on the first ranks; the last has none."""
    n = 2 * (hvd.size() - 1 - (hvd.rank() if rank is None else rank))
    return range(100 * epoch, 100 * epoch + n)


def loss_of(model, step):
    images, labels = batch(step)
    return nn.functional.cross_entropy(model(images), labels)


def steps_of(compression):
    """Steps that were made."""
    return compression.last_step().step


def start(model=None, compression=None, inner=None, **options):
    torch.manual_seed(1)
    model = model or net()
    compression = compression or DLSCompressor(density=0.05, **SPARSE)
    return model, compression, wrap(model, compression, inner and inner(model), **options)


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def as_horovod_trains(inner, epochs):
    """Weights after training with Horovod's join, which leaves those of ranks that join behind."""
    model, _, optimizer = start(compression=hvd.Compression.none, inner=inner)
    for epoch in range(epochs):
        train(model, optimizer, batches(epoch))
        last = hvd.join()
        hvd.broadcast_parameters(model.state_dict(), last)
        for name, p in model.named_parameters():
            buffer = optimizer.state[p].get("momentum_buffer", torch.zeros_like(p))
            optimizer.state[p]["momentum_buffer"] = hvd.broadcast(buffer, last, name=f"m.{name}")
    return flat(model)


@pytest.mark.parametrize("own", [0.0, 0.9], ids=["optimizer's momentum", "our momentum"])
def test_density_1_trains_as_horovod_does_with_its_join(own):
    def sgd(momentum):
        decay = 0.0 if own else 0.01
        return lambda model: torch.optim.SGD(
            model.parameters(), lr=0.05, momentum=momentum, weight_decay=decay
        )

    expected = as_horovod_trains(sgd(0.9), epochs=2)
    compression = DLSCompressor(density=1.0, momentum=own, momentum_masking=False, **SPARSE)
    model, compression, optimizer = start(compression=compression, inner=sgd(0.9 - own))
    for epoch in range(2):
        with join(optimizer) as joined:
            train(model, optimizer, batches(epoch))
        assert joined.last_rank == 0
        assert joined.extra_steps == len(batches(rank=0)) - len(batches())
    assert steps_of(compression) == 2 * len(batches(rank=0))
    torch.testing.assert_close(flat(model), expected, rtol=1e-4, atol=1e-5)
    assert_same_on_all_ranks(flat(model))


def test_nothing_is_lost_and_residuals_of_ranks_without_data_are_sent():
    """Sent + residual = accumulated, to the bit; one rank has no gradient from the start."""
    shapes = {"0": (40, 30), "1": (100, 30)}
    model = nn.ParameterList([torch.zeros(shape) for shape in shapes.values()])
    compression = DLSCompressor(density=0.05, **SPARSE)
    sgd = torch.optim.SGD(model.parameters(), lr=1)
    optimizer = wrap(model, compression, sgd, op=hvd.Sum)
    mine, most = len(batches()), len(batches(rank=0))
    with join(optimizer):
        for step in batches():
            optimizer.zero_grad()
            for p in model.parameters():
                linear_loss(p, whole_numbers(p.shape, step)).backward()
            optimizer.step()
        before = {name: residual_of(compression, name) for name in shapes} if mine else {}
    for name, p in model.named_parameters():
        accumulated = torch.zeros(p.shape)
        for rank in range(hvd.size()):
            for step in batches(rank=rank):
                accumulated += whole_numbers(p.shape, step, rank)
        residual = residual_of(compression, name)
        kept = hvd.allreduce(residual, op=hvd.Sum, name=f"kept.{name}")
        assert torch.equal(kept.reshape(p.shape) - p.detach(), accumulated)
        if 0 < mine < most:
            assert residual.count_nonzero() < before[name].count_nonzero()
    assert_same_on_all_ranks(flat(model))
    k = torch.from_numpy(compression.last_step().k)
    assert_same_on_all_ranks(k, "ratios")


class WithUnused(nn.Module):
    """An embedding with sparse gradients, and a layer that is used in some steps."""

    def __init__(self, sparse=True):
        super().__init__()
        self.embedding = nn.Embedding(50, 16, sparse=sparse)
        self.seldom = nn.Linear(16, 16)
        self.last = nn.Linear(16, 5)

    def forward(self, words, step):
        found = self.embedding(words)
        return self.last(self.seldom(found) if step % 2 else found)


@pytest.mark.parametrize("known", [False, True], ids=["first step", "later"])
@pytest.mark.parametrize(
    "options",
    [{}, {"sparse_as_dense": True}, {"groups": 2}, {"backward_passes_per_step": 2}],
    ids=["", "sparse_as_dense", "groups", "accumulation"],
)
def test_what_horovod_reduces_in_other_ways(options, known):
    """Of a rank without any data, in the first step of all or later."""
    compression = DLSCompressor(density=0.05, **SPARSE)
    sparse = "groups" not in options
    inner = None if sparse else lambda m: torch.optim.Adam(m.parameters(), lr=0.05)
    if sparse:
        inner = lambda m: torch.optim.SGD(m.parameters(), lr=0.05)  # noqa: E731
    model, _, optimizer = start(WithUnused(sparse), compression, inner, **options)
    passes = options.get("backward_passes_per_step", 1)

    def train(steps):
        for step in steps:
            optimizer.zero_grad()
            for part in range(passes):
                generator = torch.Generator().manual_seed(1000 * step + 10 * part + hvd.rank())
                words = torch.randint(0, 50, (6,), generator=generator)
                output = model(words, 1 if "groups" in options else step)
                nn.functional.cross_entropy(output, words % 5).backward()
            optimizer.step()

    if known:
        train(range(2))
    with join(optimizer) as joined:
        train(batches())
    assert joined.extra_steps == len(batches(rank=0)) - len(batches())
    assert steps_of(compression) == 2 * known + len(batches(rank=0))
    assert_same_on_all_ranks(flat(model))


def test_what_was_accumulated_goes_with_the_first_step_without_data():
    """A batch that no step has taken when a rank's loop ends is not lost."""
    model = nn.ParameterList([torch.zeros(20, 30)])
    compression = DLSCompressor(density=1.0, **SPARSE)
    sgd = torch.optim.SGD(model.parameters(), lr=1)
    optimizer = wrap(model, compression, sgd, op=hvd.Sum, backward_passes_per_step=2)
    count = 4 if hvd.rank() == 0 else 3
    with join(optimizer):
        for step in range(count):
            linear_loss(model[0], whole_numbers((20, 30), step)).backward()
            if step % 2:
                optimizer.step()
                optimizer.zero_grad()
    expected = torch.zeros(20, 30)
    for rank in range(hvd.size()):
        for step in range(4 if rank == 0 else 3):
            expected -= whole_numbers((20, 30), step, rank)
    assert torch.equal(model[0].detach(), expected)
    assert_same_on_all_ranks(flat(model))


def test_everything_behind_backward_in_a_function():
    """By-hand synchronize, clipping, GradScaler, a scheduler; an overflow in the tail, too."""
    model = net_without_vectors()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    scaler.scale(torch.zeros(()))
    compression = DLSCompressor(density=0.1, loss_scale=scaler.get_scale, **SPARSE)
    optimizer = wrap(model, compression)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    def step():
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
        scheduler.step()

    for epoch in range(2):
        with join(optimizer, step):
            for number in batches(epoch):
                optimizer.zero_grad()
                factor = torch.inf if number == len(batches()) - 1 else 1.0
                scaler.scale(loss_of(model, number) * factor).backward()
                step()
    assert scheduler.last_epoch == 2 * len(batches(rank=0))
    assert compression.skipped_steps() > 0
    assert_same_on_all_ranks(flat(model))
    assert_same_on_all_ranks(torch.tensor([scaler.get_scale(), scheduler.get_last_lr()[0]]))


def test_a_scheduler_that_ranks_without_data_do_not_call_is_refused_by_all():
    model, _, optimizer = start()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    def loop():
        with join(optimizer):
            for step in batches():
                train(model, optimizer, [step])
                scheduler.step()

    with pytest.raises(RanksDisagreeError, match=r"options .* differ .* step="):
        loop()
    assert_same_on_all_ranks(flat(model))


class StoppedError(Exception):
    """What a user's code raises."""


def stop(*_):
    raise StoppedError


@pytest.mark.parametrize("where", ["forward", "backward", "after the step"])
def test_an_exception_on_one_rank_ends_the_loops_of_all(where):
    """Of rank 0, while others train or are without data; and then training goes on."""
    model, compression, optimizer = start()
    with join(optimizer):  # all ranks are in the same step
        train(model, optimizer, range(2))
    stops = hvd.rank() == 0
    raised = StoppedError if stops else RanksDisagreeError
    hooks = []

    def loop():
        with join(optimizer):
            for step in batches():
                optimizer.zero_grad()
                if stops and step == 1 and where == "forward":
                    raise StoppedError
                loss = loss_of(model, step)
                if stops and step == 1 and where == "backward":
                    hooks.append(model[3].weight.register_hook(stop))
                loss.backward()
                optimizer.step()
                if stops and step == 1 and where == "after the step":
                    raise StoppedError

    with pytest.raises(raised, match="^$" if stops else "rank"):
        loop()
    for hook in hooks:
        hook.remove()
    compression.abandon_step()
    with join(optimizer) as joined:
        train(model, optimizer, batches(1))
    assert joined.extra_steps == len(batches(rank=0)) - len(batches())
    assert_same_on_all_ranks(flat(model))


@pytest.mark.parametrize("caught", [False, True], ids=["uncaught", "caught"])
def test_nan_in_a_step_that_a_rank_takes_part_in_without_data(caught):
    model, _, optimizer = start()
    raised = contextlib.nullcontext() if caught else pytest.raises(NonFiniteGradientError)
    with raised, join(optimizer) as joined:
        for step in batches():
            optimizer.zero_grad()
            (
                loss_of(model, step) * (torch.nan if step == 1 and hvd.rank() == 0 else 1.0)
            ).backward()
            with (
                contextlib.suppress(NonFiniteGradientError) if caught else contextlib.nullcontext()
            ):
                optimizer.step()
    if caught and hvd.rank() == hvd.size() - 1:
        assert joined.extra_steps == len(batches(rank=0)) - 1
    assert_same_on_all_ranks(flat(model))


def test_a_loop_that_is_left_early_and_one_that_leaves_a_step_begun():
    model, compression, optimizer = start()
    with join(optimizer) as joined:
        for step in range(6):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            if hvd.rank() == 0 and step == 3:
                break  # the end of the block makes the step
            optimizer.step()
            if hvd.rank() == 1 and step == 1:
                break
    others = 6 if hvd.size() > 2 else 4
    assert steps_of(compression) == others
    assert joined.last_rank == (2 if hvd.size() > 2 else 0)
    assert_same_on_all_ranks(flat(model))


def test_what_join_refuses():
    model, _, optimizer = start()
    other, _, second = start(net_without_vectors())
    with pytest.raises(DLSError, match=r"call hvd.join\(\) after the loop"):
        join(wrap(net(), hvd.Compression.none))
    rounds = LocalSteps(net(), DLSCompressor(**SPARSE))
    for without in (rounds, rounds.optimizer, torch.optim.SGD(model.parameters(), 0.1)):
        with pytest.raises(DLSError, match=r"goes on calling rounds.step\(\)"):
            join(without)
    with pytest.raises(DLSError, match=r"join\(\) within join\(\)"), join(optimizer), join(second):
        pass
    with pytest.raises(DLSError, match="another one"), join(optimizer):
        train(other, second, [0])
    with join(optimizer):
        train(model, optimizer, batches())
    assert_same_on_all_ranks(flat(model))


@pytest.mark.skipif("hvd.size() < 4", reason="needs two process sets of two ranks")
def test_process_sets():
    """Each set has its own loop, and the ranks of one finish long before those of the other."""
    halves = [hvd.add_process_set([0, 1]), hvd.add_process_set([2, 3])]
    mine = hvd.rank() // 2
    model, compression = net(), DLSCompressor(density=0.05, **SPARSE)
    optimizer = wrap(model, compression, process_set=halves[mine])
    count = [1, 3, 9, 0][hvd.rank()]
    with join(optimizer) as joined:
        train(model, optimizer, range(count))
    assert joined.last_rank == [1, 2][mine]
    everyone = hvd.allgather(flat(model)[None], name="sets.joined")
    assert torch.equal(everyone[0], everyone[1])
    assert torch.equal(everyone[2], everyone[3])
    for process_set in halves:
        hvd.remove_process_set(process_set)
