"""``hvd-dls doctor``: says what is there, what is not, and what to type, whatever is broken."""

import copy
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from importlib import metadata
from importlib.util import find_spec

import psutil
import pytest

from hvd_dls.cli.doctor.findings import findings, ready
from hvd_dls.cli.doctor.steps import PROBES
from hvd_dls.cli.doctor.text import as_text
from tests.cli.environments import environment, hvd_dls
from tests.jobs import ROOT

HAVE_HOROVOD = find_spec("horovod") and (find_spec("torch") or find_spec("tensorflow"))
needs_horovod = pytest.mark.skipif(not HAVE_HOROVOD, reason="no Horovod and framework here")
# What a rank of a job has in its environment, and a doctor must not join.
OF_A_JOB = {
    "HOROVOD_RANK": "1",
    "HOROVOD_SIZE": "2",
    "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1",
    "HOROVOD_GLOO_RENDEZVOUS_PORT": "9",
    "HOROVOD_CONTROLLER": "gloo",
}


@pytest.fixture(scope="module")
def here():
    """The report on the environment that the tests run in, as JSON, from inside a job."""
    done = hvd_dls("doctor", "--json", variables={**OF_A_JOB, "TF_USE_LEGACY_KERAS": "0"})
    report = json.loads(done.stdout)
    assert done.returncode == (0 if any(report["ready"].values()) else 1)
    return report


def doctor(path, *arguments, **options):
    """The report on an environment of its own, and the exit status."""
    done = hvd_dls("doctor", "--json", *arguments, path=path, **options)
    return json.loads(done.stdout), done.returncode


def told(report, level="error"):
    """All findings of a level, with what to type."""
    found = [f for f in report["findings"] if f["level"] == level]
    return "\n".join("\n".join((f["what"], *f["todo"])) for f in found)


def version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@needs_horovod
def test_this_environment_can_train_and_versions_are_true(here):
    assert not told(here)
    for framework, package in {"torch": "torch", "tensorflow": "tensorflow-cpu"}.items():
        installed = find_spec(framework) is not None
        assert here["ready"][framework] == installed
        if installed:
            steps = here["steps"]
            assert steps[framework]["version"] in (version(package), version(framework))
            assert steps[f"start {framework}"] == {"status": "works", "ranks": 1}
            assert steps[f"horovod.{framework}"]["gloo"] is True
    assert here["ready"]["keras"] == (find_spec("keras") is not None)
    assert here["steps"]["horovod"]["version"] == version("horovod")
    assert here["steps"]["numpy"]["version"] == version("numpy")
    assert here["steps"]["loops"]["compiled"] == (find_spec("numba") is not None)


@needs_horovod
@pytest.mark.skipif(not find_spec("keras"), reason="no Keras here")
def test_keras_3_and_horovods_own_optimizer_are_named(here):
    assert "trains without averaging" in told(here, "note")
    assert "import hvd_dls.keras as hvd" in told(here, "note")
    here = copy.deepcopy(here)
    here["variables"]["TF_USE_LEGACY_KERAS"] = "1"
    assert "averaging" not in str(findings(here))


def test_the_machine_is_described_without_saying_whose_it_is(here):
    machine = here["machine"]
    assert machine["cores"] == os.cpu_count()
    assert machine["memory"] == psutil.virtual_memory().total
    names = {interface["name"] for interface in machine["interfaces"]}
    assert names == {name for _, name in socket.if_nameindex()}
    for name in (each["name"] for each in machine["interfaces"] if each["ipv4"]):
        addresses = psutil.net_if_addrs()[name]
        assert any(address.family == socket.AF_INET for address in addresses)
    assert "host" not in machine
    addresses = {a.address for all_of in psutil.net_if_addrs().values() for a in all_of}
    assert not [a for a in addresses if a and f'"{a}' in json.dumps(here)]


def test_with_nothing_but_the_standard_library(tmp_path):
    done = hvd_dls("doctor", "--host-name", path=environment(tmp_path / "nothing", {}))
    assert done.returncode == 1, done.stderr
    assert not done.stderr
    for line in (
        "error: numpy is not installed",
        'python -m pip install "numpy>=1.24"',
        "error: neither torch nor TensorFlow is installed",
        'python -m pip install "torch>=2.1"',
        "python docker/horovod_wheel.py --install",
        "No training can run here.",
        socket.gethostname(),
    ):
        assert line in done.stdout


def test_with_numpy_alone(tmp_path):
    report, status = doctor(environment(tmp_path / "numpy", {}, borrowed=["numpy"]))
    assert status == 1
    assert report["steps"]["numpy"] == {"status": "works", "version": version("numpy")}
    assert report["steps"]["loops"]["compiled"] is False
    assert "neither torch nor TensorFlow is installed" in told(report)
    assert "numba is not installed\npython -m pip install numba" in told(report, "warning")


