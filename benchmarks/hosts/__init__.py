"""Hosts with slow links, simulated on this machine by kernel namespaces, and jobs on them.

Modules, each importing only those before it:
    environment: What hosts need of this machine, and the environment of commands.
    namespaces: Making and entering kernel namespaces.
    links: Rates and counters of the links.
    host: One host, and commands on it.
    cluster: All hosts, and the switch between them.
    jobs: Horovod jobs, here or on hosts.
"""

from benchmarks.hosts.cluster import Hosts, why_not
from benchmarks.hosts.host import Host
from benchmarks.hosts.links import INTERFACE, Counters, bits_per_second
from benchmarks.hosts.namespaces import HostsError

__all__ = [
    "INTERFACE",
    "Counters",
    "Host",
    "Hosts",
    "HostsError",
    "bits_per_second",
    "why_not",
]
