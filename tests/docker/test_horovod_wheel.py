"""The script that builds Horovod's wheel: everything but the minutes of compiling."""

import fcntl
import importlib.util
import json
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.docker.scripts import load

wheel_script = load("horovod_wheel")

FRAMEWORKS = {"torch": "2.13.0+cpu", "tensorflow": "2.21.0"}
CPUINFO = "model name\t: some\nflags\t\t: fpu avx avx2 fma f16c\n"


def some_inputs():
    return {
        "horovod": "0.28.1",
        "sdist_sha256": "0" * 64,
        "edits": wheel_script.edits(FRAMEWORKS, (3, 11)),
        "environment": wheel_script.build_environment(FRAMEWORKS, False, CPUINFO, {}),
        "frameworks": FRAMEWORKS,
        "mpi": None,
        "python": "CPython cpython-311-x86_64-linux-gnu",
        "machine": "x86_64",
        "libc": "glibc 2.36",
        "compiler": "g++ 12.2.0",
    }


class FakeBuilder:
    """Stands in for the compiler: leaves a small 'wheel', or fails where it is told to."""

    def __init__(self, error=None, seconds=0.0):
        self.calls, self.error, self.seconds = 0, error, seconds

    def __call__(self, inputs, work, log, sdist=None):
        self.calls += 1
        time.sleep(self.seconds)
        wheel = work / "horovod-0.28.1-cp311-cp311-linux_x86_64.whl"
        wheel.write_bytes(b"half" if self.error else b"a whole wheel")
        if self.error:
            raise self.error
        return wheel


# ---- the check


def test_what_is_built_is_imported_beside_packages_that_were_brought_along(tmp_path, monkeypatch):
    """As where psutil, without which Horovod imports nothing, comes from docker/gpu.py's bundle."""
    brought, built = tmp_path / "brought", tmp_path / "built"
    brought.mkdir()
    (brought / "needed_by_horovod.py").touch()
    package = built / "horovod"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    module = "import needed_by_horovod\ngloo_built = lambda: True\nmpi_built = lambda: False\n"
    (package / "torch.py").write_text(module)
    monkeypatch.setenv("PYTHONPATH", str(brought))
    monkeypatch.setattr(wheel_script, "PIP", [sys.executable, "-c", ""])
    inputs = {"mpi": None, "frameworks": {"torch": "2.13.0+cpu"}}
    wheel_script.check_imports(tmp_path / "a.whl", inputs, built, tmp_path / "log")


# ---- the key


def test_the_inputs_are_those_that_the_key_tests_vary():
    gathered = wheel_script.gather_inputs(FRAMEWORKS, None, {})
    assert gathered.keys() == some_inputs().keys()
    assert json.loads(json.dumps(gathered)) != {}


@pytest.mark.parametrize("name", some_inputs())
def test_key_changes_with_each_input(name):
    before = some_inputs()
    assert wheel_script.cache_key(before) == wheel_script.cache_key(some_inputs())
    assert wheel_script.cache_key({**before, name: "other"}) != wheel_script.cache_key(before)


@pytest.mark.parametrize(
    ("frameworks", "mpi", "environ", "cpuinfo"),
    [
        ({"torch": "2.13.0+cpu"}, False, {}, CPUINFO),
        (FRAMEWORKS, True, {}, CPUINFO),
        (FRAMEWORKS, False, {"CXX": "clang++"}, CPUINFO),
        (FRAMEWORKS, False, {"CXXFLAGS": "-g"}, CPUINFO),
        (FRAMEWORKS, False, {"HOROVOD_GPU_OPERATIONS": "NCCL"}, CPUINFO),
        (FRAMEWORKS, False, {}, "flags : fpu avx"),
    ],
)
def test_build_environment_tells_builds_apart(frameworks, mpi, environ, cpuinfo):
    usual = some_inputs()["environment"]
    assert wheel_script.build_environment(frameworks, mpi, cpuinfo, environ) != usual