@pytest.mark.parametrize(
    ("numba", "status", "level", "todo"),
    [
        # hvd_dls does without it then.
        ("raise ImportError('needs NumPy 1.26 or less')", "broken", "warning", "--upgrade numba"),
        # A training would crash, too.
        ("import os; os.abort()", "crashed", "error", "python -m pip uninstall numba"),
    ],
    ids=["error", "abort"],
)
def test_a_numba_that_is_broken(tmp_path, numba, status, level, todo):
    path = environment(tmp_path / "numba", {"numba": numba}, borrowed=["numpy"])
    report, code = doctor(path)
    assert code == 1
    assert report["steps"]["numba"]["status"] == status
    assert "numba" in told(report, level)
    assert todo in told(report, level)
    assert hvd_dls("doctor", path=path).returncode == 1  # as text, too


def test_a_numpy_that_crashes(tmp_path):
    path = environment(tmp_path / "numpy", {"numpy": "import os; os.abort()"})
    done = hvd_dls("doctor", path=path)
    assert done.returncode == 1, done.stderr
    assert "error: numpy crashes: the process ended with SIGABRT: Fatal Python error" in done.stdout
    assert "python -m pip install --force-reinstall --no-deps numpy" in done.stdout


HOROVOD = "__version__ = '0.28.1'"
TORCH = """
__version__ = "2.13.0"
class version: cuda = None
class cuda: is_available = staticmethod(lambda: False)
"""
NOT_BUILT = "raise ImportError('Extension horovod.torch has not been built: x.so not found')"
OTHER_TORCH = "raise ImportError('mpi_lib_v2.so: undefined symbol: _ZN3c106detail')"


@pytest.mark.parametrize(
    ("modules", "status", "what", "todo"),
    [
        ({"torch": "raise ImportError('libtorch.so: x')"}, "broken", "libtorch.so", "torch"),
        ({"torch": "import no_such_module"}, "broken", "no_such_module", "install no_such_module"),
        ({"torch": "import sys; sys.exit(3)"}, "broken", "SystemExit: 3", "install"),
        ({"torch": "import os; os._exit(3)"}, "crashed", "exited with 3", "install"),
        ({"torch": "import os; os.abort()"}, "crashed", "SIGABRT", "--force-reinstall"),
        ({"torch": TORCH}, "works", "Horovod is not installed", "horovod_wheel.py --install"),
        (
            {"torch": TORCH, "horovod": HOROVOD, "horovod.torch": NOT_BUILT},
            "works",
            "Horovod was built without torch",
            "horovod_wheel.py --install",
        ),
        (
            {"torch": TORCH, "horovod": HOROVOD, "horovod.torch": OTHER_TORCH},
            "works",
            "Horovod was built for another torch than this one",
            "horovod_wheel.py --install",
        ),
        (
            {"torch": TORCH, "horovod": "import cloudpickle"},
            "works",
            "cloudpickle",
            "python -m pip install cloudpickle",
        ),
    ],
    ids=["error", "dependency", "exit", "_exit", "abort", "alone", "without", "other", "runner"],
)
def test_what_is_broken_is_named_and_what_to_type(tmp_path, modules, status, what, todo):
    report, code = doctor(environment(tmp_path / "broken", modules, borrowed=["numpy"]))
    assert code == 1
    assert report["steps"]["torch"]["status"] == status
    assert what in told(report)
    assert todo in told(report)
    assert not any(report["ready"].values())


def test_an_import_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    child = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100_000)'])"
    write = f"open({str(tmp_path / 'pid')!r}, 'w').write(str({child}.pid))"
    source = f"import subprocess, sys, time\n{write}\ntime.sleep(100_000)"
    path = environment(tmp_path / "hangs", {"tensorflow": source}, borrowed=["numpy"])
    report, code = doctor(path, "--time-limit", "10")
    assert code == 1
    assert report["steps"]["tensorflow"]["status"] == "hung"
    assert report["steps"]["horovod.tensorflow"] == {"status": "not tried"}
    assert "tensorflow hangs: nothing after 10 s" in told(report)
    assert_ends(int((tmp_path / "pid").read_text()))


