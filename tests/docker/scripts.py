"""The scripts in docker/ are no package: they import each other by their bare names."""

import importlib
import sys
from pathlib import Path
from unittest import mock

DOCKER = Path(__file__).parents[2] / "docker"


def load(name):
    """A script as a module."""
    with mock.patch.object(sys, "path", [str(DOCKER), *sys.path]):
        return importlib.import_module(name)
