"""``hvd_dls.torch.advise`` where hosts have several ranks."""

from __future__ import annotations

from hvd_dls.torch import advise
from tests.torch.with_ranks.test_advising import QUICK, loss_of
from tests.torch.with_ranks.training import net


def test_hosts_that_send_as_one_are_tried_too():
    advice = advise(net(), loss_of, **QUICK)
    names = [row.candidate.name for row in advice.rows]
    assert names == ["dense", "fp16", "dls:0.1", "dls:0.1:hierarchical"]
    flat, between_hosts = advice.rows[2:]
    assert between_hosts.link_bytes < flat.link_bytes
    assert not advice.unavailable
    assert (advice.hosts, advice.local_size) == (2, 2)
