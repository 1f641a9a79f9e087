"""Whose gradients were not finite: what owners hand out of a step that is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_dls.core.balancing.layers import layer_spec
from hvd_dls.core.wire.dealing import Dealing
from hvd_dls.core.wire.layout import ABSENT, NOT_FINITE, SENT, Bucket, Clock, payload_bytes
from hvd_dls.core.wire.pack import pack
from hvd_dls.core.wire.refused import pack_refused, take_names
from hvd_dls.core.wire.regions import regions_of
from hvd_dls.core.wire.strips import Frame, Strip
from hvd_dls.core.wire.unpack import unpack
from hvd_dls.errors import PayloadError
from tests.core.strategies import seeds

NOW = Clock(7, 1)


def region(code="elias-fano", values="float32"):
    layers = layer_spec("a", (20, 30)), layer_spec("b", (40, 10)), layer_spec("c", (5, 9))
    bucket = Bucket(layers, values, code, watched=("a.bias", "b.bias"))
    return regions_of(Dealing(bucket, 3))[0].handed_out


@given(
    capacity=st.integers(1, 200),
    senders=st.sampled_from([1, 3, 8, 9, 64, 1000]),
    code=st.sampled_from(["elias-fano", "plain"]),
    values=st.sampled_from(["float32", "bfloat16"]),
    seed=seeds,
)
def test_all_are_named_for_whom_there_is_room_and_nothing_else_is_told(
    capacity, senders, code, values, seed
):
    of, rng = region(code, values), np.random.default_rng(seed)
    status = rng.choice([SENT, NOT_FINITE, ABSENT], len(of.layers)).astype(np.uint8)
    watched = {name: NOT_FINITE for name in of.watched if rng.random() < 0.5}
    bad = np.flatnonzero(
        [*(status == NOT_FINITE), *(watched.get(n) == NOT_FINITE for n in of.watched)]
    )
    said = rng.random((len(bad), senders)) < rng.choice([0, 0.1, 1])
    payload = pack_refused(of, capacity, status, watched, said, NOW)
    assert len(payload) == payload_bytes(of, capacity)
    apart = take_names(of, capacity, payload, senders)
    items = {"float32": 4, "bfloat16": 2}[values] * capacity
    fits = min(len(bad), (-(-items // 8) * 8) // -(-senders // 8))  # at least: values alone
    expected = [(int(bad[row]), rank) for row, rank in np.argwhere(said).tolist()]
    assert apart.where == expected[: len(apart.where)]
    assert {row for row, _ in apart.where} >= {int(bad[n]) for n in range(fits) if said[n].any()}
    quickly = Strip(Frame([of]), np.array([capacity])).read(payload, NOW)
    assert (quickly is None) == bool(apart.where)  # then each owner's is looked at
    (read,) = unpack(of, capacity, apart.payload, [5])
    assert read.status.tolist() == status.tolist()
    assert read.watched.tolist() == [watched.get(name, SENT) for name in of.watched]
    assert not read.starts.any()


def test_what_is_no_name_stays_and_is_refused():
    of = region()
    status = np.array([NOT_FINITE, *[SENT] * (len(of.layers) - 1)], np.uint8)
    payload = pack_refused(of, 4, status, {}, np.array([[True, False, True]]), NOW)
    assert take_names(of, 4, payload, 3).where == [(0, 0), (0, 2)]
    payload[np.flatnonzero(payload)[-1]] |= 1  # a rank that there is not
    apart = take_names(of, 4, payload, 3)
    with pytest.raises(PayloadError, match="room for further values is in use"):
        unpack(of, 4, apart.payload, [5])


def test_a_payload_of_sums_is_left_as_it_is():
    of = region()
    payload = pack(of, 4, [ABSENT] * len(of.layers), {}, NOW).payload
    apart = take_names(of, 4, payload, 3)
    assert apart.where == []
    assert np.array_equal(apart.payload, payload)
