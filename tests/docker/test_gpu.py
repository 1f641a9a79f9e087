"""Trying the package on a GPU: the runner of parts, what it says, and the bundle it brings."""

import json
import sys
import uuid
from types import SimpleNamespace

import pytest

from tests.docker.scripts import load

gpu = load("gpu")
bundle = load("gpu_bundle")
parts = load("gpu_parts")
report = load("gpu_report")
cuda = load("horovod_cuda")


def part(name, code, limit=60.0, **more):
    return parts.Part(name, [sys.executable, "-c", code], limit, **more)


def run(tmp_path, *wanted, total=120.0):
    reported = []
    results = parts.run_all(wanted, tmp_path, tmp_path, total, reported.append)
    assert {result.name for result in reported} == {part.name for part in wanted}
    return {result.name: result for result in results}


# ---- parts


def test_a_failing_part_does_not_lose_the_rest(tmp_path):
    results = run(
        tmp_path,
        part("first", "print('before'); raise SystemExit(3)"),
        part("dependent", "", needs=["first"]),
        part("other", "print('after')"),
    )
    assert [result.outcome for result in results.values()] == ["failed", "not run", "passed"]
    assert results["first"].status == 3
    assert results["first"].tail == "before"
    assert results["dependent"].tail == "needs first"
    assert (tmp_path / "other.log").read_text() == "after\n"


def test_a_program_that_is_not_there_is_a_failure(tmp_path):
    results = run(tmp_path, parts.Part("lost", [str(tmp_path / "nothing")], 60))
    assert results["lost"].outcome == "failed"
    assert "nothing" in results["lost"].tail


DETACHED = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("started", flush=True)
time.sleep({})
"""


@pytest.mark.parametrize(("seconds", "outcome"), [(600, "timed out"), (0, "passed")])
def test_no_process_outlives_its_part_even_in_a_session_of_its_own(
    tmp_path, monkeypatch, seconds, outcome
):
    # A mark of this case's own: the cases run side by side, and each ends all that bears its mark.
    mark = uuid.uuid4().hex
    monkeypatch.setattr(parts.uuid, "uuid4", lambda: SimpleNamespace(hex=mark))
    result = parts.run(part("hangs", DETACHED.format(seconds)), tmp_path / "log", tmp_path, 10)
    assert result.outcome == outcome
    assert result.seconds < 600
    assert parts.marked(mark) == []
    assert (tmp_path / "log").read_text() == "started\n"


def test_the_total_limit_shrinks_what_remains(tmp_path):
    limits = []

    def fake_run(part, log, cwd, limit):
        limits.append(limit)
        now[0] += limit
        return parts.Result(part.name, "", parts.TIMED_OUT, limit)

    now = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "run", fake_run)
        wanted = [part(name, "", limit=50) for name in ("one", "two", "three")]
        results = parts.run_all(wanted, tmp_path, tmp_path, 70, lambda _: None, lambda: now[0])
    assert limits == [50, 20]
    assert [result.outcome for result in results] == ["timed out", "timed out", "not run"]
    assert results[-1].tail == "no time left"


# ---- what is said


def test_summaries_tell_machine_outcomes_and_the_end_of_what_failed(tmp_path):
    results = [
        parts.Result("build", "make it", parts.PASSED, 81.24, 0),
        parts.Result("tests", "try it", parts.FAILED, 3.0, 1, "assert 1 == 2"),
    ]
    report.write(tmp_path, "cuda", {"card": "some card", "driver": "1.2"}, results)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["machine"]["driver"] == "1.2"
    assert summary["parts"][1]["status"] == 1
    text = (tmp_path / "summary.md").read_text()
    assert "## Run on some card" in text
    assert "| build | passed | 81.2 |" in text
    assert "assert 1 == 2" in text
    assert "make it" not in text


def test_facts_of_a_machine_without_torch(monkeypatch):
    monkeypatch.setattr(report.sys, "executable", "/nowhere/python")
    facts = report.machine({})
    assert "does not import" in facts["torch"]
    assert {"Python", "driver", "nvcc"} <= facts.keys()


# ---- the command


def names(device, tmp_path):
    return [p.name for p in gpu.all_parts(device, tmp_path / "sdist", tmp_path, tmp_path)]


def test_a_dry_run_has_the_same_parts_without_nccl(tmp_path):
    on_cuda = names("cuda", tmp_path)
    assert names("cpu", tmp_path) == [name for name in on_cuda if "nccl" not in name]
    assert on_cuda[:2] == ["build", "tests"]


def test_parts_can_be_chosen(tmp_path):
    wanted = gpu.all_parts("cpu", tmp_path / "sdist", tmp_path, tmp_path)
    assert [p.name for p in gpu.selected(wanted, ["ranks", "tests"])] == ["tests", "ranks"]
    with pytest.raises(ValueError, match="no part other"):
        gpu.selected(wanted, ["other"])


def test_only_missing_packages_are_taken_from_the_bundle(tmp_path, monkeypatch):
    here = {"numba": "0.60", "setuptools": "82.0", "wheel": "0.40"}

    def version(name):
        if name not in here:
            raise gpu.metadata.PackageNotFoundError(name)
        return here[name]

    monkeypatch.setattr(gpu.metadata, "version", version)
    files = ["numba-1-py3-none-any.whl", "setuptools-80.0-py3-none-any.whl", "cffi-1-x.whl"]
    files += ["wheel-1-py3-none-any.whl", "horovod-0.28.1.tar.gz"]
    taken = gpu.missing_wheels([tmp_path / name for name in files])
    assert [file.name.split("-")[0] for file in taken] == ["setuptools", "cffi"]


def test_without_a_bundle_the_command_says_so(tmp_path, capsys):
    arguments = ["--bundle", tmp_path / "none", "--out", tmp_path / "out", "--work", tmp_path / "w"]
    assert gpu.main([*map(str, arguments)]) == 1
    assert "manifest.json" in capsys.readouterr().err


# ---- the bundle


def gathered(tmp_path, monkeypatch, limit_mb):
    """A bundle of small files in place of what would be downloaded."""
    written = {}

    def fake_download(wanted, python, into):
        into.mkdir()
        written[into] = wanted
        for package in wanted:
            (into / f"{package.split('<')[0]}-1-py3-none-any.whl").write_bytes(b"x" * 1000)

    def fake_sdist(into, log):
        log.touch()
        (into / "horovod-0.28.1.tar.gz").write_bytes(b"source")

    monkeypatch.setattr(bundle, "download", fake_download)
    monkeypatch.setattr(bundle, "download_sdist", fake_sdist)
    monkeypatch.setattr(bundle, "own_wheel", lambda into: (into / "hvd_dls-1.whl").touch())
    out = tmp_path / "bundle"
    assert bundle.main(["--out", str(out), "--limit-mb", str(limit_mb)]) == 0
    return out


def test_a_bundle_holds_what_its_manifest_says(tmp_path, monkeypatch, capsys):
    out = gathered(tmp_path, monkeypatch, 60)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["python"] == "3.12"
    assert manifest["left_out"] == []
    assert {file.name for file in bundle.verified(out)} == set(manifest["files"])
    assert {"horovod-0.28.1.tar.gz", "hvd_dls-1.whl"} <= set(manifest["files"])
    assert capsys.readouterr().out == f"{out}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_what_is_too_much_for_a_bundle_is_named(tmp_path, monkeypatch):
    out = gathered(tmp_path, monkeypatch, 0.0165)
    manifest = json.loads((out / "manifest.json").read_text())
    left_out = "tqdm joblib threadpoolctl scikit-learn numba llvmlite"
    assert manifest["left_out"] == left_out.split()
    assert not list(out.glob("numba*"))


def test_a_changed_file_in_a_bundle_is_refused(tmp_path, monkeypatch):
    out = gathered(tmp_path, monkeypatch, 60)
    (out / "numba-1-py3-none-any.whl").write_bytes(b"y" * 1000)
    with pytest.raises(ValueError, match="numba"):
        list(bundle.verified(out))


# ---- building with CUDA


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """A compiler that is a script outside the toolkit's folder, and a card."""
    home = tmp_path / "cuda-13.0"
    home.mkdir()
    tools = {
        "nvcc": f"[ $1 != --dryrun ] || echo '#$ TOP={home}/bin/..' >&2",
        "nvidia-smi": "printf '9.0\\n8.6\\n9.0\\n'",
    }
    for folder in (home / "bin", tmp_path / "tools"):
        folder.mkdir()
    for name, script in tools.items():
        file = tmp_path / "tools" / name
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'tools'}:/usr/bin:/bin")
    monkeypatch.setattr(cuda, "nccl_from_pip", dict)
    return home


