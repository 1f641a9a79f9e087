"""What ranks of a host hand on: one of them all payloads, each of the others a header."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_dls.core.wire.headers import headers_in, pack_header, split, told_around
from hvd_dls.core.wire.layout import ABSENT, HEADER, Clock, payload_bytes
from hvd_dls.core.wire.pack import pack
from hvd_dls.errors import PayloadError
from tests.core.payloads import bucket_of

BUCKET = bucket_of([300, 40])
CAPACITY = 7
LENGTH = payload_bytes(BUCKET, CAPACITY)


def handed_on(ranks, owner, groups, seed=0):
    """Headers of ranks in steps of their own, and the owner's payloads, of noise."""
    rng = np.random.default_rng(seed)
    payloads = rng.integers(256, size=groups * LENGTH, dtype=np.uint8)
    parts = [pack_header(BUCKET, CAPACITY, Clock(rank, 2), rank == 1) for rank in range(ranks)]
    parts[owner] = payloads
    return np.concatenate(parts), payloads


@given(st.integers(1, 5), st.integers(0, 4), st.integers(1, 6))
def test_what_was_handed_on_is_taken_apart_again(ranks, owner, groups):
    owner %= ranks
    gathered, payloads = handed_on(ranks, owner, groups)
    apart = split(BUCKET, CAPACITY, gathered, ranks, owner, groups * LENGTH)
    assert np.array_equal(apart.payloads, payloads)
    others = [rank for rank in range(ranks) if rank != owner]
    assert apart.told == [((rank, 2), rank == 1) for rank in others]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda gathered: gathered[:-8],
        lambda gathered: gathered[40:],
        lambda gathered: np.append(gathered, gathered[:40]),
        lambda gathered: gathered[:0],
        lambda gathered: gathered.astype(np.uint16),
    ],
)
def test_another_length_or_type_is_refused(wrong):
    gathered, _ = handed_on(3, 1, 2)
    with pytest.raises(PayloadError, match=r"expected \d+ bytes of payloads and 2 headers"):
        split(BUCKET, CAPACITY, wrong(gathered), 3, 1, 2 * LENGTH)


@pytest.mark.parametrize("byte", range(HEADER.itemsize))
@pytest.mark.parametrize("bit", [0, 7])
def test_a_damaged_header_is_refused_or_tells_another_clock(byte, bit):
    gathered, _ = handed_on(3, 0, 2)
    gathered[2 * LENGTH + byte] ^= 1 << bit  # of rank 1, which has given up
    names = [name for name in HEADER.names if HEADER.fields[name][1] <= byte]
    if names[-1] in ("step", "attempt") or (names[-1] == "abandoned" and bit == 0):
        told = split(BUCKET, CAPACITY, gathered, 3, 0, 2 * LENGTH).told
        assert told[0] != ((1, 2), True)
        assert told[1] == ((2, 2), False)
        return
    with pytest.raises(PayloadError, match="header"):
        split(BUCKET, CAPACITY, gathered, 3, 0, 2 * LENGTH)


def test_a_header_for_another_capacity_is_refused_but_read():
    other = pack_header(BUCKET, CAPACITY + 1, Clock(5, 0))
    gathered = np.concatenate([handed_on(1, 0, 2)[0], other])
    with pytest.raises(PayloadError, match="header"):
        split(BUCKET, CAPACITY, gathered, 2, 0, 2 * LENGTH)
    assert headers_in(BUCKET, other) == ([], [((5, 0), False)])


@given(st.integers(1, 5), st.integers(0, 4), st.integers(0, 400))
def test_headers_are_read_around_payloads_of_any_length(ranks, owner, more):
    owner %= ranks
    clocks = [Clock(rank, 2) for rank in range(ranks)]
    parts = [pack_header(BUCKET, CAPACITY, clock) for clock in clocks]
    payload = pack(BUCKET, CAPACITY, [ABSENT] * 2, {}, Clock(7, 1)).payload
    noise = np.random.default_rng(more).integers(256, size=more, dtype=np.uint8)
    parts[owner] = np.concatenate([payload, noise])
    others = [clock for rank, clock in enumerate(clocks) if rank != owner]
    told = told_around(BUCKET, BUCKET, np.concatenate(parts), ranks, owner)
    assert [each.clock for each in told] == [(7, 1), *others]
    assert told_around(BUCKET, BUCKET, np.concatenate(parts)[8:], ranks, owner) == []


@given(st.integers(0, 2**32 - 1), st.integers(0, 400))
def test_noise_is_refused(seed, length):
    noise = np.random.default_rng(seed).integers(256, size=length, dtype=np.uint8)
    with pytest.raises(PayloadError):
        split(BUCKET, CAPACITY, noise, 3, 0, 2 * LENGTH)
    assert told_around(BUCKET, BUCKET, noise, 3, 0) == []
