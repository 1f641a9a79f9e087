"""Checkpoints within a job: each rank's part, refusals on all ranks alike, disks that fail."""

import resource
import tempfile
from pathlib import Path

import horovod.torch as hvd
import pytest
import torch
from torch import nn

from hvd_dls import CheckpointError, DLSError, StateMismatchError
from hvd_dls.torch import DLSCompressor, load_checkpoint, save_checkpoint
from tests.torch.with_ranks.training import (
    SPARSE,
    assert_same_on_all_ranks,
    batch,
    flat,
    net_without_vectors,
    train,
    wrap,
)


@pytest.fixture
def folder():
    """The same on all ranks."""
    return Path(hvd.broadcast_object(tempfile.mkdtemp(), name="folder"))


def start(seed=1, compression=None, **options):
    torch.manual_seed(seed)
    model = net_without_vectors()
    if compression is None:
        compression = DLSCompressor(**{"density": 0.05, "momentum": 0.9, **SPARSE, **options})
    return model, compression, wrap(model, compression, torch.optim.SGD(model.parameters(), 0.05))


def save(folder, model, optimizer, compression, **options):
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    state = state if hvd.rank() == 0 else None  # other ranks' is not looked at
    return save_checkpoint(folder, state, compression, **options)


@pytest.mark.parametrize("shared", [True, False], ids=["one disk", "a disk for each rank"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained before", "new"])
@pytest.mark.parametrize("use", ["class", "momentum", "adam"])
def test_a_training_goes_on_bit_for_bit(folder, shared, trained, use):
    if not shared:
        folder = folder / f"disk{hvd.rank()}"

    class Bare(DLSCompressor):
        _default_instance = DLSCompressor(density=0.05, **SPARSE)

    bare = use == "class"
    options = {"momentum": 0.0, "adam": (0.5, 0.999)} if use == "adam" else {}
    model, compression, optimizer = start(compression=Bare if bare else None, **options)
    assert load_checkpoint(folder, compression) is None
    train(model, optimizer, range(4))
    written = save(folder, model, optimizer, compression)
    plain = torch.load(folder / "checkpoint-00000000" / "state.pt") if hvd.rank() == 0 else None
    assert plain is None or plain["epoch"] == 3  # an ordinary file of torch's
    train(model, optimizer, range(4, 8))
    expected = flat(model)
    if not trained:
        Bare._default_instance = DLSCompressor(density=0.05, **SPARSE)
        model, compression, optimizer = start(2, compression if bare else None, **options)
    state = load_checkpoint(folder, compression)
    assert state["epoch"] == 3
    assert written == folder / "checkpoint-00000000"
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if not trained:  # what waits for the first step is saved as it is
        assert save(folder, model, optimizer, compression).exists()
        load_checkpoint(folder, compression)
    train(model, optimizer, range(4, 8))
    assert torch.equal(flat(model), expected)
    assert_same_on_all_ranks(flat(model))


def refused_by_all(action, *words, kind=CheckpointError):
    with pytest.raises(kind) as refused:
        action()
    told = hvd.allgather_object(str(refused.value))
    assert all(word in text for text in told for word in words), told
    return told


def test_what_one_rank_cannot_write_all_raise_and_training_goes_on(folder):
    """A file that may not grow is as a disk that is full."""
    model, compression, optimizer = start()
    train(model, optimizer, range(2))
    save(folder, model, optimizer, compression)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if hvd.rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        refused_by_all(lambda: save(folder, model, optimizer, compression), "rank 1: OSError")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_checkpoint(folder, compression)["epoch"] == 3
    train(model, optimizer, range(2, 4))
    assert save(folder, model, optimizer, compression).name == "checkpoint-00000001"
    assert_same_on_all_ranks(flat(model))


def test_a_state_that_could_not_be_loaded_is_refused_when_it_is_saved(folder):
    words = "rank 0: ", "weights_only=True", "its state_dict()", "Linear"  # what is in the way
    refused_by_all(lambda: save_checkpoint(folder, {"a": nn.Linear(2, 2)}), *words)
    only_one = folder / "checkpoint-00000007"
    refused_by_all(lambda: load_checkpoint(only_one), "not there", f"pass {folder}")
    refused_by_all(lambda: save_checkpoint(folder, None), "state=None on rank 0")
    assert load_checkpoint(folder) is None


def test_what_does_not_fit_is_refused_by_all_before_anything_changes(folder):
    model, compression, optimizer = start()
    train(model, optimizer, range(3))
    written = save(folder, model, optimizer, compression)

    def refused(words, steps=1, build=None, **options):
        torch.manual_seed(1)
        other = net_without_vectors() if build is None else build()
        choice = DLSCompressor(**{"density": 0.05, "momentum": 0.9, **SPARSE, **options})
        sgd = wrap(other, choice, torch.optim.SGD(other.parameters(), 0.05))
        for step in range(steps):
            sgd.zero_grad()
            other(batch(step)[0]).square().mean().backward()
            sgd.step()
        before = choice.state_dict()["models"][0]["step"]
        refused_by_all(lambda: load_checkpoint(folder, choice), *words, kind=DLSError)
        assert choice.state_dict()["models"][0]["step"] == before

    refused(["strategy='dls', but it is 'layerwise' now"], strategy="layerwise")
    refused(["momentum=0.9, but it is 0.0 now"], momentum=0.0)
    refused(
        ["1.weight", "was saved in shape"],
        build=lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 9)),
    )
    hvd.allreduce(torch.ones(1), name="before.damage")
    if hvd.rank() == 0:
        part = written / "rank-00001-of-00002.npz"
        content = bytearray(part.read_bytes())
        content[len(content) // 2] ^= 1
        part.write_bytes(content)
    hvd.allreduce(torch.ones(1), name="after.damage")
    refused(["rank 1: ", "rank-00001-of-00002.npz cannot be read"])
    with pytest.raises(StateMismatchError):
        compression.load_state_dict({"version": 1, "models": [{"version": 3}]})


def test_in_the_middle_of_a_step_what_was_before_it_is_saved(folder):
    model, compression, optimizer = start()
    train(model, optimizer, range(3))
    optimizer.zero_grad()
    model(batch(3)[0]).square().mean().backward()
    save(folder, model, optimizer, compression)
    optimizer.step()
    train(model, optimizer, range(4, 6))
    state = load_checkpoint(folder, compression)
    assert compression.state_dict()["models"][0]["step"] == 3
    model.load_state_dict(state["model"])
    train(model, optimizer, range(3, 5))
    assert_same_on_all_ranks(flat(model))
