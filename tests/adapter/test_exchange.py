"""Exchanges that a framework's adapter, or an elastic job, has not got."""

import pytest

from hvd_dls.adapter.hosts import check_exchange
from hvd_dls.config import EXCHANGES
from hvd_dls.errors import DLSError


def test_what_an_adapter_or_an_elastic_job_has_not_got_is_refused(monkeypatch):
    check_exchange("sparse_allreduce", EXCHANGES)
    with pytest.raises(DLSError, match="for torch only; here, accepted is 'allgather'"):
        check_exchange("sparse_allreduce", ("allgather",))
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    check_exchange("allgather", EXCHANGES)
    with pytest.raises(DLSError, match="elastic job"):
        check_exchange("sparse_allreduce", EXCHANGES)
