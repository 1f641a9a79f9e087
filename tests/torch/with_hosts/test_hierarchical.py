"""Ranks that average their gradients with those of their host, on two hosts: 2 + 2 ranks, 1 + 2."""

import os

import horovod.torch as hvd
import pytest
import torch
from torch import nn

from hvd_dls import DLSError
from hvd_dls.core.wire.dealing import places_of
from hvd_dls.torch import DLSCompressor
from tests.restart import restart_horovod
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

HOSTS = {3: (1, 2), 4: (2, 2)}  # by number of ranks
HIERARCHICAL = {**SPARSE, "hierarchical": True}
OWNERS = {**HIERARCHICAL, "exchange": "sparse_allreduce"}  # that add up, between hosts


def plain_sgd(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr=lr)


def session_of(compression):
    (binding,) = compression._bindings
    return binding.session


# The laws ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strategy": "layerwise"},
        {"momentum": 0.9, "clip_norm": 1.0},
        {"clip_global_norm": 0.1},
        {"values": "bfloat16", "index_code": "plain", "bucket_bytes": 4000},
        {"warmup_steps": 4, "dense_steps": 2},
        {"exchange": "sparse_allreduce"},
        {"exchange": "sparse_allreduce", "momentum": 0.9, "bucket_bytes": 4000},
        {"adam": (0.5, 0.999), "clip_norm": 1.0},
    ],
    ids=str,
)
def test_parameters_and_ratios_agree_to_the_bit(options):
    model = net()
    compression = DLSCompressor(density=0.05, **HIERARCHICAL, **options)
    train(model, wrap(model, compression, plain_sgd(model)), range(10))
    record = compression.last_step()
    assert record.step == 10
    assert session_of(compression).groups.sizes == HOSTS[hvd.size()]
    assert_same_on_all_ranks(flat(model))
    assert_same_on_all_ranks(torch.tensor(record.k.tolist()))
    assert (record.thresholds > 0).all()  # also of layers that others send


def residuals_of(compression) -> dict[str, torch.Tensor]:
    (state,) = compression.state_dict()["models"]
    return state["residuals"]


def pending(compression, name, size) -> torch.Tensor:
    """What this rank holds of a layer: in its residual, and of sums that it owns."""
    (state,) = compression.state_dict()["models"]
    held = state["residuals"].get(name, torch.zeros(size)).float().clone()
    for key, kept in state.get("kept", {}).items():
        layer, piece = key.rsplit("@", 1)
        if layer == name:
            held[places_of(len(held), piece)] += kept.float()
    return held


