"""Runs a command on hosts with slow links, all simulated on this Linux machine.

    python -m benchmarks.hosts --hosts 4 --rate 100mbit -- horovodrun -np 4 python train.py

Each host has its own name (host0, host1, ...), address, network interface `eth0`, processes and
sshd; a switch joins them. Files, processors and memory are this machine's, and there is no way out
of that network. Every host can `ssh` to every other without a question. The command is run on
host0. If it is horovodrun without hosts of its own, it is told which hosts there are; in arguments
of other commands, `{hosts}` becomes host0:1,host1:1,...

Nothing outside is changed, and nothing is left behind. Needs root, and Debian's packages iproute2,
openssh-server and openssh-client.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.command_line import make_parser
from benchmarks.hosts import Hosts, HostsError


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = make_parser("hosts", __doc__)
    rate = "of each link, in each direction, as in 100mbit (default: as fast as can be)"
    slots = "processes for each host, as in 1,1,2 (default: 1 each)"
    parser.add_argument("--hosts", type=int, default=2, help="number of hosts (default: 2)")
    parser.add_argument("--rate", help=rate)
    parser.add_argument("--slots", type=lambda text: [*map(int, text.split(","))], help=slots)
    parser.add_argument("command", nargs="+", help="put -- before it")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status as a shell would."""
    options = parse(arguments)
    try:
        with Hosts(options.hosts, options.rate) as hosts:
            slots = hosts.slots(options.slots)
            program, *rest = (word.replace("{hosts}", slots) for word in options.command)
            if Path(program).name == "horovodrun":  # its own options come later and win
                rest = [*hosts.horovodrun_options(options.slots), *rest]
            status = hosts[0].popen([program, *rest]).wait()
    except (HostsError, ValueError) as problem:
        print(f"hosts: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
