"""What the programs of this folder share; they run on every rank of a job."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Moment(NamedTuple):
    """The time, and what this host's link has carried until then."""

    seconds: float
    received: int
    sent: int


def now() -> Moment:
    link = Path("/sys/class/net/eth0/statistics")
    received, sent = (int((link / name).read_text()) for name in ("rx_bytes", "tx_bytes"))
    return Moment(time.monotonic(), received, sent)


def since(start: Moment) -> dict[str, float]:
    end = now()
    return {name: getattr(end, name) - getattr(start, name) for name in Moment._fields}


def digest(values: np.ndarray) -> str:
    """Differs if any bit does."""
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def identity(hvd: Any) -> dict[str, Any]:
    """Who this rank is; Horovod does not say so any more after a failure."""
    who = {"rank": hvd.rank(), "size": hvd.size(), "host": socket.gethostname()}
    return who | {"local_rank": hvd.local_rank(), "local_size": hvd.local_size()}


def report(who: dict[str, Any], name: str = "rank", **findings: Any) -> None:
    """Leaves a report for the test, in one piece, in the folder that the command line names."""
    file = Path(sys.argv[1], f"{name}{who['rank']}.json")
    file.with_suffix(".part").write_text(json.dumps({**who, "time": time.time(), **findings}))
    os.replace(file.with_suffix(".part"), file)
