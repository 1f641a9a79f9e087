"""What is seen of a long build: progress, and the log's end when it fails."""

import io
import shutil
import sys
import time
from pathlib import Path

import pytest

from tests.docker.scripts import load

wheel_script = load("horovod_wheel")

CMAKE_OUTPUT = [
    "-- Configuring done",
    "[  1%] Building CXX object a.o",
    "[  9%] Building CXX object b.o",
    "  [ 10%] Building CXX object c.o",
    "[ 9%] Building CXX object late.o",
    "warning: [45%] is no progress",
    "[ 31%] Building CXX object d.o",
    "[100%] Linking",
]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def progress_of(stream):
    progress = wheel_script.Progress(stream, clock=iter(range(0, 10_000, 61)).__next__)
    for line in CMAKE_OUTPUT:
        progress.feed(line)
    return stream.getvalue()


def test_progress_in_a_log_is_a_line_every_tenth():
    lines = progress_of(io.StringIO()).splitlines()
    assert [line.split()[1] for line in lines] == ["10%", "31%", "100%"]
    assert lines[0].endswith("1 min 01 s")


def test_progress_on_a_terminal_is_one_line():
    text = progress_of(Terminal())
    assert "\n" not in text
    assert [part.split()[1] for part in text.split("\r")[1:]] == ["1%", "9%", "10%", "31%", "100%"]


def test_failure_shows_the_end_of_the_log(tmp_path):
    log = tmp_path / "log"
    code = "print(*range(100), sep='\\n'); raise SystemExit(3)"
    with pytest.raises(wheel_script.WheelError) as error:
        wheel_script.run_logged([sys.executable, "-c", code], log)
    assert "\n99\n" in str(error.value)
    assert "\n50\n" not in str(error.value)
    assert str(log) in str(error.value)
    assert len(log.read_text().splitlines()) == 100


def test_interrupt_ends_the_whole_process_group(tmp_path):
    shell = shutil.which("sh")
    command = [shell, "-c", "sleep 3600 & echo $!; wait"]
    seen = []

    def interrupt(line):
        seen.append(int(line))
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        wheel_script.run_logged(command, tmp_path / "log", interrupt)
    assert time.monotonic() - started < 600
    process = Path(f"/proc/{seen[0]}/stat")
    deadline = time.monotonic() + 600
    while process.exists() and " Z " not in process.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not process.exists() or " Z " in process.read_text()
