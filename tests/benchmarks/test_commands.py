"""Commands and files that the documentation names are there, and commands start."""

from __future__ import annotations

import re

import pytest

from tests.benchmarks.running import run
from tests.jobs import ROOT, needs

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = sorted((ROOT / "benchmarks").rglob("*.py"))
TEXTS = {path: path.read_text() for path in [*PAGES, *SOURCES]}
COMMAND = re.compile(r"python -m (benchmarks\.\w+)")
COMMANDS = sorted({module for text in TEXTS.values() for module in COMMAND.findall(text)})


# In one process, since most of the time is importing torch.
START = """
import contextlib, runpy, sys
for module in sys.argv[1:]:
    sys.argv[1:] = ["--help"]
    with contextlib.suppress(SystemExit):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


@needs("torch", "horovod", "sklearn")
def test_each_command_that_is_named_starts():
    usages = re.findall(r"^usage: python -m (\S+) \[-h\]", run("-c", START, *COMMANDS), re.M)
    assert usages == COMMANDS


def test_all_commands_are_named_somewhere():
    files = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"__init__"}
    packages = {path.parent.name for path in (ROOT / "benchmarks").glob("*/__main__.py")}
    assert {f"benchmarks.{name}" for name in files | packages} == set(COMMANDS)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_files_and_modules_that_a_page_names_exist(path):
    for name in re.findall(r"(?:\btests/)?\bbenchmarks/[\w/.]*\w", TEXTS[path]):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`(benchmarks(?:\.\w+)+)`", TEXTS[path]):
        place = ROOT / name.replace(".", "/")
        assert place.is_dir() or place.with_suffix(".py").exists(), name
