"""``hvd_dls.torch.advise`` where hosts have several ranks."""

from __future__ import annotations

import horovod.torch as hvd

from hvd_dls.torch import advise
from tests.torch.with_ranks.test_advising import QUICK, loss_of
from tests.torch.with_ranks.training import net


def test_hosts_that_send_as_one_are_advised_too():
    advice = advise(net(), loss_of, **QUICK)
    names = [row.candidate.name for row in advice.rows]
    # Owners are tried from four senders on: there may be four ranks, and are two hosts.
    owners = ["dls:0.1:sparse_allreduce"] if hvd.size() == 4 else []
    assert names == ["dense", "fp16", "dls:0.1", "dls:0.1:hierarchical", *owners]
    flat, *others = advice.rows[2:]
    assert all(row.link_bytes < flat.link_bytes for row in others)
    assert not advice.unavailable
    assert (advice.hosts, advice.local_size) == (2, hvd.local_size())
