"""Links have the rate that was asked for, and count what passes."""

from __future__ import annotations

import pytest

from benchmarks.hosts import INTERFACE, Hosts, bits_per_second
from tests.benchmarks.hosts.helpers import LIMIT, transfer
from tests.benchmarks.running import needs_hosts


def is_shaped(host):
    """Whether the kernel limits what a host sends."""
    return " tbf " in host.run(["tc", "qdisc", "show", "dev", INTERFACE], LIMIT).stdout


@needs_hosts
def test_the_rate_holds_in_each_direction_and_can_be_changed(hosts):
    """How fast a link without a rate is depends on what else the machine does."""
    hosts[0].set_rate("1gbit")
    assert transfer(hosts[0], hosts[1], 50_000_000) > 0.3  # 0.4 s
    hosts[0].set_rate("10mbit")
    assert transfer(hosts[0], hosts[1], 1_000_000) > 0.6  # 0.8 s
    assert transfer(hosts[1], hosts[0], 1_000_000) > 0.6
    assert [is_shaped(host) for host in hosts] == [True, False, False]
    hosts[0].set_rate(None)
    assert not is_shaped(hosts[0])
    assert hosts[0].rate is None


@needs_hosts
def test_counters_count_what_is_sent_and_received(hosts):
    before = [host.counters() for host in hosts]
    transfer(hosts[0], hosts[1], 10_000_000)
    after = [host.counters() for host in hosts]
    sent, received, idle = (
        [new - old for new, old in zip(*pair, strict=True)]
        for pair in zip(after, before, strict=True)
    )
    assert 10_000_000 < sent[2] < 11_000_000
    assert 10_000_000 < received[0] < 11_000_000
    assert sent[3] > 100
    assert received[1] > 100
    assert idle[0] < 10_000
    assert idle[2] < 10_000


@pytest.mark.parametrize(
    "rate", ["fast", "", "100", "100 mbit", "-1mbit", "1kbit", "1000gbit", "mbit"]
)
def test_rates_that_cannot_be(rate):
    with pytest.raises(ValueError, match="is not one like '100mbit'"):
        Hosts(2, rate)


def test_rates_in_bits_per_second():
    rates = [bits_per_second(rate) for rate in ("100mbit", "2.5gbit", "500kbit", None)]
    assert rates == [10**8, 2_500_000_000, 500_000, None]
