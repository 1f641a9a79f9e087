"""What a session refuses, and that it goes on all the same."""

import numpy as np
import pytest

from hvd_dls.config import DLSConfig
from hvd_dls.core.balancing.layers import layer_spec
from hvd_dls.core.session.session import Session
from hvd_dls.errors import DLSError, PayloadError
from tests.core.ranks import SPARSE, draw_gradients, make_sessions, receive, send


def test_a_layer_cannot_be_in_a_step_twice():
    session, _ = make_sessions(2)
    gradient = np.ones(2400, np.float32)
    session.compress("conv1.weight", gradient)
    with pytest.raises(DLSError, match=r"'conv1.weight': compressed twice"):
        session.compress("conv1.weight", gradient)
    (bucket,) = session.unfinished()
    session.receive(bucket, np.tile(session.payload(bucket), 2))
    session.decompress("conv1.weight", gradient)
    with pytest.raises(DLSError, match=r"'conv1.weight': decompressed, but not on its way"):
        session.decompress("conv1.weight", gradient)


@pytest.mark.parametrize("dense_steps", [0, 1])
def test_a_layer_that_goes_dense_cannot_be_in_a_step_twice(dense_steps):
    session, _ = make_sessions(2, dense_steps=dense_steps)
    session.note("fc.bias", finite=True)
    with pytest.raises(DLSError, match=r"'fc.bias': compressed twice"):
        session.note("fc.bias", finite=False)
    for bucket in session.unfinished():
        session.receive(bucket, np.tile(session.payload(bucket), 2))
    assert session.accept("fc.bias")
    with pytest.raises(DLSError, match=r"'fc.bias': reduced, but not on its way"):
        session.accept("fc.bias")
    with pytest.raises(DLSError, match=r"'conv1.bias': reduced, but not on its way"):
        session.accept("conv1.bias")
    assert session.last_step.step == 1


def test_no_layer_that_goes_dense_is_accepted_before_all_has_arrived():
    session, _ = make_sessions(2)
    session.note("fc.bias", finite=True)
    session.compress("conv1.weight", np.ones(2400, np.float32))
    with pytest.raises(DLSError, match=r"before buckets \[0\] were received"):
        session.accept("fc.bias")
    session.receive(0, np.tile(session.payload(0), 2))
    assert session.accept("fc.bias")
    session.decompress("conv1.weight", np.empty(2400, np.float32))
    assert session.last_step.step == 1


def test_a_bucket_is_complete_with_its_last_layer_watched_or_not():
    session, _ = make_sessions(2, bucket_bytes=1)
    assert session.note("fc.bias", finite=True) is None
    assert session.compress("fc.weight", np.ones(46_080, np.float32)) == 0
    assert session.compress("conv1.weight", np.ones(2400, np.float32)) is None
    assert session.unfinished() == [0, 3]
    assert session.note("conv1.bias", finite=True) == 3
    assert not session.complete
    for bucket in session.unfinished():
        session.payload(bucket)
    assert session.unfinished() == []


def test_nothing_is_decompressed_before_all_has_arrived():
    session, _ = make_sessions(2, bucket_bytes=1)
    for name in SPARSE[:2]:
        session.compress(name, np.ones(session.residuals[name].shape, np.float32))
    first, second = session.unfinished()
    session.receive(first, np.tile(session.payload(first), 2))
    session.payload(second)
    with pytest.raises(DLSError, match=rf"before buckets \[{second}\] were received"):
        session.decompress(SPARSE[1], np.empty(18_432, np.float32))
    assert not any(residual.any() for residual in session.residuals.values())


@pytest.mark.parametrize("shape", [(2399,), (2401,), (32, 75), ()])
def test_a_gradient_of_another_shape_is_refused(shape):
    session, _ = make_sessions(2)
    with pytest.raises(DLSError, match=r"'conv1.weight': gradient of shape .* expected \(2400,\)"):
        session.compress("conv1.weight", np.ones(shape, np.float32))


def test_another_bucket_s_payloads_are_refused_and_the_right_ones_taken_then():
    sessions = make_sessions(2, bucket_bytes=1)
    gradients = [draw_gradients(np.random.default_rng(rank), sessions[0]) for rank in range(2)]
    payloads = [send(s, g, SPARSE) for s, g in zip(sessions, gradients, strict=True)]
    wrong = np.concatenate([sent.payloads[1] for sent in payloads])
    with pytest.raises(PayloadError, match=r"'fc.weight'"):
        sessions[0].receive(0, wrong)
    receive(sessions[0], payloads)
    for name in SPARSE:
        sessions[0].decompress(name, gradients[0][name])
    assert sessions[0].last_step.step == 1


def test_what_is_not_on_its_way_cannot_be_decompressed():
    layer = layer_spec("l", (40, 30))
    session = Session([layer], DLSConfig(density=0.1, dense_below=0, cost_rule=False), 2)
    with pytest.raises(DLSError, match="'l': decompressed, but not on its way"):
        session.decompress("l", np.zeros(1200, np.float32))
