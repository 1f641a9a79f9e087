"""Settings of the core's tests: the same examples in every run, and no warning goes unnoticed."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "deterministic", derandomize=True, deadline=None, max_examples=60, suppress_health_check=SLOW
)
# To look for more: HYPOTHESIS_PROFILE=explore pytest tests/core
settings.register_profile(
    "explore", deadline=None, max_examples=1000, suppress_health_check=SLOW, print_blob=True
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "deterministic"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("error"), append=False)
