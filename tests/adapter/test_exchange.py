"""Which exchange is meant: what an elastic job has not got, and what "auto" comes to."""

import pytest

from hvd_dls.adapter.exchanges import exchange_of
from hvd_dls.config import DLSConfig
from hvd_dls.errors import DLSError

BOTH = ("allgather", "sparse_allreduce")


def chosen(exchange, senders=16, on_device=False, **options):
    return exchange_of(DLSConfig(exchange=exchange, **options), senders, on_device)


def test_what_was_asked_for_is_taken():
    for exchange in BOTH:
        assert chosen(exchange, senders=2, on_device=True) == exchange


def test_what_an_elastic_job_has_not_got_is_refused(monkeypatch):
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    assert chosen("allgather") == "allgather"
    with pytest.raises(DLSError, match="elastic job"):
        chosen("sparse_allreduce")


def test_auto_takes_owners_with_many_ranks_where_there_are_any(monkeypatch):
    assert [chosen("auto", senders=n) for n in (1, 7, 8, 1000)] == [*BOTH[:1] * 2, *BOTH[1:] * 2]
    assert chosen("auto", on_device=True) == "allgather"
    assert chosen("auto", strategy="global") == "allgather"
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    assert chosen("auto") == "allgather"
