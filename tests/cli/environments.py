"""Python environments in which much is missing or broken, made of folders on PYTHONPATH."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from tests.jobs import ROOT


def environment(folder, modules, borrowed=()):
    """A folder of modules.

    Args:
        folder: where it is made.
        modules: sources by module name, dots included.
        borrowed: packages of this Python that are there, too.

    Returns:
        The folder.
    """
    folder.mkdir()
    for name, source in modules.items():
        file = folder.joinpath(*name.split("."), "__init__.py")
        for parent in reversed(file.relative_to(folder).parents[:-1]):
            (folder / parent).mkdir(exist_ok=True)
            (folder / parent / "__init__.py").touch()
        file.write_text(source)
    for name in borrowed:
        source = Path(find_spec(name).origin).parent
        for part in (source, source.with_name(f"{name}.libs")):
            if part.exists():
                (folder / part.name).symlink_to(part)
    return folder


def hvd_dls(*arguments, path=None, variables=None, time_limit=600):
    """Runs ``python -m hvd_dls``.

    Args:
        arguments: of the command.
        path: a folder: then there is only what it has, and the standard library. None: this Python
            as it is.
        variables: of the environment, besides this process's.
        time_limit: seconds.

    Returns:
        The finished process, with its output as text.
    """
    alone = [] if path is None else ["-S"]
    return subprocess.run(
        [sys.executable, *alone, "-m", "hvd_dls", *arguments],
        capture_output=True,
        text=True,
        timeout=time_limit,
        cwd="/",
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, filter(None, (path, ROOT)))),
            **(variables or {}),
        },
    )
