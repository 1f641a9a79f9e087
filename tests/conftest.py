"""What is collected, and how workers share it (``make test``; pytest-xdist, --dist loadgroup)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Tests in folders named with_... run inside horovodrun jobs only: see tests/jobs.py.
if not {"HOROVOD_RANK", "OMPI_COMM_WORLD_RANK"} & set(os.environ):  # Gloo, MPI
    collect_ignore_glob = ["*/with_*", "*/with_*/*"]

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
