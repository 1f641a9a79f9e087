"""Measurements that several tests look at."""

from __future__ import annotations

import pytest

from tests.benchmarks.running import PNG, QUICK, run


@pytest.fixture(scope="session")
def exchange_file(tmp_path_factory):
    """The file that a short run of the exchange benchmark has left."""
    folder = tmp_path_factory.mktemp("exchange")
    files = ["--json", f"{folder}/x.json", "--picture", f"{folder}/x.png"]
    methods = ["--methods", "dls:0.05", "--profile-steps", "2"]
    output = run("-m", "benchmarks.exchange", *QUICK, *methods, *files)
    assert "| DLS, 5.0% |" in output
    assert "Where a step with DLS, 5.0% goes" in output
    assert (folder / "x.png").read_bytes().startswith(PNG)
    return folder / "x.json"
