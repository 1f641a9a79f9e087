"""What the matrix takes over from the machine: its settings, its mirrors and its engines."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

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


# The base -----------------------------------------------------------------------------------------


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


# The engines --------------------------------------------------------------------------------------


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
