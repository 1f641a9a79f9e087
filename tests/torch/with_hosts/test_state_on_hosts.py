"""What ranks that average with those of their host save and load: 2 + 2 ranks, 1 + 2."""

import horovod.torch as hvd
import pytest
import torch

from hvd_dls import StateMismatchError
from hvd_dls.torch import DLSCompressor
from tests.torch.with_hosts.test_hierarchical import HIERARCHICAL, plain_sgd, residuals_of
from tests.torch.with_ranks.training import (
    SPARSE,
    assert_same_on_all_ranks,
    batch,
    flat,
    net_without_vectors,
    train,
    wrap,
)


def test_a_restart_goes_on_bit_for_bit():
    def fresh():
        torch.manual_seed(1)
        model = net_without_vectors()
        compression = DLSCompressor(density=0.05, momentum=0.9, **HIERARCHICAL)
        return model, compression, wrap(model, compression, plain_sgd(model))

    model, compression, optimizer = fresh()
    train(model, optimizer, range(4))
    saved = {n: v.clone() for n, v in model.state_dict().items()}, compression.state_dict()
    saved[1]["models"][0]["residuals"] = {
        n: r.clone() for n, r in residuals_of(compression).items()
    }
    velocities = saved[1]["models"][0]["velocities"]
    saved[1]["models"][0]["velocities"] = {n: v.clone() for n, v in velocities.items()}
    train(model, optimizer, range(4, 8))
    again, other, optimizer = fresh()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    train(again, optimizer, range(4, 8))
    assert torch.equal(flat(again), flat(model))


def test_a_state_of_ranks_that_sent_for_themselves_is_refused():
    model = net_without_vectors()
    compression = DLSCompressor(density=0.05, **SPARSE)
    train(model, wrap(model, compression), range(2))
    state = compression.state_dict()
    other = DLSCompressor(density=0.05, **HIERARCHICAL)
    other.load_state_dict(state)
    with pytest.raises(StateMismatchError, match="hierarchical"):
        train(model, wrap(model, other), [2])


@pytest.mark.parametrize("in_step", range(3))
@pytest.mark.parametrize("complete", [True, False], ids=["all sent", "some sent"])
def test_a_state_is_loaded_while_one_rank_alone_is_in_a_step(in_step, complete):
    """The others join it, on its host and on the other one, and it meets nothing of the next."""
    trained = []
    for loads in (False, True):
        torch.manual_seed(1)
        model = net_without_vectors()
        compression = DLSCompressor(density=0.05, bucket_bytes=4000, **HIERARCHICAL)
        optimizer = wrap(model, compression, plain_sgd(model))
        train(model, optimizer, range(3))
        if loads:
            state = compression.state_dict()
            if hvd.rank() == in_step:
                out = model(batch(99)[0]) if complete else model[-1](torch.ones(2, 30))
                out.sum().backward()
            compression.load_state_dict(state)
            compression.abandon_step()
        train(model, optimizer, range(3, 6))
        trained.append(flat(model))
        assert compression.last_step().step == 6
        assert_same_on_all_ranks(flat(model))
    assert torch.equal(*trained)
