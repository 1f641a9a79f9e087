"""Wheel and sdist: what is in them, and that they work with nothing but NumPy, without network."""

import json
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

import hvd_dls
from tests.jobs import ROOT

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
SDIST = "import setuptools.build_meta as backend, sys; backend.build_sdist(sys.argv[1])"
NAME = f"hvd_dls-{hvd_dls.__version__}"
# What a build could pick up by mistake is in the copy; what never belongs to the sources is not.
NOT_SOURCES = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
)


def run(*command, cwd=None):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def wheel_of(source, into):
    """Builds a wheel with the setuptools that is here."""
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--no-cache-dir"]
    said = run(*PIP, "wheel", "--verbose", *options, f"--wheel-dir={into}", str(source))
    assert not re.search("Deprecat|SetuptoolsWarning", said), said
    (wheel,) = into.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tree") / "hvd_dls"
    shutil.copytree(ROOT, folder, ignore=NOT_SOURCES, symlinks=True)
    return folder


@pytest.fixture(scope="module")
def sdist(sources, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-c", SDIST, str(folder), cwd=sources)
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory):
    return wheel_of(sources, tmp_path_factory.mktemp("wheel"))


def modules():
    return {str(file.relative_to(ROOT)) for file in (ROOT / "hvd_dls").rglob("*.py")}


def test_a_wheel_has_the_package_its_types_and_its_licence_and_nothing_else(wheel):
    info = f"{NAME}.dist-info"
    about = ["METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE"]
    with zipfile.ZipFile(wheel) as archive:
        expected = modules() | {"hvd_dls/py.typed"} | {f"{info}/{name}" for name in about}
        assert set(archive.namelist()) == expected
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


def test_an_sdist_has_what_makes_the_wheel_and_nothing_else(sdist):
    with tarfile.open(sdist) as archive:
        files = {member.name.removeprefix(f"{NAME}/") for member in archive if not member.isdir()}
    files = {name for name in files if not name.startswith("hvd_dls.egg-info/")}
    top = {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}
    assert files == modules() | {"hvd_dls/py.typed"} | top


def test_an_sdists_wheel_is_the_same(sdist, wheel, tmp_path):
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(wheel_of(sdist, tmp_path)) as other:
        assert {name: one.read(name) for name in sorted(one.namelist())} == {
            name: other.read(name) for name in sorted(other.namelist())
        }


def test_metadata_name_no_address_that_does_not_exist(wheel):
    with zipfile.ZipFile(wheel) as archive:
        about = archive.read(f"{NAME}.dist-info/METADATA").decode()
    head = about.partition("\n\n")[0]
    assert f"\nVersion: {hvd_dls.__version__}\n" in head
    assert "\nClassifier: Typing :: Typed\n" in head
    assert not re.search("^(Home-page|Project-URL|Author|Maintainer)", head, re.MULTILINE)
    assert not re.search("https?://", head)


def environment_with_numpy(folder):
    """An environment that has this Python's NumPy, by reference, and nothing else."""
    venv.create(folder / "venv")
    python = folder / "venv" / "bin" / "python"
    numpy = Path(find_spec("numpy").origin).parent
    about = Path(metadata.distribution("numpy")._path)
    (folder / "numpy").mkdir()
    for part in (numpy, numpy.with_name("numpy.libs"), about):
        if part.exists():
            (folder / "numpy" / part.name).symlink_to(part)
    site = run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    (Path(site.strip()) / "numpy.pth").write_text(f"{folder / 'numpy'}\n")
    return python


# Some modules are for numba only; whatever a training needs has to import without.
IMPORTS = """
import importlib, pkgutil, sys
import hvd_dls, hvd_dls.core
for module in pkgutil.walk_packages(hvd_dls.core.__path__, "hvd_dls.core."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        assert error.name in ("numba", "llvmlite"), error
import hvd_dls.core.session.session, hvd_dls.core.session.state, hvd_dls.core.wire.agreement
assert hvd_dls.__file__.startswith(sys.prefix), hvd_dls.__file__
heavy = {"torch", "tensorflow", "keras", "horovod"} & set(sys.modules)
assert not heavy, heavy
print(hvd_dls.DLSConfig(density=0.5).density)
"""


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_it_installs_and_works_with_nothing_but_numpy(kind, request, tmp_path):
    python = environment_with_numpy(tmp_path)
    # With its requirements: they must be satisfied by what is there, since there is no index.
    options = ["--no-index", "--no-build-isolation", "--no-cache-dir"]
    archive = request.getfixturevalue(kind)
    if kind == "sdist":
        archive = wheel_of(archive, tmp_path)
    run(*PIP, "--python", str(python), "install", *options, str(archive))
    assert run(str(python), "-I", "-c", IMPORTS, cwd=tmp_path).startswith("0.5\n")

    command = python.with_name("hvd-dls")
    assert run(str(command), "--version", cwd=tmp_path) == f"hvd_dls {hvd_dls.__version__}\n"
    doctor = [str(command), "doctor", "--json"]
    done = subprocess.run(doctor, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1, done.stderr
    steps = json.loads(done.stdout)["steps"]
    assert steps["numpy"] == {"status": "works", "version": metadata.version("numpy")}
    assert steps["loops"]["status"] == "works"
    assert steps["torch"]["status"] == steps["tensorflow"]["status"] == "missing"
