"""The files that the test matrix is made of: Dockerfiles, compose files, pins and scripts."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"

COMPOSE = yaml.safe_load((DOCKER / "docker-compose.test.yml").read_text())
ENTRIES = list(COMPOSE["services"])
PYTHONS = {"bookworm": "py3_11", "trixie": "py3_13"}
PACKAGES = {"tf": "tensorflow-cpu", "torch": "torch"}


def pins(name):
    """Package → version of a constraints file; of several markers' lines, any."""
    lines = (DOCKER / name).read_text().splitlines()
    found = (re.match(r"([\w.-]+)==([\w.]+)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def short(version):
    """'2.13.0' → '2_13'"""
    return "_".join(version.split(".")[:2])


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
