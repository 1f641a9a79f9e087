"""Python's standard library as byte-pair tokens, and its reference manual as the same tokens.

Sources and documentation strings of the modules that come with the Python that runs this: about
eight million characters, two and a half million tokens.  The same Python always gives the same.
"""

from __future__ import annotations

import sysconfig
import zlib
from pathlib import Path
from pydoc_data.topics import topics

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


def manual_data() -> Data:
    """Makes windows of Python's reference manual, of the library's tokens; each eighth topic is
    held out."""
    vocabulary = learn(texts()[0], TOKENS)
    parts: tuple[list[str], list[str]] = ([], [])
    for i, name in enumerate(sorted(topics)):
        parts[i % 8 == 0].append(topics[name])
    training, held_out = (_numbers(vocabulary, "\n".join(part)) for part in parts)
    return Data(windows(training, LENGTH, 1), windows(held_out, LENGTH, EVERY * LENGTH // 2))


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
