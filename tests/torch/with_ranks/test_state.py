"""Residuals, ratios and thresholds are training state."""

import copy
import io

import horovod.torch as hvd
import pytest
import torch
from torch import nn

from hvd_dls import DLSError, StateMismatchError
from hvd_dls.torch import DLSCompressor, bookkeeping
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


def saved(value):
    """Through a file and back, as a checkpoint would go."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("use", ["class", "instance", "given parameters"])
def test_a_restart_goes_on_bit_for_bit(use):
    def start():
        model = net_without_vectors()
        if use == "class":
            DLSCompressor._default_instance = None
            compression = DLSCompressor
            compression._default_instance = DLSCompressor(density=0.05, **SPARSE)
        else:
            named = model.named_parameters() if use == "given parameters" else None
            compression = DLSCompressor(named, density=0.05, **SPARSE)
        return model, compression, wrap(model, compression)

    model, compression, optimizer = start()
    train(model, optimizer, range(6))
    checkpoint = saved((model.state_dict(), optimizer.state_dict(), compression.state_dict()))
    assert sum(r.abs().sum() for r in checkpoint[2]["models"][0]["residuals"].values()) > 0
    train(model, optimizer, range(6, 12))

    # Parameters of a bare compressor are found in a first, dense step: take it, then load.
    again, compression_again, optimizer_again = start()
    if use != "given parameters":
        train(again, optimizer_again, range(1))
    again.load_state_dict(checkpoint[0])
    optimizer_again.load_state_dict(checkpoint[1])
    compression_again.load_state_dict(checkpoint[2])
    train(again, optimizer_again, range(6, 12))
    assert torch.equal(flat(model), flat(again))
    assert_same_on_all_ranks(flat(again))


@pytest.mark.parametrize("complete", [False, True])
def test_what_was_on_its_way_when_a_state_is_loaded_is_not_of_the_next_step(complete):
    """The state is of the beginning of that very step, so its number does not tell them apart."""
    trained = []
    for loads in (False, True):
        torch.manual_seed(1)
        model = net_without_vectors()
        compression = DLSCompressor(density=0.05, bucket_bytes=4000, **SPARSE)
        optimizer = wrap(model, compression, torch.optim.SGD(model.parameters(), lr=0.05))
        train(model, optimizer, range(3))
        if loads:
            state = saved(compression.state_dict())
            images, _ = batch(99)
            out = model(images) if complete else model[-1](torch.ones(2, 30))
            out.sum().backward()
            compression.load_state_dict(state)
            compression.abandon_step()
        train(model, optimizer, range(3, 6))
        trained.append(flat(model))
        assert compression.last_step().step == 6
    assert torch.equal(*trained)


def start(groups=None, **options):
    """Compressed layers, and biases that go dense; the same in every call."""
    torch.manual_seed(1)
    sizes = [48, 40, 30, 5]
    model = nn.Sequential(nn.Flatten(), *map(nn.Linear, sizes, sizes[1:]))
    compression = DLSCompressor(density=0.05, **SPARSE, **options)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    optimizer = wrap(model, compression, sgd, groups=groups)
    train(model, optimizer, range(3))
    return model, compression, optimizer


def begin_a_step(model, complete=True):
    """Backward through all of the model, or through its last layer alone."""
    out = model(batch(99)[0]) if complete else model[-1](torch.ones(2, 30))
    out.sum().backward()


def assert_equal(weights, expected):
    """To the bit on two ranks; of more, Horovod adds up what goes dense in one order or another."""
    rounding = 0 if hvd.size() == 2 else 1e-6
    torch.testing.assert_close(weights, expected, rtol=0, atol=rounding)


def goes_on_as_if_nothing_had_been(model, compression, optimizer, **options):
    """With the fourth step, as one that trained undisturbed."""
    train(model, optimizer, range(3, 6))
    assert compression.last_step().step == 6
    other, _, undisturbed = start(**options)
    train(other, undisturbed, range(3, 6))
    assert_equal(flat(model), flat(other))
    assert_same_on_all_ranks(flat(model))


IN_STEP = pytest.mark.parametrize("in_step", [0, -1], ids=["first rank", "last rank"])
OPTIONS = pytest.mark.parametrize(
    "options",
    [{}, {"bucket_bytes": 1}, {"groups": 2}, {"dense_steps": 9}],
    ids=["one bucket", "buckets", "Horovod's groups", "dense steps"],
)


@IN_STEP
@OPTIONS
@pytest.mark.parametrize("complete", [True, False], ids=["all sent", "some sent"])
def test_a_state_is_loaded_while_one_rank_alone_is_in_a_step(in_step, options, complete):
    """What it sent is joined by the others before the next step, and meets nothing of that."""
    model, compression, optimizer = start(**options)
    state = saved(compression.state_dict())
    if hvd.rank() == in_step % hvd.size():
        begin_a_step(model, complete)
    compression.load_state_dict(state)
    compression.abandon_step()
    goes_on_as_if_nothing_had_been(model, compression, optimizer, **options)


@pytest.mark.parametrize("first", ["not begun", "some sent"])
@pytest.mark.parametrize("others", ["some sent", "all sent"])
def test_a_state_is_loaded_where_gradients_of_embeddings_are_sparse(first, others):
    """Horovod gathers these rows, and each rank joins, with none, before the next step's."""
    trained = []
    for loads in (False, True):
        torch.manual_seed(1)
        layers = nn.Embedding(50, 16, sparse=True), nn.Flatten(), nn.Linear(48, 40)
        model = nn.Sequential(*layers, nn.Linear(40, 5))
        compression = DLSCompressor(density=0.05, **SPARSE)
        sgd = torch.optim.SGD(model.parameters(), lr=0.05)
        optimizer = wrap(model, compression, sgd)
        for step in range(6):
            begun = first if hvd.rank() == 0 else others
            if loads and step == 3:
                state = saved(compression.state_dict())
                if begun != "not begun":
                    out = model(words(99)) if begun == "all sent" else model[-1](torch.ones(2, 40))
                    out.sum().backward()
                compression.load_state_dict(state)
                compression.abandon_step()
            optimizer.zero_grad()
            model(words(step)).square().sum().backward()
            optimizer.step()
        trained.append(flat(model))
        assert_same_on_all_ranks(trained[-1])
    assert_equal(*trained)


