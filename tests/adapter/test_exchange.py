"""An exchange that an elastic job has not got."""

import pytest

from hvd_dls.adapter.hosts import check_exchange
from hvd_dls.errors import DLSError


def test_owners_in_an_elastic_job_are_refused(monkeypatch):
    check_exchange("sparse_allreduce")
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    check_exchange("allgather")
    with pytest.raises(DLSError, match="elastic job"):
        check_exchange("sparse_allreduce")