def test_a_build_with_cuda_is_told_the_toolkit_and_the_cards(toolkit):
    path = f"{toolkit.parent / 'tools'}:/usr/bin:/bin"
    variables = cuda.build_variables({"PATH": path})
    assert variables["HOROVOD_BUILD_CUDA_CC_LIST"] == "86,90"
    assert variables["CUDA_HOME"] == variables["HOROVOD_CUDA_HOME"] == str(toolkit)
    named = {"PATH": path, "HOROVOD_BUILD_CUDA_CC_LIST": "75"}
    assert "HOROVOD_BUILD_CUDA_CC_LIST" not in cuda.build_variables(named)


def test_a_build_has_cuda_where_torch_and_a_compiler_have_it(toolkit):
    environ = {"PATH": str(toolkit.parent / "tools")}
    assert cuda.builds_with_cuda({"torch": "2.11.0"}, environ)
    assert not cuda.builds_with_cuda({"torch": "2.13.0+cpu"}, environ)
    assert not cuda.builds_with_cuda({"tensorflow": "2.21.0"}, environ)
    assert not cuda.builds_with_cuda({"torch": "2.11.0"}, {"PATH": "/nowhere"})


def test_nccl_that_pip_has_installed_is_found(tmp_path, monkeypatch):
    headers = tmp_path / "nvidia" / "nccl" / "include"
    headers.mkdir(parents=True)
    package = SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: package)
    assert cuda.nccl_from_pip() == {}
    (headers / "nccl.h").touch()
    assert cuda.nccl_from_pip()["HOROVOD_NCCL_INCLUDE"] == str(headers)
    assert cuda.nccl_from_pip()["HOROVOD_NCCL_LINK"] == "SHARED"


def test_time_limits_fit_into_the_total(tmp_path):
    """What two ranks do is reached even if all before it takes its whole time."""
    wanted = gpu.all_parts("cuda", tmp_path / "sdist", tmp_path, tmp_path)
    before = [p.limit for p in wanted[: names("cuda", tmp_path).index("two_ranks")]]
    assert sum(before) - min(before[:2]) <= gpu.TOTAL
