"""The scripts in docker/, for their tests."""

import importlib
import sys
from pathlib import Path

import pytest

DOCKER = Path(__file__).parents[2] / "docker"


@pytest.fixture(scope="module")
def modules():
    """The scripts in docker/ are no package: they import each other by their bare names."""
    names = ("matrix", "engines", "machine", "report", "bootstrap_base")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCKER))
        yield {name: importlib.import_module(name) for name in names}
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture
def matrix(modules):
    return modules["matrix"]


@pytest.fixture
def engines(modules):
    return modules["engines"]


@pytest.fixture
def machine(modules):
    return modules["machine"]


@pytest.fixture
def report(modules):
    return modules["report"]