def words(step):
    generator = torch.Generator().manual_seed(10 * step + hvd.rank())
    return torch.randint(0, 50, (4, 3), generator=generator)


@IN_STEP
@OPTIONS
def test_a_state_is_loaded_after_one_rank_alone_gave_a_step_up(in_step, options, monkeypatch):
    """It waits in vain for the others, who have not begun the step."""
    monkeypatch.setattr(bookkeeping, "_PATIENCE", 0.1)
    model, compression, optimizer = start(**options)
    state = saved(compression.state_dict())
    if hvd.rank() == in_step % hvd.size():
        begin_a_step(model)
        compression.abandon_step()
    monkeypatch.undo()
    compression.load_state_dict(state)
    goes_on_as_if_nothing_had_been(model, compression, optimizer, **options)


@IN_STEP
@pytest.mark.parametrize("damaged", [0, -1], ids=["first's is damaged", "last's is damaged"])
def test_a_state_that_is_refused_leaves_the_step_of_one_rank_as_it_is(in_step, damaged):
    model, compression, optimizer = start()
    state = saved(compression.state_dict())
    if hvd.rank() == damaged % hvd.size():
        state["models"][0]["step"] = "no"
    images, labels = batch(3)

    def backward():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()

    begun = hvd.rank() == in_step % hvd.size()
    if begun:
        backward()
    with pytest.raises(DLSError, match=r"step no|rank .* cannot go on"):
        compression.load_state_dict(state)
    if not begun:
        backward()
    optimizer.step()
    train(model, optimizer, range(4, 6))
    other, _, undisturbed = start()
    train(other, undisturbed, range(3, 6))
    assert_equal(flat(model), flat(other))


def test_a_state_of_an_earlier_step_is_loaded_while_one_rank_alone_is_in_a_step():
    model, compression, optimizer = start()
    checkpoint = copy.deepcopy([x.state_dict() for x in (model, optimizer, compression)])
    train(model, optimizer, range(50, 52))
    if hvd.rank() == 0:
        begin_a_step(model)
    for part, state in zip((model, optimizer, compression), checkpoint, strict=True):
        part.load_state_dict(state)
    goes_on_as_if_nothing_had_been(model, compression, optimizer)


def test_a_state_loaded_before_the_first_step_waits_for_the_parameters():
    model = net()
    compression = DLSCompressor(density=0.05, **SPARSE)
    optimizer = wrap(model, compression)
    train(model, optimizer, range(4))
    state = saved(compression.state_dict())

    again = net()
    compression = DLSCompressor(density=0.05, **SPARSE)
    compression.load_state_dict(state)
    train(again, wrap(again, compression), range(2))
    assert compression.last_step().step == state["models"][0]["step"] + 2


def test_a_state_of_other_layers_options_or_ranks_is_refused_by_name():
    def trained(density=0.05, width=32):
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, width), nn.Linear(width, 5))
        compression = DLSCompressor(model.named_parameters(), density=density, **SPARSE)
        train(model, wrap(model, compression), range(3))
        return model, compression

    _, compression = trained()
    before = saved(compression.state_dict())
    _, wider = trained(width=64)
    wrong = r"'1.weight' was saved in shape \[64, 48\], it has \[32, 48\]"
    with pytest.raises(StateMismatchError, match=wrong):
        compression.load_state_dict(wider.state_dict())
    _, denser = trained(density=0.1)
    with pytest.raises(StateMismatchError, match=r"density=0.1.*0.05"):
        compression.load_state_dict(denser.state_dict())
    more_ranks = saved(before)
    more_ranks["models"][0]["world_size"] = 64
    with pytest.raises(StateMismatchError, match="64 ranks"):
        compression.load_state_dict(more_ranks)
    after = compression.state_dict()
    assert str(before) == str(after)


def test_a_waiting_state_of_other_layers_is_refused_in_the_first_step_on_every_rank():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.Linear(32, 5))
    compression = DLSCompressor(model.named_parameters(), density=0.05, **SPARSE)
    train(model, wrap(model, compression), range(2))
    other = net()
    loaded = DLSCompressor(other.named_parameters(), density=0.05, **SPARSE)
    loaded.load_state_dict(compression.state_dict())
    with pytest.raises(StateMismatchError, match="layer"):
        train(other, wrap(other, loaded), range(1))
    hvd.allreduce(torch.zeros(1), name="all.refused")
