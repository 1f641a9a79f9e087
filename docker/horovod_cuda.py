"""What Horovod's build has to be told where it builds with CUDA."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

# Without a card to ask: Ampere and Hopper. Later cards compile what the last one holds as PTX.
USUAL_CARDS = "80,90"
NCCL_HINTS = ("HOROVOD_NCCL_HOME", "HOROVOD_NCCL_INCLUDE", "HOROVOD_NCCL_LIB")


def said_by(*command: str) -> str:
    """All that a tool prints, or nothing where it is missing or fails."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        said = subprocess.run(command, check=True, capture_output=True, text=True)
        return said.stdout + said.stderr
    return ""


def nvcc(environ: Mapping[str, str]) -> str | None:
    """The compiler that will be used: of the folder that the caller names, or the first in PATH."""
    named = environ.get("HOROVOD_CUDA_HOME") or environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{named}/bin" if named else environ.get("PATH", ""))


def version(environ: Mapping[str, str]) -> str:
    """What the compiler says of its version."""
    return " ".join(said_by(nvcc(environ) or "nvcc", "--version").split())


def builds_with_cuda(frameworks: Mapping[str, str], environ: Mapping[str, str]) -> bool:
    """Whether Horovod's build will take CUDA, which it does wherever torch and a compiler have it.

    torch's release on the package index is for CUDA though its version does not say so.
    """
    return "+cpu" not in frameworks.get("torch", "+cpu") and nvcc(environ) is not None


def build_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables for Horovod's build that the caller has not set."""
    compiler = nvcc(environ) or "nvcc"
    home = toolkit(compiler)
    found = {
        "CUDA_HOME": home,
        "HOROVOD_CUDA_HOME": home,
        "HOROVOD_BUILD_CUDA_CC_LIST": cards_here() or USUAL_CARDS,
        **({} if any(name in environ for name in NCCL_HINTS) else nccl_from_pip()),
    }
    return {name: value for name, value in found.items() if name not in environ}


def toolkit(compiler: str) -> str:
    """The folder of the whole toolkit. The nvcc in PATH may be a script that lies elsewhere."""
    top = re.search(r"^#\$ TOP=(.+)$", said_by(compiler, "--dryrun", "-x", "cu", "/dev/null"), re.M)
    return str(Path(top[1] if top else Path(compiler).parents[1]).resolve())


def cards_here() -> str:
    """The compute capabilities of this machine's cards as Horovod's build wants them: '80,90'."""
    lines = said_by("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader").split()
    found = {int(line.replace(".", "")) for line in lines if re.fullmatch(r"\d+\.\d", line)}
    return ",".join(str(card) for card in sorted(found))


def nccl_from_pip() -> dict[str, str]:
    """Where torch's own NCCL is, if pip has installed its headers.

    With them comes the shared library alone, under its versioned name: see `horovod_edits`. At run
    time it is the one that torch has loaded.
    """
    package = importlib.util.find_spec("nvidia")
    for place in (package and package.submodule_search_locations) or ():
        folder = Path(place) / "nccl"
        if (folder / "include" / "nccl.h").exists():
            return {
                "HOROVOD_NCCL_INCLUDE": str(folder / "include"),
                "HOROVOD_NCCL_LIB": str(folder / "lib"),
                "HOROVOD_NCCL_LINK": "SHARED",
            }
    return {}
