"""``hvd.shutdown(); hvd.init()`` in a job of horovodrun's, without Horovod's race.

Ranks find each other through a store within horovodrun, which forgets their addresses once all of
a scope have read them.  But when one scope is through, it also forgets how far the others are
(``finished_list.clear()`` in horovod/runner/http/http_server.py): so now and then old addresses
stay, and ``hvd.init()`` ends the process when it tries them.  Here they are cleared by hand.
"""

from __future__ import annotations

import itertools
import os
import time
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import horovod.tensorflow as hvd

_restarts = itertools.count()


def restart_horovod() -> None:
    """Shuts Horovod down and starts it again, on all ranks."""
    rank, size, number = hvd.rank(), hvd.size(), next(_restarts)
    scopes = ["global", f"cross_{hvd.local_rank()}", f"local_{os.environ.get('HOROVOD_HOSTNAME')}"]
    hvd.shutdown()
    if "HOROVOD_GLOO_RENDEZVOUS_ADDR" in os.environ:
        _wait_for_all(f"down.{number}", rank, size)
        for scope in scopes:
            if rank == 0 or scope.startswith("cross"):
                _clear(scope)
        _wait_for_all(f"cleared.{number}", rank, size)
    hvd.init()


def _clear(scope: str) -> None:
    _request("PUT", scope, "marker")
    while _request("GET", scope, "marker"):
        _request("DELETE", scope, "marker")


def _wait_for_all(what: str, rank: int, size: int) -> None:
    _request("PUT", "restart", f"{what}.{rank}")
    while not all(_request("GET", "restart", f"{what}.{other}") for other in range(size)):
        time.sleep(0.01)


def _request(method: str, scope: str, key: str) -> bool:
    """Whether the store has the key, for "GET"."""
    address = os.environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"]
    port = os.environ["HOROVOD_GLOO_RENDEZVOUS_PORT"]
    data = b"1" if method == "PUT" else None
    try:
        urlopen(Request(f"http://{address}:{port}/{scope}/{key}", data, method=method)).close()
    except HTTPError:
        return False
    return True
