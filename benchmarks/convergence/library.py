"""Python's standard library as byte-pair tokens.

Sources and documentation strings of the modules that come with the Python that runs this: about
eight million characters, two and a half million tokens.  The same Python always gives the same.
"""

from __future__ import annotations

import sysconfig
import zlib
from pathlib import Path

import torch

from benchmarks.convergence.bytepair import BytePairs, learn
from benchmarks.convergence.data import Data, windows

TOKENS = 2048
LENGTH = 64  # tokens of an example
HELD_OUT = 16  # one in so many files
EVERY = 3  # of the held-out windows is used: some hundred
# What other packages put there; tests; tables; and what newer versions of Python have not.
_LEFT_OUT = {
    *("site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "pydoc_data"),
    *("lib2to3", "distutils", "ensurepip", "__pycache__"),
}


def library_data() -> Data:
    """Makes windows of tokens; whole files are held out, whichever their names say."""
    training, held_out = texts()
    vocabulary = learn(training, TOKENS)
    return Data(
        windows(_numbers(vocabulary, training), LENGTH, 1),
        windows(_numbers(vocabulary, held_out), LENGTH, EVERY * LENGTH),
    )


def texts() -> tuple[str, str]:
    """Reads the library: the text to train with, and the one that is held out."""
    parts: tuple[list[str], list[str]] = ([], [])
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py")):
        name = file.relative_to(library)
        if _LEFT_OUT & set(name.parts) or name.name.startswith("_sysconfig"):
            continue
        parts[zlib.crc32(name.as_posix().encode()) % HELD_OUT == 0].append(file.read_text("utf-8"))
    return "\n".join(parts[0]), "\n".join(parts[1])


def _numbers(vocabulary: BytePairs, text: str) -> torch.Tensor:
    return torch.from_numpy(vocabulary.encode(text))
