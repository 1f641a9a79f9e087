"""What follows from the facts: what cannot work, what is slow, and what to type."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

Facts = dict[str, Any]
TRIED_WITH = "0.28.1"
# Oldest versions: those of setup.cfg; Keras's, of hvd_dls.keras; Triton's, of hvd_dls.torch.
OLDEST = {
    "numpy": "1.24",
    "numba": "0.59",
    "torch": "2.1",
    "tensorflow": "2.16",
    "tf_keras": "2.16",
}
OLDEST_KERAS = "3.10"
OLDEST_TRITON = "3.4"
# A container's shared memory, unless it is told otherwise, is 64 MiB.
LITTLE_SHARED_MEMORY = 256 << 20
# What has to work for a training with each framework.
NEEDED = {
    "torch": ("torch", "horovod.torch", "hvd_dls.torch", "start torch"),
    "tensorflow": (
        "tensorflow",
        "horovod.tensorflow",
        "hvd_dls.tensorflow",
        "start tensorflow",
    ),
    "keras": ("start tensorflow", "keras", "hvd_dls.keras"),
    "tf_keras": ("start tensorflow", "tf_keras", "horovod.tensorflow.keras"),
}
_WHEEL = "in a checkout of hvd_dls: python docker/horovod_wheel.py --install"
_PACKAGES = {"yaml": "pyyaml", "tf_keras": "tf-keras", "cv2": "opencv-python"}
_REPORT = "write an issue with this text"


class Finding(NamedTuple):
    """What is wrong.

    Attributes:
        level: ``"error"`` if no training can run because of it, ``"warning"`` if something does
            not work or is slow, ``"note"`` if it is good to know.
        what: in words.
        todo: what to type, or to do, line by line.
    """

    level: str
    what: str
    todo: tuple[str, ...] = ()


def ready(facts: Facts) -> dict[str, bool]:
    """Whether a training could run, for each framework."""
    base = _works(facts, "numpy") and _works(facts, "loops") and bool(_launchers(facts))
    return {
        framework: base and all(_works(facts, step) for step in steps)
        for framework, steps in NEEDED.items()
    }


def findings(facts: Facts, wanted: str | None = None) -> list[Finding]:
    """Everything that is wrong, the worst first.

    Args:
        facts: of ``facts.gather``.
        wanted: the framework that a training shall run with; None: any.
    """
    works = ready(facts)
    fatal = not (works[wanted] if wanted else any(works.values()))
    rules = (
        *_numpy_and_loops(facts),
        *_chains(facts, fatal, wanted),
        *_launching(facts),
        *_keras(facts),
        *_versions(facts),
        *_gpu(facts),
        *_machine(facts),
        *_network(facts),
    )
    found = dict.fromkeys(rules)  # each once
    return sorted(found, key=lambda finding: ("error", "warning", "note").index(finding.level))


def _works(facts: Facts, step: str) -> bool:
    return bool(facts["steps"][step]["status"] == "works")


def _wrong(facts: Facts, step: str) -> str:
    """How a step failed."""
    said = facts["steps"][step]
    how = {"missing": "is not installed", "broken": "fails", "crashed": "crashes"}
    words = {**how, "hung": "hangs", "not tried": "was not tried"}[said["status"]]
    error = "" if said["status"] == "missing" else said.get("error", "")
    return f"{step} {words}" + (f": {error}" if error else "")


def _pip(*packages: str) -> str:
    return " ".join(["python -m pip install", *packages])


def _reinstall(package: str) -> str:
    return _pip("--force-reinstall", "--no-deps", _PACKAGES.get(package, package))


def _numpy_and_loops(facts: Facts) -> Iterator[Finding]:
    if not _works(facts, "numpy"):
        missing = facts["steps"]["numpy"]["status"] == "missing"
        todo = _pip(f'"numpy>={OLDEST["numpy"]}"') if missing else _reinstall("numpy")
        yield Finding("error", _wrong(facts, "numpy"), (todo,))
        return
    if facts["steps"]["numba"]["status"] in ("crashed", "hung"):
        without = "or, slower: python -m pip uninstall numba"
        yield Finding("error", _wrong(facts, "numba"), (_pip("--upgrade", "numba"), without))
        return
    if not _works(facts, "loops"):
        yield Finding("error", f"selection of entries: {_wrong(facts, 'loops')}", (_REPORT,))
        return
    loops = facts["steps"]["loops"]
    if not loops["compiled"]:
        slow = "compression takes several times as long as with compiled loops: "
        if facts["variables"].get("NUMBA_DISABLE_JIT"):
            what = f"{slow}NUMBA_DISABLE_JIT is set"
            yield Finding("warning", what, ("unset NUMBA_DISABLE_JIT",))
        elif facts["steps"]["numba"]["status"] == "missing":
            yield Finding("warning", f"{slow}numba is not installed", (_pip("numba"),))
        else:
            why = _wrong(facts, "numba") if not _works(facts, "numba") else " ".join(loops["said"])
            todo = _pip("--upgrade", "numba", "numpy")
            yield Finding("warning", slow + why, (todo,))
    elif not loops["kept_in"]:
        what = "compiled loops are not kept on disk: each process compiles them, for some seconds"
        todo = "export NUMBA_CACHE_DIR=... (a folder that can be written to)"
        yield Finding("warning", what, (todo,))


def _chains(facts: Facts, fatal: bool, wanted: str | None) -> Iterator[Finding]:
    """The first thing that fails of each framework that is installed."""
    steps = facts["steps"]
    installed = [name for name in NEEDED if steps[name]["status"] not in ("missing", "not tried")]
    if wanted and wanted not in installed:
        oldest = {**OLDEST, "keras": OLDEST_KERAS}[wanted]
        package = _PACKAGES.get(wanted, wanted)
        todo = _pip(f'"{package}>={oldest}"', *(["tensorflow"] if "keras" in wanted else []))
        yield Finding("error", f"{wanted} is not installed", (todo, *_horovods_todo(facts)))
    elif not {"torch", "tensorflow"} & set(installed):
        one = _pip(f'"torch>={OLDEST["torch"]}"')
        other = _pip(f'"tensorflow>={OLDEST["tensorflow"]}"', "tf-keras")
        both = (one, f"or: {other}", *_horovods_todo(facts))
        yield Finding("error", "neither torch nor TensorFlow is installed", both)
    said = set()
    for framework in installed:
        level = "error" if fatal and wanted in (None, framework) else "warning"
        for step in NEEDED[framework]:
            if not _works(facts, step):
                if step not in said and steps[step]["status"] != "not tried":
                    yield Finding(level, *_failure(facts, step))
                said.add(step)
                break
    horovod = steps["horovod"]
    if not installed and horovod["status"] in ("broken", "crashed", "hung"):
        yield Finding("error", *_failure(facts, "horovod"))


def _failure(facts: Facts, step: str) -> tuple[str, tuple[str, ...]]:
    """What fails, and what to do."""
    said = facts["steps"][step]
    error, needs = said.get("error", ""), said.get("needs")
    package = step.split(".")[0]
    if package == "horovod":
        framework = step.split(".")[-1]
        todo = _horovods_todo(facts)
        if said["status"] == "missing":
            return "Horovod is not installed", todo
        if "has not been built" in error:
            return f"Horovod was built without {framework}", todo
        if re.search("undefined symbol|cannot open shared object|version.* not found", error):
            return f"Horovod was built for another {framework} than this one: {error}", todo
        if not needs:
            return _wrong(facts, step), todo
    if needs:
        return _wrong(facts, step), (_pip(_PACKAGES.get(needs, needs)),)
    if step == "hvd_dls.keras" and "KERAS_BACKEND" in error:
        return _wrong(facts, step), ("export KERAS_BACKEND=tensorflow",)
    if step == "hvd_dls.keras" and "or newer" in error:
        return _wrong(facts, step), (_pip("--upgrade", f'"keras>={OLDEST_KERAS}"'),)
    if package == "hvd_dls" or step.startswith("start "):
        return _wrong(facts, step), (_REPORT,)
    return _wrong(facts, step), (_reinstall(package),)


def _horovods_todo(facts: Facts) -> tuple[str, ...]:
    """How Horovod's wheel is made here; its archive on the index does not build as it stands."""
    lacks = [name for name in ("g++", "make", "cmake", "python3-dev") if not facts["tools"][name]]
    apt = [f"sudo apt-get install {' '.join(lacks)}"] if lacks else []
    return (*apt, _WHEEL)


