"""How a worker of an elastic job talks with the test: lines of JSON out, orders in."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

MARK = "elastic-job:"  # what comes after it, in a line of output, is JSON
ORDERS = "HVD_DLS_TEST_ORDERS"  # a folder with a file for each worker that has one


def say(what: str, **values: Any) -> None:
    """Tells the test what happens: see ``ElasticJob.events``."""
    who = {"what": what, "pid": os.getpid(), "host": os.environ["HOROVOD_HOSTNAME"]}
    print(MARK, json.dumps(who | {"time": round(time.time(), 2)} | values), flush=True)


def order() -> str:
    """What ``ElasticJob.order`` has given this process, or its host; empty if nothing."""
    for name in (str(os.getpid()), os.environ["HOROVOD_HOSTNAME"]):
        file = Path(os.environ[ORDERS]) / name
        if file.exists():
            return file.read_text()
    return ""


def die_if(ordered: str) -> None:
    """Ends this process with SIGKILL if that is its order: at this very place in a step."""
    if order() == ordered:
        os.kill(os.getpid(), signal.SIGKILL)
