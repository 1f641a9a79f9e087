"""``hvd.shutdown(); hvd.init()`` in a training of three ranks: with as many, fewer and more ranks.

Run by tests/torch/test_lifecycle.py, over Gloo.  What elastic Horovod does to begin anew is done
here step by step, so that it is known what each rank holds.  The last rank leaves in between; its
place is taken by a new process, which knows of nothing.
"""

import copy
import itertools
import os
import sys

import horovod.torch as hvd
import pytest
import torch
from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
from horovod.runner.http.http_server import RendezvousServer

from hvd_dls.torch import DLSCompressor
from tests.store import wait_for_all
from tests.torch.with_ranks.training import (
    SPARSE,
    assert_same_on_all_ranks,
    flat,
    net_without_vectors,
    train,
    wrap,
)

NEWCOMER = "HVD_DLS_TEST_NEWCOMER"


def rendezvous(ranks: int) -> int:
    """Port of a new meeting place; Horovod's own one remembers where ranks were before."""
    server = RendezvousServer()
    port = server.start()
    server.init(get_host_assignments(parse_hosts(f"localhost:{ranks}"), ranks))
    return port


def restart(port: int, ranks: int) -> None:
    hvd.shutdown()
    os.environ |= {
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
        "HOROVOD_SIZE": str(ranks),
        "HOROVOD_LOCAL_SIZE": str(ranks),
    }
    hvd.init()


def start(seed=1):
    torch.manual_seed(seed)
    model = net_without_vectors()
    # A payload for each layer: some are on their way where a step is cut short.
    compression = DLSCompressor(density=0.05, bucket_bytes=1, **SPARSE)
    return model, compression, wrap(model, compression)


def residuals(compression):
    (state,) = compression.state_dict()["models"]
    return copy.deepcopy(state["residuals"])


def assert_equal(found, expected, factor=1.0):
    for name, residual in expected.items():
        assert residual.any()
        torch.testing.assert_close(found[name], residual * factor, rtol=1e-6, atol=0)


_cuts = itertools.count()


class StoppedError(Exception):
    """What a user's code raises."""


def cut_short(model, optimizer):
    """An exception in the middle of backward on every rank.

    None leaves before all are here: Horovod itself hangs now and then where a rank hands a gradient
    over in the very moment in which another shuts down (the one waits for the table of process sets
    and keeps the interpreter's lock, for which the thread waits that has the table).
    """

    def stop(gradient):
        raise StoppedError

    hook = model[2].weight.register_hook(stop)
    with pytest.raises(StoppedError):
        train(model, optimizer, [7])
    hook.remove()
    wait_for_all(f"cut.{next(_cuts)}", hvd.rank(), hvd.size())


def with_as_many_ranks(ports):
    """The same bits as without a restart, wherever it was."""
    model, _, optimizer = start()
    train(model, optimizer, range(8))
    expected = flat(model)
    model, compression, optimizer = start()
    train(model, optimizer, range(2))

    before = residuals(compression)
    restart(next(ports), 3)  # between steps
    assert_equal(residuals(compression), before)
    train(model, optimizer, range(2, 4))

    before = residuals(compression)
    cut_short(model, optimizer)
    restart(next(ports), 3)  # within a step; elastic restores what was committed
    optimizer.load_state_dict(optimizer.state_dict())
    assert_equal(residuals(compression), before)
    train(model, optimizer, range(4, 6))

    cut_short(model, optimizer)
    restart(next(ports), 3)
    compression.abandon_step()
    train(model, optimizer, range(6, 8))
    assert torch.equal(flat(model), expected)
    assert_same_on_all_ranks(flat(model))
    told("as many ranks")
    return model, compression, optimizer


def with_one_rank_less(port, model, compression, optimizer):
    """What waits in residuals weighs as much as before, although sums are divided by 2 now."""
    before = residuals(compression)
    restart(port, 2)
    train(model, optimizer, [8])  # the ranks agree in it, so residuals are looked at before
    assert compression.last_step().step == 9
    assert not torch.equal(residuals(compression)["1.weight"], before["1.weight"])
    train(model, optimizer, range(9, 11))
    assert_same_on_all_ranks(flat(model))
    told("fewer ranks")


def with_a_new_rank(port, model, compression, optimizer):
    newcomer = NEWCOMER in os.environ
    if not newcomer:
        before = residuals(compression)
        step = compression.last_step().step
        restart(port, 3)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    images = torch.randn(2, 3, 4, 4)
    optimizer.zero_grad()
    model(images).sum().backward()
    (state,) = compression.state_dict()["models"]
    if newcomer:
        assert not any(residual.any() for residual in state["residuals"].values())
    else:
        assert_equal(state["residuals"], before, 3 / 2)
        assert state["step"] == step
    optimizer.step()
    train(model, optimizer, range(11, 14))
    assert_same_on_all_ranks(flat(model))
    assert_same_on_all_ranks(torch.tensor(compression.last_step().k))
    told("more ranks")


def told(what):
    print(f"rank {hvd.rank()} went on with {what}", flush=True)


def main():
    if NEWCOMER in os.environ:
        hvd.init()
        with_a_new_rank(None, *start(seed=99))
        return
    hvd.init()
    sizes = [3, 3, 3, 2, 3]
    ports = [rendezvous(ranks) for ranks in sizes] if hvd.rank() == 0 else None
    ports = hvd.broadcast_object(ports, name="ports")
    training = with_as_many_ranks(iter(ports[:3]))
    if hvd.rank() == 2:
        hvd.shutdown()
        os.environ |= {NEWCOMER: "1", "HOROVOD_GLOO_RENDEZVOUS_PORT": str(ports[4])}
        os.execv(sys.executable, [sys.executable, *sys.argv])
    with_one_rank_less(ports[3], *training)
    with_a_new_rank(ports[4], *training)


if __name__ == "__main__":
    main()