def _launchers(facts: Facts) -> list[str]:
    """The programs that can start several ranks with the Horovod that is here."""
    tools = facts["tools"]
    built = [facts["steps"][f"horovod.{name}"] for name in ("torch", "tensorflow")]
    launchers = ["horovodrun"] if tools["horovodrun"] and any(b.get("gloo") for b in built) else []
    if any(b.get("mpi") for b in built):
        launchers += [name for name in ("mpirun", "srun") if tools[name]]
    return launchers


def _launching(facts: Facts) -> Iterator[Finding]:
    built = [
        facts["steps"][f"horovod.{name}"]
        for name in ("torch", "tensorflow")
        if _works(facts, f"horovod.{name}")
    ]
    if not built:
        return
    gloo = all(b["gloo"] for b in built)
    mpi = any(b["mpi"] for b in built)
    if not gloo:
        what = "Horovod was built without Gloo: no elastic training, and ranks start with mpirun"
        yield Finding("warning", what, _horovods_todo(facts))
    if not _launchers(facts):
        todo = "sudo apt-get install openmpi-bin" if mpi else _reinstall("horovod")
        what = "nothing starts several ranks: horovodrun (Gloo) or mpirun (MPI) is missing"
        yield Finding("error", what, (todo if mpi else _WHEEL,))
    elif mpi and not facts["tools"]["mpirun"]:
        what = "Horovod was built with MPI, but there is no mpirun: horovodrun needs --gloo"
        yield Finding("warning", what, ("sudo apt-get install openmpi-bin, or horovodrun --gloo",))
    elif mpi and gloo:
        yield Finding("note", "horovodrun takes MPI unless it is told --gloo")


