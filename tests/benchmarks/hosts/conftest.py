"""Hosts to test with, and a guard that nothing of them is left."""

from __future__ import annotations

import random
import time

import pytest

from benchmarks.hosts import Hosts
from tests.benchmarks.hosts.helpers import marked, outside


@pytest.fixture(scope="session")
def hosts():
    """Three hosts that all tests share."""
    with Hosts(3) as made:
        yield made


@pytest.fixture(autouse=True)
def _full_speed(request):
    """Takes the rates away that a test has set."""
    yield
    if "hosts" in request.fixturenames:
        for host in request.getfixturevalue("hosts"):
            host.set_rate(None)


@pytest.fixture
def mark(monkeypatch):
    """A number for `sleep`; afterwards, nothing may be left of what was started meanwhile."""
    mark = str(random.randrange(10**8, 10**9))
    monkeypatch.setenv("STARTED_BY_TEST", mark)
    before = outside()
    yield mark
    deadline = time.monotonic() + 600  # for clean-up by the kernel, when nobody could wait for it
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left
    assert outside() == before
