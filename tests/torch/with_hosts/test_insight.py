"""Statistics where ranks average with those of their host first."""

from dataclasses import asdict

import horovod.torch as hvd

from hvd_dls.core.session.stopwatch import PARTS
from hvd_dls.torch import DLSCompressor
from tests.torch.with_hosts.test_hierarchical import HIERARCHICAL, HOSTS, plain_sgd
from tests.torch.with_ranks.training import net, train, wrap


def test_what_goes_inside_the_host_is_told_apart_from_what_leaves_it():
    model = net()
    compression = DLSCompressor(density=0.05, **HIERARCHICAL)
    train(model, wrap(model, compression, plain_sgd(model)), range(6))
    stats = compression.stats(window=4)
    period = stats.window
    hosts = HOSTS[hvd.size()]
    alone = hosts[0] == 1 and hvd.rank() == 0
    ranks, dense = hvd.size(), period.dense_bytes
    ring = 2 * (ranks - 1) / ranks
    assert period.link_bytes == round((len(hosts) - 1) * period.sparse_bytes + ring * dense)
    seconds = asdict(period.seconds)
    assert seconds["average"] > 0
    if period.payloads:  # this rank owns a bucket
        assert all(seconds[part] > 0 for part in PARTS if part != "wait")
    else:
        assert seconds["pack"] == 0
    assert 0 < seconds["total"] <= 1.001 * period.elapsed
    if alone:
        assert period.host_bytes == 0
    else:
        whole = sum(p.numel() * 4 for p in model.parameters() if p.dim() > 1)
        assert period.host_bytes > 4 * whole
    assert "inside the host" in str(stats) or alone