def _keras(facts: Facts) -> Iterator[Finding]:
    keras = facts["steps"]["keras"]
    if _works(facts, "keras") and _version(keras["version"]) >= (3,):
        legacy = facts["variables"].get("TF_USE_LEGACY_KERAS") == "1"
        if _works(facts, "horovod.tensorflow") and not legacy:
            what = (
                f"with Keras {keras['version']}, the DistributedOptimizer of horovod.keras and "
                "horovod.tensorflow.keras trains without averaging and says nothing"
            )
            keep = "or, to stay with tf_keras: export TF_USE_LEGACY_KERAS=1"
            yield Finding("note", what, ("import hvd_dls.keras as hvd", keep))


def _versions(facts: Facts) -> Iterator[Finding]:
    steps = facts["steps"]
    for step, oldest in OLDEST.items():
        if _works(facts, step) and _version(steps[step].get("version")) < _version(oldest):
            package = _PACKAGES.get(step, step)
            what = f"{step} {steps[step]['version']} is older than what is supported, {oldest}"
            yield Finding("warning", what, (_pip("--upgrade", f'"{package}>={oldest}"'),))
    horovod = steps["horovod"]
    if not _works(facts, "horovod"):
        return
    if horovod["version"] != TRIED_WITH:
        what = f"Horovod {horovod['version']}: hvd_dls was tried with {TRIED_WITH} only"
        yield Finding("warning", what, (_WHEEL,))
    for framework, built in horovod["built_for"].items():
        here = steps[framework].get("version")
        if here and built != here and steps[f"horovod.{framework}"]["status"] != "missing":
            what = f"Horovod was built for {framework} {built}, and this is {here}"
            yield Finding("warning", what, _horovods_todo(facts))


def _gpu(facts: Facts) -> Iterator[Finding]:
    steps, torch = facts["steps"], facts["steps"]["torch"]
    used = [name for name in ("torch", "tensorflow") if steps[name].get("gpus")]
    if facts["machine"]["gpus"] and not used:
        what = "there is a GPU, but no framework that is installed uses it"
        yield Finding("note", what, ("install torch or TensorFlow for CUDA",))
    for framework in used:
        built = steps[f"horovod.{framework}"]
        if built["status"] == "works" and not (built["cuda"] or built["rocm"]):
            what = (
                f"{framework} has a GPU, but Horovod was built without: layers that go dense "
                "pass through the host's memory"
            )
            nvcc = () if facts["tools"]["nvcc"] else ("install CUDA's toolkit (nvcc)",)
            yield Finding("warning", what, (*nvcc, *_horovods_todo(facts)))
    if torch.get("gpus") and _version(torch.get("triton")) < _version(OLDEST_TRITON):
        what = (
            f"Triton {torch.get('triton') or 'is missing'}: gradients on a GPU are compressed by "
            f"torch's operations, not by fused kernels, which need {OLDEST_TRITON}"
        )
        yield Finding("warning", what, (_pip(f'"triton>={OLDEST_TRITON}"'),))


def _machine(facts: Facts) -> Iterator[Finding]:
    machine = facts["machine"]
    if machine.get("shared_memory", LITTLE_SHARED_MEMORY) < LITTLE_SHARED_MEMORY:
        mib = machine["shared_memory"] >> 20
        what = f"/dev/shm has {mib} MiB, which is little for NCCL and data loaders"
        yield Finding("note", what, ("docker run --shm-size 1g ...",))
    if machine.get("cores_quota", 1) < 1:
        what = f"this container may use {machine['cores_quota']} of a core"
        yield Finding("note", what, ("docker run --cpus ...",))


def _network(facts: Facts) -> Iterator[Finding]:
    others = [each for each in facts["machine"]["interfaces"] if not each["loopback"]]
    if facts["machine"]["name_is_loopback"] and any(each["ipv4"] for each in others):
        what = (
            "/etc/hosts gives this host's name a loopback address: on several hosts, process sets "
            "(hierarchical=True) over Gloo take that, whatever --network-interfaces says"
        )
        yield Finding("note", what, ("give the name its real address in /etc/hosts",))


def _version(text: str | None) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", (text or "").split("+")[0])[:3])
