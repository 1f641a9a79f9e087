"""Hosts with slow links, simulated on this machine, and jobs that run on them."""

from benchmarks.hosts.cluster import INTERFACE, Host, Hosts, HostsError, bits_per_second, why_not

__all__ = ["INTERFACE", "Host", "Hosts", "HostsError", "bits_per_second", "why_not"]