def test_build_environment_ignores_variables_of_a_running_job():
    environ = {"HOROVOD_RANK": "1", "HOROVOD_WITH_MXNET": "1", "HOME": "/root", "MAKEFLAGS": "-n"}
    built = wheel_script.build_environment(FRAMEWORKS, False, CPUINFO, environ)
    assert built == some_inputs()["environment"]
    assert built["HOROVOD_WITHOUT_MXNET"] == "1"


def test_arch_flags_where_the_processor_says_nothing():
    assert wheel_script.arch_flags("Features : asimd") == ""


# ---- the cache


def test_second_use_builds_nothing(tmp_path):
    build = FakeBuilder()
    first = wheel_script.obtain(tmp_path, some_inputs(), build)
    assert first == wheel_script.obtain(tmp_path, some_inputs(), build)
    assert first.read_bytes() == b"a whole wheel"
    assert build.calls == 1
    manifest = json.loads((first.parent / "manifest.json").read_text())
    assert manifest["inputs"]["frameworks"] == FRAMEWORKS


def truncate(entry):
    next(entry.glob("*.whl")).write_bytes(b"a whole")


def swap_bytes(entry):
    next(entry.glob("*.whl")).write_bytes(b"A WHOLE WHEEL")


def lose_wheel(entry):
    next(entry.glob("*.whl")).unlink()


def lose_manifest(entry):
    (entry / "manifest.json").unlink()


def halve_manifest(entry):
    manifest = entry / "manifest.json"
    manifest.write_text(manifest.read_text()[:100])


def empty_manifest(entry):
    (entry / "manifest.json").write_text("[]")


def take_over_another_entry(entry):
    manifest = entry / "manifest.json"
    manifest.write_text(manifest.read_text().replace("glibc 2.36", "glibc 2.41"))


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        swap_bytes,
        lose_wheel,
        lose_manifest,
        halve_manifest,
        empty_manifest,
        take_over_another_entry,
    ],
)
def test_broken_entry_is_reported_and_rebuilt(tmp_path, capsys, damage):
    build = FakeBuilder()
    wheel = wheel_script.obtain(tmp_path, some_inputs(), build)
    damage(wheel.parent)
    again = wheel_script.obtain(tmp_path, some_inputs(), build)
    assert build.calls == 2
    assert again.read_bytes() == b"a whole wheel"
    assert wheel_script.verified(again.parent) == again
    assert "broken" in capsys.readouterr().err


@pytest.mark.parametrize("error", [wheel_script.WheelError("no"), KeyboardInterrupt()])
def test_failed_or_interrupted_build_leaves_only_its_log(tmp_path, error):
    with pytest.raises(type(error)):
        wheel_script.obtain(tmp_path, some_inputs(), FakeBuilder(error))
    assert {path.suffix for path in tmp_path.iterdir()} == {".lock", ".log"}
    assert wheel_script.obtain(tmp_path, some_inputs(), FakeBuilder()).exists()


def test_leftovers_of_a_killed_build_are_removed(tmp_path):
    leftover = tmp_path / f"{wheel_script.cache_key(some_inputs())}.abc.partial"
    leftover.mkdir()
    (leftover / "half.o").touch()
    wheel_script.obtain(tmp_path, some_inputs(), FakeBuilder())
    assert not leftover.exists()


