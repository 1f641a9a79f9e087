"""The report as text that fits into an issue."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hvd_dls.cli.doctor.findings import Finding

Facts = dict[str, Any]
_WIDTH = 26
_NAMES = {"torch": "torch", "tensorflow": "TensorFlow", "keras": "Keras 3", "tf_keras": "tf_keras"}


def as_text(facts: Facts, findings: Sequence[Finding], works: dict[str, bool]) -> str:
    """The report.

    Args:
        facts: of ``facts.gather``.
        findings: what is wrong.
        works: whether a training could run, for each framework.
    """
    parts = [
        [f"hvd_dls {facts['hvd_dls']}, doctor"],
        [_row(*row) for row in _installed(facts)],
        [_row(*row) for row in _machine(facts)],
        list(_found(findings)),
        [_conclusion(works)],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _row(name: str, text: str) -> str:
    return f"{name:{_WIDTH}}{text}".rstrip()


def _installed(facts: Facts) -> Iterator[tuple[str, str]]:
    python, steps = facts["python"], facts["steps"]
    where = "" if python["environment"] else ", not in a virtual environment"
    named = f"{python['version']}, {python['implementation']}, {python['executable']}{where}"
    yield "Python", named
    yield "NumPy", _state(steps["numpy"])
    yield "numba", _state(steps["numba"], _loops(steps["loops"]))
    for name in ("torch", "tensorflow"):
        yield _NAMES[name], _state(steps[name], _devices(steps[name]))
    backend = steps["keras"].get("backend")
    yield "Keras", _state(steps["keras"], f"on {backend}" if backend else "")
    yield "tf_keras", _state(steps["tf_keras"])
    yield "Triton", steps["torch"].get("triton") or "not installed"
    yield "Horovod", _state(steps["horovod"], _built_for(steps["horovod"]))
    for name in ("torch", "tensorflow"):
        yield f"  for {_NAMES[name]}", _built(steps[f"horovod.{name}"])
    for name in ("hvd_dls.torch", "hvd_dls.tensorflow", "hvd_dls.keras"):
        yield name, "imports" if steps[name]["status"] == "works" else _state(steps[name])
    for name in ("torch", "tensorflow"):
        said = steps[f"start {name}"]
        one = "an allreduce of one rank works"
        yield f"horovod.{name} runs", one if said["status"] == "works" else _state(said)


def _state(said: Facts, more: str = "") -> str:
    """A version, or how it failed."""
    status: str = said["status"]
    if status != "works":  # findings have the error in full
        return "not installed" if status == "missing" else status
    return ", ".join(filter(None, (said.get("version") or "works", more)))


def _loops(loops: Facts) -> str:
    if loops["status"] != "works":
        return f"loops: {loops['status']}"
    if not loops["compiled"]:
        return "loops are not compiled"
    return f"loops compile, kept in {loops['kept_in']}" if loops["kept_in"] else "loops compile"


def _devices(said: Facts) -> str:
    cuda = f"CUDA {said['cuda']}" if said.get("cuda") else "without CUDA"
    return f"{cuda}, {'; '.join(said['gpus'])}" if said.get("gpus") else cuda


def _built_for(said: Facts) -> str:
    built = said.get("built_for") or {}
    versions = ", ".join(f"{name} {version}" for name, version in built.items())
    return f"built for {versions}" if versions else ""


def _built(said: Facts) -> str:
    if said["status"] != "works":
        return _state(said)
    names = {"gloo": "Gloo", "mpi": "MPI", "nccl": "NCCL", "cuda": "CUDA", "rocm": "ROCm"}
    has = [name for key, name in names.items() if said[key]]
    lacks = [name for key, name in names.items() if not said[key]]
    return f"with {', '.join(has) or 'nothing'}; without {', '.join(lacks) or 'nothing'}"


def _machine(facts: Facts) -> Iterator[tuple[str, str]]:
    machine, tools = facts["machine"], facts["tools"]
    if "host" in machine:
        yield "host", machine["host"]
    yield "system", ", ".join(filter(None, (machine["system"], machine["libc"])))
    usable, quota = machine["cores_usable"], machine.get("cores_quota")
    limit = f", at most {quota:g} at a time" if quota else ""
    yield "cores", f"{machine['cores']}, {usable} for this process{limit}"
    yield "memory", _memory(machine)
    yield "GPUs", "; ".join(machine["gpus"]) or "none that NVIDIA's driver knows"
    yield from _network(machine["interfaces"])
    yield "horovodrun", "found" if tools["horovodrun"] else "not found"
    for name in ("mpirun", "srun", "nvcc"):
        yield name, tools[name] or "not found"
    if facts["variables"]:
        pairs = (f"{name}={value}" for name, value in facts["variables"].items())
        yield "environment", " ".join(pairs)


def _memory(machine: Facts) -> str:
    names = {
        "memory": "",
        "memory_available": "available",
        "memory_limit": "at most, of the container",
        "shared_memory": "in /dev/shm",
    }
    return ", ".join(
        f"{machine[key] / 2**30:.1f} GiB {words}".rstrip()
        for key, words in names.items()
        if key in machine
    )


def _network(interfaces: Sequence[Facts]) -> Iterator[tuple[str, str]]:
    """As horovodrun chooses: loopback on one host; on several what they share, or what is named."""
    usable = [each for each in interfaces if each["up"] and each["ipv4"]]
    loopback = [each["name"] for each in usable if each["loopback"]]
    others = [each for each in usable if not each["loopback"]]
    yield "network, one host", ", ".join(loopback) or "no loopback interface with IPv4"
    named = [
        each["name"] + (f" ({each['mbit_per_s']} Mbit/s)" if each["mbit_per_s"] else "")
        for each in others
    ]
    hint = ": name one with --network-interfaces" if len(others) > 1 else ""
    yield "network, several hosts", (", ".join(named) or "no other interface with IPv4") + hint


def _found(findings: Sequence[Finding]) -> Iterator[str]:
    for finding in findings:
        yield f"{finding.level}: {finding.what}"
        for line in finding.todo:
            yield f"    {line}"


def _conclusion(works: dict[str, bool]) -> str:
    can = [_NAMES[name] for name, good in works.items() if good]
    return f"A training can run with {', '.join(can)}." if can else "No training can run here."
