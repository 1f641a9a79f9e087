"""The runner of the test matrix and the files it reads: everything but the minutes of building."""

import contextlib
import importlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"


@pytest.fixture(scope="module", autouse=True)
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


def pins(name):
    """Package → version of a constraints file; of several markers' lines, any."""
    lines = (DOCKER / name).read_text().splitlines()
    found = (re.match(r"([\w.-]+)==([\w.]+)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def short(version):
    """'2.13.0' → '2_13'"""
    return "_".join(version.split(".")[:2])


# ---- the files


COMPOSE = yaml.safe_load((DOCKER / "docker-compose.test.yml").read_text())
ENTRIES = list(COMPOSE["services"])
PYTHONS = {"bookworm": "py3_11", "trixie": "py3_13"}
PACKAGES = {"tf": "tensorflow-cpu", "torch": "torch"}


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_is_what_its_name_says(matrix, name):
    entry = matrix.read()[name]
    arguments = entry.arguments
    pinned = pins(arguments.get("CONSTRAINTS", "constraints.txt"))
    frameworks = arguments["FRAMEWORKS"].split(",")
    said = [
        f"{short_name}{short(pinned[package])}"
        for short_name, package in PACKAGES.items()
        if {"tf": "tensorflow"}.get(short_name, short_name) in frameworks
    ]
    expected = ["test", "cpu", arguments["CONTROLLER"], PYTHONS[arguments["DEBIAN"]], *said]
    assert name == "-".join(expected)
    assert entry.environment == {"HVD_DLS_TEST_CONTROLLER": arguments["CONTROLLER"]}
    assert entry.image == f"hvd_dls:{name}"
    assert entry.build["target"] == "test"
    assert Path(entry.build["dockerfile"]) == DOCKER / "Dockerfile"
    assert Path(entry.build["context"]) == ROOT


def test_the_matrix_covers_controllers_frameworks_and_both_ends():
    arguments = [service["build"]["args"] for service in COMPOSE["services"].values()]
    assert {a["CONTROLLER"] for a in arguments} == {"gloo", "mpi"}
    assert {a["FRAMEWORKS"] for a in arguments} == {"torch", "tensorflow", "tensorflow,torch"}
    oldest = [a["FRAMEWORKS"] for a in arguments if "CONSTRAINTS" in a]
    assert {*",".join(oldest).split(",")} == {"torch", "tensorflow"}


CLUSTER = yaml.safe_load((DOCKER / "docker-compose.cluster.yml").read_text())


def test_nodes_of_the_cluster_differ_in_their_names_only(matrix, monkeypatch):
    monkeypatch.setenv("FRAMEWORKS", "tensorflow")
    monkeypatch.delenv("CONTROLLER", raising=False)
    nodes = matrix.read(DOCKER / "docker-compose.cluster.yml")
    assert list(nodes) == ["node1", "node2", "node3", "node4"]
    for name, service in CLUSTER["services"].items():
        assert service["hostname"] == name
        assert service["volumes"] == ["keys:/cluster"]
        assert "ports" not in service
        assert "environment" not in service
        assert nodes[name].build["target"] == "node"
        assert nodes[name].arguments["FRAMEWORKS"] == "tensorflow"
        assert nodes[name].arguments["CONTROLLER"] == "gloo"


def test_nodes_let_in_only_who_has_the_clusters_key():
    settings = dict(
        line.split(" ", 1)
        for line in (DOCKER / "node" / "sshd_config").read_text().splitlines()
        if line and not line.startswith("#")
    )
    assert settings["PasswordAuthentication"] == settings["KbdInteractiveAuthentication"] == "no"
    assert settings["HostKey"].startswith("/cluster/")
    assert settings["AuthorizedKeysFile"].startswith("/cluster/")
    assert "StrictHostKeyChecking yes" in (DOCKER / "node" / "ssh_config").read_text()


def test_paths_in_the_command_exist(matrix):
    for entry in matrix.read().values():
        assert entry.command[:3] == ["python", "-m", "pytest"]
        paths = [word for word in entry.command if word.startswith("tests/")]
        assert paths
        assert not [path for path in paths if not (ROOT / path).exists()]


def dockerfile():
    """The instructions of each stage, continued lines joined, comments left out."""
    text = (DOCKER / "Dockerfile").read_text()
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    stages, name = {}, ""
    for line in filter(None, text.splitlines()):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            name = rest.split(" AS ")[1]
        stages.setdefault(name, []).append((word, rest))
    return stages


def test_what_runs_runs_as_an_ordinary_user():
    for name, stage in dockerfile().items():
        if name in ("runtime", "test", "node"):
            users = [rest for word, rest in stage if word == "USER"]
            assert users[-1] == "hvd", name


def test_an_image_has_no_compiler_and_takes_only_the_environment_and_the_package():
    stages = dockerfile()
    for name in ("base", "runtime", "test", "node"):
        text = " ".join(rest for _, rest in stages[name])
        assert not re.search(r"g\+\+|cmake|python3-dev|libopenmpi-dev", text), name
    copied = [rest for word, rest in stages["runtime"] if word == "COPY" and "--from" in rest]
    assert copied == ["--from=build /opt/venv /opt/venv", "--from=package /dist /opt/venv/dist"]


def test_nothing_secret_or_of_one_machine_is_in_the_files():
    for file in [*DOCKER.glob("*.*"), *DOCKER.glob("node/*"), ROOT / ".dockerignore"]:
        text = file.read_text()
        assert "PRIVATE KEY" not in text, file
        assert not re.search(r"https?://\S", text), file
    instructions = [item for stage in dockerfile().values() for item in stage]
    for word, rest in instructions:
        if word in ("ENV", "ARG"):
            assert not re.search(r"(?i)password|secret|token|key", rest)
        if word == "COPY":
            assert not re.search(r"_rsa|ed25519|\.ssh|pip\.conf", rest)
        if word == "RUN" and "apt_install" in rest and "openssh-server" in rest:
            assert "rm -f /etc/ssh/ssh_host_*" in rest


def test_every_installation_uses_pins_and_leaves_no_cache():
    script = (DOCKER / "install_frameworks.sh").read_text()
    assert "--constraint $constraints" in script
    runs = [rest for stage in dockerfile().values() for word, rest in stage if word == "RUN"]
    for run in runs:
        if "pip install" in run or "install_frameworks.sh" in run:
            assert "--no-cache-dir" in run or "type=cache,target=/root/.cache/pip" in run
            assert re.search("--constraint|PIP_CONSTRAINT|CONSTRAINTS|--no-deps", run), run
        assert "apt-get install" not in run


def test_the_node_has_a_health_check_and_makes_its_keys_when_it_starts():
    words = [word for word, _ in dockerfile()["node"]]
    assert "HEALTHCHECK" in words
    assert words.index("USER") < words.index("CMD")
    assert "ssh-keygen" in (DOCKER / "node" / "start.sh").read_text()


@pytest.mark.parametrize("file", ["apt_install.sh", "install_frameworks.sh", "node/start.sh"])
def test_shell_scripts_parse(file):
    subprocess.run(["sh", "-n", str(DOCKER / file)], check=True)


@pytest.mark.parametrize("file", ["docker-compose.test.yml", "docker-compose.cluster.yml"])
def test_compose_accepts_the_file(file):
    for compose in (["docker", "compose"], ["docker-compose"]):  # the plugin, or Debian's
        version = [*compose, "version"]
        if shutil.which(compose[0]) and not subprocess.run(version, capture_output=True).returncode:
            subprocess.run([*compose, "-f", str(DOCKER / file), "config", "-q"], check=True)
            return
    pytest.skip("neither docker compose nor docker-compose is here")


def test_oldest_pins_are_those_that_setup_cfg_allows():
    lower = dict(re.findall(r"^\s+([\w-]+)>=([\d.]+)$", (ROOT / "setup.cfg").read_text(), re.M))
    oldest = pins("constraints-oldest.txt")
    for package, name in {"torch": "torch", "tensorflow": "tensorflow-cpu"}.items():
        assert short(oldest[name]) == short(lower[package])
    for package in ("numpy", "numba", "tf-keras"):
        assert short(oldest[package]) == short(lower[package])


# ---- the machine's settings


LISTING = r"""
:env:.cert='/nowhere/env.pem'
:env:.disable-pip-version-check='1'
global.cert='/nowhere/global.pem'
global.index-url='https\x3a//user:secret@mirror.example/simple'
global.target='/somewhere'
install.find-links='/nowhere/a\n/nowhere/b'
"""


def test_pip_options_are_those_about_where_packages_come_from(machine):
    assert machine.pip_options(LISTING, {}) == {
        "cert": "/nowhere/env.pem",
        "index-url": "https://user:secret@mirror.example/simple",
        "find-links": "/nowhere/a\n/nowhere/b",
    }
    assert machine.pip_options("", {"SSL_CERT_FILE": "/x.pem"}) == {"cert": "/x.pem"}


def test_files_and_folders_are_brought_along(machine, tmp_path, monkeypatch):
    (tmp_path / "ca.pem").write_text("certificate")
    (tmp_path / "wheels" / "key").mkdir(parents=True)
    (tmp_path / "wheels" / "key" / "manifest.json").write_text("{}")
    (tmp_path / "wheels" / "key.log").write_text("not this")
    index = tmp_path / "index" / "simple" / "six"
    index.mkdir(parents=True)
    (index / "index.html").write_text("../../files/six.whl")
    (tmp_path / "index" / "files").mkdir()
    (tmp_path / "index" / "files" / "six.whl").write_text("wheel")
    listing = f"global.cert='{tmp_path}/ca.pem'\n"
    listing += f"global.extra-index-url='file://{index.parent} https://mirror.example/simple'\n"
    dump = 'Acquire::http::Proxy "http://proxy.example:3128";\nAPT::Other "x";\n'
    dump += f'Acquire::https::CAInfo "{tmp_path}/ca.pem";\n'
    monkeypatch.setattr(
        machine, "output", lambda *command: dump if command[0] == "apt-config" else listing
    )
    folder = machine.write(tmp_path / "settings", tmp_path / "wheels", {})
    assert (folder / "pip.conf").read_text() == (
        "[global]\n"
        "cert = /run/machine/files/0-ca.pem\n"
        "extra-index-url = file:///run/machine/files/1-index/simple\n"
        "    https://mirror.example/simple\n"
    )
    assert (folder / "apt.conf").read_text() == (
        'Acquire::http::Proxy "http://proxy.example:3128";\n'
        'Acquire::https::CAInfo "/run/machine/files/0-ca.pem";\n'
    )
    assert (folder / "files" / "0-ca.pem").read_text() == "certificate"
    assert (folder / "files" / "1-index" / "files" / "six.whl").read_text() == "wheel"
    assert [path.name for path in (folder / "wheels").rglob("*")] == ["key", "manifest.json"]
    assert folder.stat().st_mode & 0o077 == 0


def test_proxies_go_on_as_build_arguments(machine):
    environ = {"http_proxy": "http://proxy.example", "NO_PROXY": "localhost", "HOME": "/root"}
    assert machine.proxies(environ) == {
        "http_proxy": "http://proxy.example",
        "NO_PROXY": "localhost",
    }


# ---- the base


def test_mirrors_are_the_machines_own(modules):
    base = modules["bootstrap_base"]
    listing = "Node x\nDebian-Security http://m/s/\nDebian http://m/d/\nDebian http://m/e/\n"
    assert base.mirrors(listing) == ("http://m/d", "http://m/s")
    assert base.mirrors("Debian http://m/d/\n") == ("http://m/d", "")
    with pytest.raises(base.BaseError, match="apt-get update"):
        base.mirrors("")
    assert base.sources("trixie", "http://m/d", "http://m/s").splitlines() == [
        "deb http://m/d trixie main",
        "deb http://m/d trixie-updates main",
        "deb http://m/s trixie-security main",
    ]


# ---- the engines


def test_engines_are_tried_in_order_and_their_problems_named(engines, monkeypatch):
    def broken(self):
        raise engines.EngineError(f"{self.name} is broken")

    for kind in set(engines.ENGINES.values()):
        monkeypatch.setattr(kind, "check", broken)
    with pytest.raises(engines.EngineError, match=r"docker is.*podman is.*buildah is"):
        engines.choose(None)
    monkeypatch.setattr(engines.Buildah, "check", lambda self: None)
    assert engines.choose(None).name == "buildah"
    with pytest.raises(engines.EngineError, match="docker is broken"):
        engines.choose("docker")


def test_build_commands(engines, matrix):
    entry = matrix.read()["test-cpu-mpi-py3_11-tf2_21-torch2_13"]
    for name, kind in engines.ENGINES.items():
        command = kind().build(entry.image, entry.build, entry.arguments, Path("/settings"))
        assert command[:2] == [name, "build"]
        assert command[-1] == str(ROOT)
        assert "--build-arg=CONTROLLER=mpi" in command
        assert "--build-context=machine=/settings" in command
        assert "--target=test" in command


@pytest.mark.parametrize(("text", "size"), [("1.25 GB", 1_250_000_000), ("204 MB", 204_000_000)])
def test_sizes(engines, text, size):
    assert engines.parse_size(text) == size


# ---- running entries, with a false engine


class FakeEngine:
    """Builds nothing and runs Python programs on this machine."""

    name, environ = "fake", {}

    def __init__(self, build="print('STEP 1')", run="print('=== 7 passed, 2 skipped in 1.5s ===')"):
        self.programs = {"build": build, "run": run}

    def has_image(self, name):
        return True

    def build(self, image, build, arguments, settings):
        return [sys.executable, "-c", self.programs["build"]]

    def run(self, image, command, environ):
        return contextlib.nullcontext([sys.executable, "-c", self.programs["run"]])

    def size(self, image):
        return 1_500_000_000


def run(matrix, tmp_path, engine):
    entry = next(iter(matrix.read().values()))
    runner = matrix.Matrix(engine, tmp_path, matrix.Line(io.StringIO()))
    result = runner.run(entry, tmp_path)
    return result, (tmp_path / "logs" / f"{entry.name}.log").read_text()


def test_an_entry_that_passes(matrix, tmp_path):
    result, log = run(matrix, tmp_path, FakeEngine())
    assert (result.outcome, result.tests_passed, result.tests_skipped) == ("passed", 7, 2)
    assert (result.image_bytes, result.engine) == (1_500_000_000, "fake")
    assert "STEP 1" in log
    assert "7 passed" in log


@pytest.mark.parametrize(
    ("engine", "reason", "passed"),
    [
        ({"build": "import sys; print('no space'); sys.exit(3)"}, "ended with 3", 0),
        ({"run": "print('== 1 failed, 4 passed in 3.00s =='); raise SystemExit(1)"}, "with 1", 4),
        ({"run": "print('== no tests ran in 0.1s ==')"}, "no test passed", 0),
    ],
)
def test_an_entry_that_fails(matrix, tmp_path, engine, reason, passed):
    result, _ = run(matrix, tmp_path, FakeEngine(**engine))
    assert result.outcome == "failed"
    assert reason in result.reason
    assert result.tests_passed == passed


def test_an_entry_that_hangs_is_ended(matrix, tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "TEST_LIMIT", 0.5)
    program = "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"
    begin = time.monotonic()
    result, _ = run(matrix, tmp_path, FakeEngine(run=program))
    assert time.monotonic() - begin < 30
    assert result.outcome == "failed"
    assert "not done after" in result.reason


def test_too_little_disk_is_a_reason_to_skip(matrix, tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "DISK_NEEDED", 10**18)
    result, _ = run(matrix, tmp_path, FakeEngine())
    assert result.outcome == "skipped"
    assert "disk" in result.reason


def test_no_base_and_no_debootstrap_is_a_reason_to_skip(matrix, engines, tmp_path, monkeypatch):
    class Offline(FakeEngine):
        def has_image(self, name):
            return False

        def pull(self, name):
            raise engines.EngineError("no such host")

    monkeypatch.setattr(matrix.shutil, "which", lambda name: None)
    result, _ = run(matrix, tmp_path, Offline())
    assert result.outcome == "skipped"
    assert "debootstrap" in result.reason


# ---- the command


@pytest.fixture
def command(matrix, tmp_path, monkeypatch):
    """main() with a false engine, its own cache and its own results."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(matrix, "obtain_engine", lambda *_: FakeEngine())
    monkeypatch.setattr(matrix.machine, "write", lambda folder, _: folder)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return matrix.main


def test_list_names_the_entries(command, capsys):
    assert command(["--list"]) == 0
    assert capsys.readouterr().out.split() == ENTRIES


def test_an_unknown_entry_is_a_usage_error(command, capsys):
    with pytest.raises(SystemExit):
        command(["test-gpu"])
    assert "test-gpu" in capsys.readouterr().err


def test_all_entries_end_in_a_table_that_is_written(command, tmp_path, capsys):
    document = tmp_path / "docker.md"
    document.write_text("before\n<!-- matrix: begin -->\nold\n<!-- matrix: end -->\nafter\n")
    assert command([ENTRIES[0], "--write", str(document)]) == 0
    assert capsys.readouterr().out.count(" passed ") >= 1
    text = document.read_text()
    assert text.startswith("before\n<!-- matrix: begin -->\n| entry")
    assert text.endswith("|\n<!-- matrix: end -->\nafter\n")
    assert "old" not in text
    assert text.count("not run yet") == len(ENTRIES) - 1


def test_resume_runs_again_only_what_changed_or_did_not_pass(
    command, matrix, tmp_path, monkeypatch
):
    ran = []
    run = matrix.Matrix.run
    monkeypatch.setattr(matrix, "fingerprint", lambda entry, root: "of this source")
    monkeypatch.setattr(
        matrix.Matrix, "run", lambda self, entry, s: ran.append(entry.name) or run(self, entry, s)
    )
    command(ENTRIES[:2])
    results = tmp_path / "hvd_dls" / "matrix" / "results.json"
    kept = json.loads(results.read_text())
    kept[ENTRIES[1]]["fingerprint"] = "of another source"
    results.write_text(json.dumps(kept))
    ran.clear()
    assert command([*ENTRIES[:3], "--resume"]) == 0
    assert ran == ENTRIES[1:3]


def test_a_fingerprint_is_of_what_goes_into_the_image(matrix, tmp_path):
    entries = list(matrix.read().values())
    (tmp_path / "hvd_dls").mkdir()
    (tmp_path / "docs").mkdir()
    empty = matrix.fingerprint(entries[0], tmp_path)
    assert empty != matrix.fingerprint(entries[1], tmp_path)
    (tmp_path / "docs" / "docker.md").write_text("text")
    (tmp_path / "hvd_dls" / "__pycache__").mkdir()
    (tmp_path / "hvd_dls" / "__pycache__" / "a.pyc").write_text("compiled")
    assert empty == matrix.fingerprint(entries[0], tmp_path)
    (tmp_path / "hvd_dls" / "a.py").write_text("code")
    assert empty != matrix.fingerprint(entries[0], tmp_path)


def test_without_an_engine_entries_are_skipped(command, matrix, engines, monkeypatch, capsys):
    def none(*_):
        raise engines.EngineError("docker is not installed")

    monkeypatch.setattr(matrix, "obtain_engine", none)
    assert command([ENTRIES[0]]) == 0
    assert "skipped: no engine: docker is not installed" in capsys.readouterr().out
    assert command([ENTRIES[0], "--strict"]) == 1


def test_a_failed_entry_is_a_failed_command(command, matrix, monkeypatch):
    monkeypatch.setattr(matrix, "obtain_engine", lambda *_: FakeEngine(run="raise SystemExit(1)"))
    assert command([ENTRIES[0]]) == 1


# ---- the report


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("==== 153 passed, 12 skipped, 3 deselected in 32.10s ====\n", (153, 12)),
        ("=== 1 failed, 2 passed in 61.20s (0:01:01) ===\n", (2, 0)),
        ("[1]<stdout>:5 passed in 1.00s\n7 passed, 1 warning in 2.00s\n", (7, 0)),
        ("no summary\n", (0, 0)),
    ],
)
def test_counts(report, output, expected):
    assert report.counts(output) == expected


def test_a_document_without_markers_is_left_alone(report, tmp_path):
    document = tmp_path / "docker.md"
    document.write_text("text")
    with pytest.raises(ValueError, match="between"):
        report.write_between(document, "table")
    assert document.read_text() == "text"


@pytest.mark.parametrize("text", ["", "[]", '{"a": {"unknown": 1}}', "{"])
def test_results_of_another_version_are_as_none(report, tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    assert report.load(tmp_path / "results.json") == {}


def test_a_reason_cannot_break_the_table(report):
    text = report.table([report.Result("a", "failed", "one | two\nthree")])
    assert len({line.count("|") for line in text.splitlines()}) == 1