def test_two_at_once_build_once(tmp_path, capsys):
    build = FakeBuilder(seconds=2)
    wheels = []
    threads = [
        threading.Thread(
            target=lambda: wheels.append(wheel_script.obtain(tmp_path, some_inputs(), build))
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert build.calls == 1
    assert len(set(wheels)) == 1
    assert "waiting" in capsys.readouterr().err


def test_lock_is_released_by_an_error(tmp_path):
    path = tmp_path / "lock"
    with pytest.raises(ValueError, match="inside"), wheel_script.locked(path):
        raise ValueError("inside")
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_cache_follows_xdg(tmp_path):
    root = wheel_script.cache_root({"XDG_CACHE_HOME": str(tmp_path)})
    assert root == tmp_path / "hvd_dls" / "wheels"
    assert wheel_script.cache_root({}) == Path.home() / ".cache" / "hvd_dls" / "wheels"


# ---- what the machine offers


def test_missing_tools_are_named_all_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(wheel_script.WheelError) as error:
        wheel_script.check_machine({}, str(tmp_path), needs_venv=True)
    assert "apt-get install g++ make cmake python3-dev python3-venv" in str(error.value)
    with pytest.raises(wheel_script.WheelError, match=r"python3-dev$"):
        wheel_script.check_machine({}, str(tmp_path), needs_venv=False)


def test_the_compiler_in_cxx_counts(tmp_path, monkeypatch):
    for tool in ("make", "cmake", "my-c++"):
        (tmp_path / tool).touch(mode=0o755)
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    wheel_script.check_machine({"CXX": "my-c++ -m64"}, str(tmp_path), needs_venv=False)
    with pytest.raises(wheel_script.WheelError, match=r"install g\+\+$"):
        wheel_script.check_machine({}, str(tmp_path), needs_venv=False)


def test_missing_python_packages_are_named_as_pip_knows_them(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name not in ("yaml", "cffi"))
    with pytest.raises(wheel_script.WheelError, match="pip install cffi pyyaml"):
        wheel_script.check_python_needs()


def test_framework_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(wheel_script, "FRAMEWORKS", {"torch": ("PYTORCH", ("no-such-package",))})
    with pytest.raises(wheel_script.WheelError, match="torch"):
        wheel_script.installed_frameworks(["torch"])
    with pytest.raises(wheel_script.WheelError, match="torch or tensorflow"):
        wheel_script.installed_frameworks([])


def test_mpi_forced_without_open_mpi(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert wheel_script.open_mpi(None) is None
    assert wheel_script.open_mpi(False) is None
    with pytest.raises(wheel_script.WheelError, match="libopenmpi-dev"):
        wheel_script.open_mpi(True)


# ---- the source archive


@pytest.mark.parametrize("content", [b"", b"not the archive"])
def test_archive_with_another_hash_is_refused(tmp_path, monkeypatch, content):
    def fake_download(command, log):
        (tmp_path / "horovod-0.28.1.tar.gz").write_bytes(content)

    monkeypatch.setattr(wheel_script, "run_logged", fake_download)
    with pytest.raises(wheel_script.WheelError, match=wheel_script.SDIST_SHA256):
        wheel_script.download_sdist(tmp_path, tmp_path / "log")


def test_an_archive_at_hand_is_checked_and_nothing_is_downloaded(tmp_path, monkeypatch):
    def refuse(*_):
        pytest.fail("downloads")

    monkeypatch.setattr(wheel_script, "download_sdist", refuse)
    sdist = tmp_path / "horovod-0.28.1.tar.gz"
    sdist.write_bytes(b"not the archive")
    with pytest.raises(wheel_script.WheelError, match=wheel_script.SDIST_SHA256):
        wheel_script.build_wheel(some_inputs(), tmp_path, tmp_path / "log", sdist)


# ---- the command


def test_command_prints_the_wheel_last(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(wheel_script, "check_machine", lambda *_, **__: None)
    monkeypatch.setattr(wheel_script.signal, "signal", lambda *_: None)
    monkeypatch.setattr(wheel_script, "installed_frameworks", lambda _: FRAMEWORKS)
    monkeypatch.setattr(wheel_script, "build_wheel", FakeBuilder())
    assert wheel_script.main([]) == 0
    assert Path(capsys.readouterr().out.splitlines()[-1]).read_bytes() == b"a whole wheel"


def test_command_reports_errors_without_a_traceback(monkeypatch, capsys):
    def refuse(*_, **__):
        raise wheel_script.WheelError("install g++")

    monkeypatch.setattr(wheel_script, "check_machine", refuse)
    monkeypatch.setattr(wheel_script.signal, "signal", lambda *_: None)
    assert wheel_script.main(["--check"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error: install g++" in captured.err


def test_unknown_framework_is_a_usage_error(capsys):
    with pytest.raises(SystemExit):
        wheel_script.parse(["--frameworks", "torch,mxnet"])
    assert "mxnet" in capsys.readouterr().err