@pytest.mark.parametrize("options", [HIERARCHICAL, OWNERS], ids=["allgather", "owners"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_what_was_sent_and_what_waits_are_all_that_was_accumulated(dtype, options):
    shapes = [(40, 30), (7, 5, 3, 3), (300, 2)]
    largest = 3
    model = nn.ParameterList([nn.Parameter(torch.zeros(s, dtype=dtype)) for s in shapes])
    compression = DLSCompressor(density=0.1, bucket_bytes=6000, **options)
    optimizer = wrap(model, compression, plain_sgd(model, lr=1), op=hvd.Sum)
    received = [torch.zeros(s) for s in shapes]
    accumulated = [torch.zeros(s) for s in shapes]
    for step in range(6):
        optimizer.zero_grad()
        sum(linear_loss(p, whole_numbers(p.shape, step, largest=largest)) for p in model).backward()
        optimizer.synchronize()
        for i, parameter in enumerate(model):
            received[i] += parameter.grad.float()
            for rank in range(hvd.size()):
                accumulated[i] += whole_numbers(parameter.shape, step, rank, largest)
        with optimizer.skip_synchronize():
            optimizer.step()
    of_a_host = hvd.size() / len(HOSTS[hvd.size()])  # what a host's average is multiplied by
    exact = hvd.size() == 4  # else thirds are rounded
    for i, shape in enumerate(shapes):
        own = pending(compression, str(i), received[i].numel())
        kept = of_a_host * hvd.allreduce(own, op=hvd.Sum, name=f"kept.{i}")
        assert kept.abs().sum() > 0
        off = 0 if exact else 0.05 if dtype in (torch.float16, torch.bfloat16) else 1e-4
        torch.testing.assert_close(
            received[i] + kept.reshape(shape), accumulated[i], rtol=off, atol=20 * off
        )


def test_residuals_are_shared_out_among_a_host_s_ranks():
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))
    compression = DLSCompressor(density=0.05, **HIERARCHICAL)
    optimizer = wrap(model, compression)
    model(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    mine = sum(residual.numel() for residual in residuals_of(compression).values())
    everyone = hvd.allgather(torch.tensor([mine]), name="sizes").tolist()
    whole = sum(p.numel() for p in model.parameters())
    assert everyone == ([whole // 2] * 4 if hvd.size() == 4 else [whole, whole, 0])


@pytest.mark.parametrize(
    "horovod_options",
    [{"op": hvd.Average}, {"op": hvd.Sum}, {"gradient_predivide_factor": 1.5}],
    ids=["average", "sum", "predivide"],
)
@pytest.mark.parametrize("options", [HIERARCHICAL, OWNERS], ids=["allgather", "owners"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_density_one_training_equals_dense_training(dtype, options, horovod_options):
    trained = []
    for compression in (hvd.Compression.none, DLSCompressor(density=1, **options)):
        torch.manual_seed(1)
        model = net().to(dtype)
        train(model, wrap(model, compression, plain_sgd(model, 0.01), **horovod_options), range(8))
        trained.append(flat(model))
    assert_same_on_all_ranks(trained[1])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(trained[1], trained[0], rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(os.environ.get("HVD_DLS_TEST_RANKS") != "4", reason="thirds are rounded")
def test_it_is_what_as_many_ranks_as_hosts_would_do_with_their_averages():
    """To the bit: a session of two ranks, given the averages of two hosts."""
    from tests.core.ranks import make_sessions, step

    shapes = {"a": (40, 30), "b": (20, 40)}
    model = nn.ParameterDict({n: nn.Parameter(torch.zeros(s)) for n, s in shapes.items()})
    compression = DLSCompressor(density=0.1, prior="uniform", **HIERARCHICAL)
    optimizer = wrap(model, compression, plain_sgd(model, lr=1))
    alike = None
    for number in range(5):
        drawn = [
            {n: whole_numbers(s, number, rank) for n, s in shapes.items()} for rank in range(4)
        ]
        optimizer.zero_grad()
        sum(linear_loss(model[n], drawn[hvd.rank()][n]) for n in shapes).backward()
        optimizer.synchronize()
        session = session_of(compression)
        if alike is None:
            limit = session.routing.buckets[0].size * 4
            alike = make_sessions(
                2, session.plan.layers, density=0.1, dense_below=0, bucket_bytes=limit
            )
        hosts = [
            {n: ((drawn[i][n] + drawn[i + 1][n]) / 2).numpy().ravel() for n in shapes}
            for i in (0, 2)
        ]
        sums, _ = step(alike, hosts, scale=0.5)
        for name in shapes:
            assert torch.equal(model[name].grad.view(-1), torch.from_numpy(sums[0][name]))
        with optimizer.skip_synchronize():
            optimizer.step()


# Ways of use ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"groups": 2}, {"backward_passes_per_step": 3}, {"sparse_as_dense": True}], ids=str
)
def test_horovod_s_options(options):
    model = net()
    compression = DLSCompressor(density=0.05, **HIERARCHICAL)
    optimizer = wrap(model, compression, plain_sgd(model), **options)
    train(model, optimizer, range(6), options.get("backward_passes_per_step", 1))
    assert compression.last_step().step == 6
    assert_same_on_all_ranks(flat(model))


class Branches(nn.Module):
    """Each rank uses the layer of its own, or all the first one."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(48, 32)
        self.mine = nn.ModuleList(nn.Linear(32, 5) for _ in range(4))

    def forward(self, images, number):
        return self.mine[number](torch.relu(self.first(images.flatten(1))))


@pytest.mark.parametrize("options", [HIERARCHICAL, OWNERS], ids=["allgather", "owners"])
@pytest.mark.parametrize("frozen", [False, True])
def test_layers_that_take_no_part_on_some_ranks(frozen, options):
    model = Branches()
    compression = DLSCompressor(density=0.1, **options)
    optimizer = wrap(model, compression)
    for step in range(6):
        if frozen and step == 3:
            for parameter in model.mine[hvd.rank()].parameters():
                parameter.requires_grad_(False)
        images, labels = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images, hvd.rank()), labels).backward()
        optimizer.step()
    assert compression.last_step().step == 6
    assert_same_on_all_ranks(flat(model))


@pytest.mark.parametrize("options", [HIERARCHICAL, OWNERS], ids=["allgather", "owners"])
def test_hvd_init_again_keeps_what_waits(options):
    """To the bit: all goes on as if nothing had happened."""
    trained = []
    for again in (False, True):
        torch.manual_seed(1)
        model = net_without_vectors()
        compression = DLSCompressor(density=0.02, **options)
        optimizer = wrap(model, compression, plain_sgd(model))
        train(model, optimizer, range(4))
        if again:
            # The other host may still be handing on what came in: a shutdown would cut that off.
            hvd.allreduce(torch.zeros(1), name="all ranks have made their steps")
            restart_horovod(hvd)
        train(model, optimizer, range(4, 7))
        assert compression.last_step().step == 7
        trained.append(flat(model))
    assert torch.equal(*trained)
    assert_same_on_all_ranks(trained[1])


def test_one_rank_that_is_hierarchical_alone_is_refused_on_all():
    model = net_without_vectors()
    mine = hvd.rank() == 0
    compression = DLSCompressor(density=0.05, **{**SPARSE, "hierarchical": mine})
    with pytest.raises(DLSError, match=r"option hierarchical: (True|False)"):
        train(model, wrap(model, compression), [0])
