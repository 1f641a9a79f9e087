"""What docker/gpu.py says of a run: the machine, a table, summary.json and summary.md."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpu_parts import PASSED, Result
from horovod_cuda import said_by

PROBE = """
import json, torch
facts = {"torch": torch.__version__, "CUDA of torch": torch.version.cuda or "none"}
if torch.cuda.is_available():
    card = torch.cuda.get_device_properties(0)
    facts["card"] = f"{card.name}, {card.total_memory / 2**30:.0f} GiB"
    facts["compute capability"] = f"{card.major}.{card.minor}"
    facts["NCCL of torch"] = ".".join(map(str, torch.cuda.nccl.version()))
for name in ("triton", "numba", "numpy"):
    try:
        facts[name] = __import__(name).__version__
    except ImportError:
        facts[name] = "none"
print(json.dumps(facts))
"""


def machine(environment: Mapping[str, str]) -> dict[str, str]:
    """Card, driver and versions, as far as they can be had."""
    facts = {"Python": platform.python_version(), "kernel": platform.release()}
    try:
        probe = [sys.executable, "-c", PROBE]
        said = subprocess.run(
            probe, env=environment, capture_output=True, text=True, timeout=60, check=True
        )
        facts |= json.loads(said.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as problem:
        facts["torch"] = f"does not import: {problem}"
    driver = said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    release = [line for line in said_by("nvcc", "--version").splitlines() if "release" in line]
    facts["driver"] = (driver.splitlines() or ["none"])[0]
    facts["nvcc"] = release[0].strip() if release else "none"
    return facts


def table(results: Sequence[Result]) -> str:
    """A Markdown table: a line for each part."""
    rows = [("part", "outcome", "seconds"), ("---", "---", "---:")]
    rows += [(result.name, result.outcome, f"{result.seconds:.1f}") for result in results]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def write(out: Path, device: str, facts: Mapping[str, str], results: Sequence[Result]) -> None:
    """Both summaries, as they stand. Called after each part: a run cut short keeps what it has."""
    summary = {
        "device": device,
        "machine": dict(facts),
        "parts": [result.as_dict() for result in results],
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (out / "summary.md").write_text(markdown(device, facts, results))


def markdown(device: str, facts: Mapping[str, str], results: Sequence[Result]) -> str:
    lines = [f"## Run on {facts.get('card', 'no card')} (`--device {device}`)", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", table(results)]
    for result in results:
        if result.outcome != PASSED:
            lines += [f"### {result.name}: {result.outcome}", "", f"`{result.command}`", ""]
            lines += ["```", result.tail, "```", ""]
    return "\n".join(lines)
