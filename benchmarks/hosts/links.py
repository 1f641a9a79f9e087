"""Links between hosts and the switch: their rates, and the bytes that pass."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from benchmarks.hosts.namespaces import configure_network

INTERFACE = "eth0"


def bits_per_second(rate: str | None) -> int | None:
    """Parses a rate.

    Args:
        rate: as in "100mbit" or "2.5gbit", from 100 kbit/s to 100 Gbit/s; None for no limit.

    Raises:
        ValueError: the rate is not of that form, or out of range.
    """
    if rate is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg])bit", rate)
    bits = float(found[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[found[2]] if found else 0
    if not 1e5 <= bits <= 1e11:
        raise ValueError(f"rate {rate!r} is not one like '100mbit', from 100kbit to 100gbit")
    return int(bits)


class Counters(NamedTuple):
    """What passed a host's interface since it was made. Bytes include Ethernet's headers.

    Where the kernel joins several packets of a stream (offloading), it counts them as one.
    """

    received_bytes: int
    received_packets: int
    sent_bytes: int
    sent_packets: int


class Link:
    """A pair of virtual interfaces: ``eth0`` of a host, and a port of the switch.

    Args:
        rack: first process of the rack, where the switch is.
        host: first process of the host.
        port: name of the interface at the switch.

    Attributes:
        rate: in each direction, as given; None for as fast as the machine can.

    Raises:
        HostsError: the interfaces cannot be made.
    """

    def __init__(self, rack: int, host: int, port: str) -> None:
        self._rack, self._host, self._port = rack, host, port
        self.rate: str | None = None
        configure_network(rack, f"ip link add {port} type veth peer name {INTERFACE} netns {host}")
        configure_network(rack, f"ip link set {port} master switch up")

    def set_rate(self, rate: str | None) -> None:
        """Changes the rate in each direction.

        Args:
            rate: see ``bits_per_second``.

        Raises:
            ValueError: see ``bits_per_second``.
        """
        bits = bits_per_second(rate)
        # What may go at once is what takes a quarter of a millisecond, or two packets: with more,
        # small messages would pass as if the link were fast; with less, a late timer would cost
        # rate. What the kernel joins stays below that, as the shaper would have to split it.
        # 50 ms of traffic, or some packets, may wait: so much a switch's buffer might hold.
        burst = max((bits or 0) // 32000, 3200)
        limit = burst + max((bits or 0) // 160, 64_000)
        joined = 65536 if bits is None else min(burst * 9 // 10, 65536)
        configure_network(self._host, f"ip link set dev {INTERFACE} gso_max_size {joined}")
        for process, device in ((self._host, INTERFACE), (self._rack, self._port)):
            if bits is not None:
                shape = f"tbf rate {bits}bit burst {burst}b limit {limit}b"
                configure_network(process, f"tc qdisc replace dev {device} root {shape}")
            elif self.rate is not None:
                configure_network(process, f"tc qdisc delete dev {device} root")
        self.rate = rate

    def counters(self) -> Counters:
        """Returns what the host's interface has received and sent so far."""
        (link,) = json.loads(configure_network(self._host, f"ip -s -j link show dev {INTERFACE}"))
        received, sent = link["stats64"]["rx"], link["stats64"]["tx"]
        return Counters(received["bytes"], received["packets"], sent["bytes"], sent["packets"])

    def cut(self) -> None:
        """Takes the link down, as if the cable were pulled."""
        configure_network(self._rack, f"ip link set {self._port} down")