def test_ctrl_c_ends_it_and_its_probes(tmp_path):
    source = f"""
import os, time
with open({str(tmp_path / "unfinished")!r}, "w") as file: file.write(str(os.getpid()))
os.rename({str(tmp_path / "unfinished")!r}, {str(tmp_path / "pid")!r})
time.sleep(100_000)"""
    path = environment(tmp_path / "hangs", {"torch": source})
    process = subprocess.Popen(
        [sys.executable, "-S", "-m", "hvd_dls", "doctor"],
        cwd="/",
        env={**os.environ, "PYTHONPATH": f"{path}:{ROOT}"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # A shell's background jobs ignore SIGINT, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not (tmp_path / "pid").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=100)
    assert process.returncode != 0
    assert_ends(int((tmp_path / "pid").read_text()))


def assert_ends(pid):
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.05)


def test_a_framework_that_is_asked_for_must_be_there(tmp_path):
    path = environment(tmp_path / "torch", {"torch": TORCH}, borrowed=["numpy"])
    for framework, package in {"tensorflow": "tensorflow>=2.16", "keras": "keras>=3.10"}.items():
        report, code = doctor(path, "--framework", framework)
        assert code == 1
        assert f"{framework} is not installed" in told(report)
        assert f'"{package}"' in told(report)


def changed(report, step, **facts):
    report = copy.deepcopy(report)
    report["steps"][step].update(facts)
    return report


@needs_horovod
@pytest.mark.skipif(not find_spec("torch"), reason="no torch here")
def test_pairs_that_do_not_work(here):
    def said(report):
        return "\n".join("\n".join((f.what, *f.todo)) for f in findings(report))

    report = changed(here, "horovod.torch", gloo=False, mpi=True)
    report = changed(report, "horovod.tensorflow", gloo=False, mpi=True)
    report["tools"]["mpirun"] = "mpirun (Open MPI) 4.1.4"
    assert "built without Gloo: no elastic training" in said(report)
    assert ready(report)["torch"]
    report["tools"]["mpirun"] = None
    assert "nothing starts several ranks" in said(report)
    assert not any(ready(report).values())

    assert "Horovod was built for torch 1.9, and this is" in said(
        changed(here, "horovod", built_for={"torch": "1.9"})
    )
    assert "was tried with 0.28.1 only" in said(changed(here, "horovod", version="0.27.0"))
    assert '"torch>=2.1"' in said(changed(here, "torch", version="2.0.1+cpu"))
    backend = "KERAS_BACKEND is 'jax'"
    assert "export KERAS_BACKEND=tensorflow" in said(
        changed(here, "hvd_dls.keras", status="broken", error=backend)
    )
    report = changed(here, "torch", gpus=["a card"], triton=None)
    assert "layers that go dense pass through the host's memory" in said(report)
    assert "Triton is missing" in said(report)
    report["steps"]["torch"]["triton"] = "3.4.0"
    assert "Triton" not in said(report)
    report = changed(here, "loops", compiled=False, said=["importing it failed (no LLVM)"])
    assert "several times as long as with compiled loops: importing it failed" in said(report)
    report = copy.deepcopy(here)
    report["machine"]["shared_memory"] = 64 << 20
    assert "docker run --shm-size 1g" in said(report)
    report["machine"]["interfaces"] = [
        {"name": "eth0", "up": True, "loopback": False, "ipv4": True}
    ]
    for loopback in (False, True):
        report["machine"]["name_is_loopback"] = loopback
        assert ("process sets (hierarchical=True) over Gloo" in said(report)) == loopback


FAILURES = {
    "missing": {"error": "No module named 'x'", "needs": "x"},
    "broken": {"error": "OSError: a library is gone"},
    "crashed": {"error": "the process ended with SIGSEGV"},
    "hung": {"error": "nothing after 1 s"},
}


@needs_horovod
def test_whatever_fails_there_is_a_report_and_a_reason(here):
    """Each step in each way, and those after it in its process not tried; two probes at a time."""
    cases = [
        (probe, number, how)
        for probe in PROBES
        for number in range(len(PROBES[probe]))
        for how in FAILURES
    ]
    for one, other in itertools.product(cases, cases):
        steps = dict(here["steps"])
        for probe, number, how in (one, other):
            names = [name for name, _ in PROBES[probe]][number:]
            steps |= {name: {"status": "not tried"} for name in names}
            steps[names[0]] = {"status": how, **FAILURES[how]}
        facts = {**here, "steps": steps}
        found, works = findings(facts), ready(facts)
        assert as_text(facts, found, works)
        if not any(works.values()):
            assert found[0].level == "error", (one, other)
            assert found[0].todo


def test_arguments_that_make_no_sense_are_refused(tmp_path):
    for value in ("0", "-1", "inf", "nan", "x"):
        done = hvd_dls("doctor", "--time-limit", value, path=environment(tmp_path / value, {}))
        assert done.returncode == 2
        assert "--time-limit" in done.stderr
