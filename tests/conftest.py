"""What is collected, how workers share it by pytest-xdist, Hypothesis's settings."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Tests in folders named with_... run inside horovodrun jobs only: see tests/jobs.py.
if not {"HOROVOD_RANK", "OMPI_COMM_WORLD_RANK"} & set(os.environ):  # Gloo, MPI
    collect_ignore_glob = ["*/with_*", "*/with_*/*"]

# The same examples in every run, however slow the machine is.
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "deterministic", derandomize=True, deadline=None, max_examples=60, suppress_health_check=SLOW
)
# To look for more: HYPOTHESIS_PROFILE=explore pytest tests/core
settings.register_profile(
    "explore", deadline=None, max_examples=1000, suppress_health_check=SLOW, print_blob=True
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "deterministic"))

# What takes longest begins first, so that workers end at about the same time.
LONGEST_FIRST = ("tensorflow", "keras", "elastic", "multihost", "examples", "torch", "benchmarks")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Workers begin with what takes longest; what shares a costly fixture goes to one of them."""
    if not hasattr(config, "workerinput"):
        return
    items.sort(key=_place)
    for item in items:
        if shared := _shared_fixtures(item):
            item.add_marker(pytest.mark.xdist_group(" ".join(shared)))


def _place(item: pytest.Item) -> int:
    folder = item.path.relative_to(Path(__file__).parent).parts[0]
    return (*LONGEST_FIRST, folder).index(folder)


def _shared_fixtures(item: pytest.Item) -> list[str]:
    """Fixtures of our own that are made once for several tests."""
    definitions = item._fixtureinfo.name2fixturedefs.values()
    shared = (fixture for (*_, fixture) in definitions if fixture.scope != "function")
    return sorted({f"{x.baseid}::{x.argname}" for x in shared if x.baseid})
