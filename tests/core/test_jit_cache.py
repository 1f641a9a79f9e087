"""Compiled loops on disk: found again by the same sources only, and never in the way."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hvd_dls.core import disk_cache
from hvd_dls.core.disk_cache import KEPT, DiskCache
from hvd_dls.core.jit import HAVE_NUMBA
from tests.jobs import ROOT

needs_numba = pytest.mark.skipif(not HAVE_NUMBA, reason="there is no numba that works")

# A loop in one file that compiles in what another one says.
LOOP = """
from hvd_dls.core.jit import jit
from hvd_dls.core.other import FACTOR

@jit
def times(x):
    return FACTOR * x
"""
CALL = """
import logging, sys, tempfile
logging.basicConfig(format="%(name)s: %(message)s")
import numpy as np
import hvd_dls.core.selection.passes  # decorates all loops there are
from hvd_dls.core.loop import times

for name in sys.argv[1:]:
    print(times(np.dtype(name).type(3)), end=" ")
print(sum(times.stats.cache_hits.values()))
"""
NOWHERE = "/dev/null/nowhere"


@pytest.fixture
def package(tmp_path):
    """A folder with a copy of the package that has one more loop."""
    folder = tmp_path / "site"
    shutil.copytree(
        ROOT / "hvd_dls", folder / "hvd_dls", ignore=shutil.ignore_patterns("__pycache__")
    )
    (folder / "hvd_dls" / "core" / "loop.py").write_text(LOOP)
    say(folder, 2)
    return folder


def say(package, factor):
    (package / "hvd_dls" / "core" / "other.py").write_text(f"FACTOR = {factor}\n")


def make_unwritable(package):
    """As a read-only installation, for root, too: no folder can be made for what is compiled."""
    for folder in (package / "hvd_dls", *(package / "hvd_dls").rglob("*/")):
        if folder.is_dir():
            (folder / "__pycache__").write_text("not a folder")


def start(package, *names, before="", **environment):
    return subprocess.Popen(
        [sys.executable, "-c", before + CALL, *names],
        cwd=package,
        env={
            **os.environ,
            "PYTHONPATH": str(package),
            "HOME": NOWHERE,
            "XDG_CACHE_HOME": NOWHERE,
            "NUMBA_CACHE_DIR": "",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(job):
    """What the loop returned; how many signatures came from disk; the log."""
    output, log = job.communicate()
    assert job.returncode == 0, log
    *results, hits = output.split()
    return [float(r) for r in results], int(hits), log


def call(package, *names, **options):
    return ended(start(package, *(names or ["float64"]), **options))


def entries(folder):
    return [path for path in folder.rglob("loops-*/*") if "core.loop.times" in path.name]


# Which code --------------------------------------------------------------------------------------


@needs_numba
def test_later_processes_find_what_was_compiled_from_the_same_sources_in_all_files(package):
    assert call(package) == ([6.0], 0, "")
    assert call(package) == ([6.0], 1, "")
    assert len(entries(package / "hvd_dls" / "__pycache__")) == 1
    say(package, 5)
    assert call(package) == ([15.0], 0, "")
    say(package, 2)
    assert call(package) == ([6.0], 1, "")


@needs_numba
def test_processes_that_start_at_once_do_not_take_one_signature_for_another(package):
    names = ["float32", "float64", "int32", "int64"]
    expected = ([6.0] * len(names), len(names), "")
    jobs = [start(package, *names[i:], *names[:i]) for i in range(3)]
    for results, _, log in map(ended, jobs):
        assert (results, log) == (expected[0], "")
    assert call(package, *names) == expected
    assert len(entries(package)) == len(names)
    assert not [*package.rglob("*.unfinished")]


@needs_numba
def test_damaged_entries_are_compiled_again(package):
    names = ["float32", "float64", "int64"]
    call(package, *names)
    empty, half, changed = entries(package)
    empty.write_bytes(b"")
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    changed.write_bytes(changed.read_bytes()[:-1] + b"?")
    assert call(package, *names) == ([6.0] * 3, 0, "")
    assert call(package, *names) == ([6.0] * 3, 3, "")


def test_the_digest_covers_content_names_and_versions(tmp_path):
    def write(name, content):
        (tmp_path / name).write_text(content)
        return disk_cache.digest(tmp_path, "numba 1")

    with pytest.raises(FileNotFoundError, match="no sources"):
        disk_cache.digest(tmp_path)
    seen = [write("a.py", "1"), write("a.py", "2"), write("b.py", "2"), write("b.py", "")]
    (tmp_path / "b.py").rename(tmp_path / "c.py")
    seen += [disk_cache.digest(tmp_path, "numba 1"), disk_cache.digest(tmp_path, "numba 2")]
    assert len(set(seen)) == len(seen)
    assert write("notes.txt", "of no importance") == seen[-2]


# Where -------------------------------------------------------------------------------------------


@needs_numba
@pytest.mark.parametrize(
    ("variable", "folder"),
    [
        ("HOME", ".cache/hvd_dls/compiled"),
        ("XDG_CACHE_HOME", "hvd_dls/compiled"),
        ("TMPDIR", f"hvd_dls-{os.geteuid()}"),
        ("NUMBA_CACHE_DIR", "hvd_dls"),
    ],
)
def test_a_read_only_installation_uses_a_folder_of_the_user(package, tmp_path, variable, folder):
    make_unwritable(package)
    place = {variable: str(tmp_path / "place")}
    if variable == "HOME":
        place["XDG_CACHE_HOME"] = ""
    (tmp_path / "place").mkdir()
    assert call(package, **place) == ([6.0], 0, "")
    assert call(package, **place) == ([6.0], 1, "")
    assert len(entries(tmp_path / "place" / folder)) == 1


@needs_numba
def test_where_nothing_can_be_written_loops_are_compiled_in_memory(package):
    make_unwritable(package)
    before = "import tempfile; tempfile.tempdir = '/dev/null'\n"
    results, hits, log = call(package, "float64", "int64", before=before)
    assert (results, hits) == ([6.0, 6.0], 0)
    assert log.count("hvd_dls: compiled loops are not kept on disk") == 1
    assert "no directory can be written to" in log


@needs_numba
def test_what_another_user_may_have_written_is_not_executed(package, tmp_path):
    make_unwritable(package)
    place = {"TMPDIR": str(tmp_path)}
    call(package, **place)
    folder = tmp_path / f"hvd_dls-{os.geteuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    results, hits, log = call(package, **place)
    assert (results, hits) == ([6.0], 0)
    assert "not kept on disk" in log


@needs_numba
@pytest.mark.parametrize("internal", ["NullCache", "_cache", "_reduce"])
def test_another_numba_may_lack_what_the_cache_needs(package, internal):
    file = package / "hvd_dls" / "core" / "compile_cache.py"
    source = file.read_text()
    assert internal in source
    file.write_text(source.replace(internal, f"{internal}_that_there_is_not"))
    results, hits, log = call(package)
    assert (results, hits) == ([6.0], 0)
    assert log.count("compiled loops are not kept on disk") == 1


# How much -----------------------------------------------------------------------------------------


def test_only_the_folders_used_last_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_cache, "PACKAGE", Path(NOWHERE))
    for i in range(KEPT + 4):
        cache = DiskCache(f"{i:x}", str(tmp_path))
        assert cache.write("entry", b"%d" % i)
        (folder,) = tmp_path.glob(f"hvd_dls/loops-*-{i:x}")
        os.utime(folder, (i, i))
        if i == KEPT - 1:  # used again: the second one, so that it outlives the third
            assert DiskCache("1", str(tmp_path)).read("entry") == b"1"
    left = {path.name.split("-")[-1] for path in tmp_path.glob("hvd_dls/loops-*")}
    assert len(left) == KEPT
    assert {"1", f"{KEPT + 3:x}"} <= left
    assert not {"0", "2"} & left
    assert DiskCache("0", str(tmp_path)).read("entry") is None
    assert not [*tmp_path.rglob("*.unfinished")]
