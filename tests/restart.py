"""``hvd.shutdown(); hvd.init()`` in a job of horovodrun's, without Horovod's race.

Ranks find each other through a store within horovodrun, which forgets their addresses once all of
a scope have read them.  But when one scope is through, it also forgets how far the others are
(``finished_list.clear()`` in horovod/runner/http/http_server.py): so now and then old addresses
stay, and ``hvd.init()`` ends the process when it tries them.  Here they are cleared by hand.
"""

from __future__ import annotations

import itertools
import os
from types import ModuleType

from tests.store import request, wait_for_all

_restarts = itertools.count()


def restart_horovod(hvd: ModuleType) -> None:
    """Shuts Horovod down and starts it again, on all ranks.

    Args:
        hvd: ``horovod.torch`` or ``horovod.tensorflow``.
    """
    rank, size, number = hvd.rank(), hvd.size(), next(_restarts)
    scopes = [f"cross_{hvd.local_rank()}"]
    scopes += [f"local_{os.environ.get('HOROVOD_HOSTNAME')}"] if hvd.local_rank() == 0 else []
    scopes += ["global"] if rank == 0 else []
    hvd.shutdown()
    if "HOROVOD_GLOO_RENDEZVOUS_ADDR" in os.environ:
        wait_for_all(f"down.{number}", rank, size)
        for scope in scopes:
            _clear(scope)
        wait_for_all(f"cleared.{number}", rank, size)
    hvd.init()


def _clear(scope: str) -> None:
    request("PUT", scope, "marker")
    while request("GET", scope, "marker"):
        request("DELETE", scope, "marker")
