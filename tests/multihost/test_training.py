"""Training across several hosts: the laws hold, and the links carry what the compressor says."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from benchmarks.hosts import Hosts, bits_per_second
from tests.jobs import JOB, needs
from tests.multihost import launch

pytestmark = launch.needs_hosts

SLOW = "10mbit"


class Job(NamedTuple):
    """
    Attributes:
        per_host: number of ranks for each of the four hosts.
        slow: the host whose link is slow, or None.
    """

    framework: str
    controller: str
    per_host: tuple[int, ...]
    slow: int | None = None

    def __str__(self) -> str:
        slow = "" if self.slow is None else f"-host{self.slow}-slow"
        return f"{self.framework}-{self.controller}-{'+'.join(map(str, self.per_host))}{slow}"


JOBS = [
    Job("torch", "gloo", (1, 1, 1, 1)),
    Job("torch", "gloo", (1, 3, 0, 0), slow=1),
    Job("torch", "mpi", (2, 1, 0, 1), slow=3),
    Job("tensorflow", "gloo", (1, 2, 0, 0)),
    Job("tensorflow", "mpi", (1, 1, 0, 0), slow=1),
]


@pytest.fixture(scope="module")
def hosts():
    with Hosts(4) as made:
        yield made


@pytest.fixture(scope="module")
def seen():
    """What jobs of the same framework and number of ranks came to."""
    return {}


@pytest.mark.parametrize(
    "job", [pytest.param(job, marks=needs(job.framework), id=str(job)) for job in JOBS]
)
def test_the_laws_hold_and_links_carry_what_the_compressor_says(job, hosts, seen, tmp_path):
    for number, host in enumerate(hosts):
        host.set_rate(SLOW if number == job.slow else None)
    before = [host.counters() for host in hosts]
    program = f"{job.framework}_program.py"
    command = launch.horovodrun(hosts, job.controller, job.per_host, program, tmp_path)
    reports = launch.run(hosts, command, tmp_path, time_limit=JOB)
    after = [host.counters() for host in hosts]

    placed = [report["host"] for report in reports]
    assert placed == [f"host{h}" for h, ranks in enumerate(job.per_host) for _ in range(ranks)]
    agree(reports)
    for report in reports:
        if report["local_rank"] == 0:
            carried(report, job)
    for number, ranks in enumerate(job.per_host):
        received = after[number].received_bytes - before[number].received_bytes
        if ranks == 0:
            assert received < 20_000, "this host has no part in it"
    # All of this model is sparse, so that not even the order of sums can differ.
    if job.framework == "torch":
        came_to = reports[0]["without_vectors"]
        assert came_to == seen.setdefault(len(reports), came_to), "another network, other results"


def agree(reports: list[dict[str, Any]]) -> None:
    """Parameters and ratios are the same to the bit on all ranks."""
    for part in reports[0].keys() & {"with_vectors", "without_vectors", "eager", "traced"}:
        assert all(report[part] == reports[0][part] for report in reports)
        assert reports[0][part]["after"] != reports[0][part]["before"]
    assert all(report["traffic"]["k"] == reports[0]["traffic"]["k"] for report in reports)


def carried(report: dict[str, Any], job: Job) -> None:
    """A host's link has carried what must cross it, and not much more."""
    took, said = report["traffic"]["took"], report["traffic"]["said"]
    ranks, here = report["size"], report["local_size"]
    print(f"{report['host']}, {here} of {ranks} ranks: {took}, said {said}")
    # At least, what other hosts have comes in once. At most, each rank here has a ring of its own;
    # a tenth for headers and retransmissions; and Horovod's negotiation, a thousand times a second
    # with each rank, some hundred bytes with their headers and acknowledgements.
    least = (ranks - here) * said["sparse"] + said["dense"]
    ring = (ranks - 1) * said["sparse"] + 2 * (ranks - 1) / ranks * said["dense"]
    assert least < took["received"] < 1.1 * here * ring + 150_000 * ranks * took["seconds"]
    if job.slow is not None and report["host"] == f"host{job.slow}":
        assert took["seconds"] > 8 * took["received"] / bits_per_second(SLOW) * 0.9
