"""Sessions with layers on a device: beside the host's, to the bit, and what is sent when."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("horovod.torch")

from hvd_dls.core.selection.backend import Future  # noqa: E402
from hvd_dls.torch import on_device  # noqa: E402
from hvd_dls.torch.on_device import Device, finite_future  # noqa: E402
from tests.core.backends import (  # noqa: E402
    SHAPES,
    Framework,
    check_sessions,
    each_dtype,
    each_option,
    make_sessions,
)
from tests.torch.devices import array_of, on_each_device, tensor  # noqa: E402

TORCH = Framework(
    "torch",
    tensor,
    array_of,
    floats=lambda values: values.float() if values.dtype == torch.bfloat16 else values,
    writable=lambda values: values,
)
SIZES = {name: int(np.prod(shape)) for name, shape in SHAPES["torch"].items()}


@on_each_device
@each_option
@each_dtype
@pytest.mark.parametrize("mixed", [False, True])
def test_a_session_on_a_device_is_one_on_the_host_to_the_bit(device, options, dtype, mixed):
    names = [name for name in SIZES if not mixed or name in ("bias", "hidden")]
    check_sessions(TORCH, device, Device(torch.device(device)), names, dtype, options)


class Slow(Future):
    """A device that is ready when told to be."""

    finished = False

    def __init__(self, copied, read):
        self._copied, self._read = copied, read

    def ready(self):
        return Slow.finished

    def result(self):
        return self._read(self._copied.numpy())


def test_what_a_device_works_on_is_sent_later(monkeypatch):
    monkeypatch.setattr(on_device, "DeviceFuture", Slow)
    monkeypatch.setattr(Slow, "finished", False)
    backend = Device(torch.device("cpu"))
    (session, *_) = make_sessions(TORCH, dict.fromkeys(["hidden", "bias"], backend))
    gradients = {n: np.random.default_rng(0).standard_normal(size) for n, size in SIZES.items()}
    sent = []
    for name in reversed(SIZES):
        assert not session.complete
        gradient = gradients[name].astype(np.float32)
        if name == "bias":
            session.note(name, finite_future(torch.from_numpy(gradient)))
        else:
            session.compress(name, torch.from_numpy(gradient) if name == "hidden" else gradient)
        sent.append([b for b in session.ready() if session.payload(b) is not None])
    # hidden and bias are on their way, and hold up their buckets: bias travels with conv.
    assert [len(bucket.layers) for bucket in session.routing.buckets] == [1, 1, 1]
    assert sent == [[0], [], [], []]
    assert session.complete
    assert session.unfinished() == [1, 2]
    Slow.finished = True
    assert session.ready() == [1, 2]
    session.payload(2)
    assert session.ready() == [1]
    session.payload(1)
    assert session.ready() == session.unfinished() == []


def test_a_bad_gradient_that_goes_dense_is_told_of_later(monkeypatch):
    backend = Device(torch.device("cpu"))
    sessions = make_sessions(TORCH, {"bias": backend}, nonfinite="skip")
    gradients = {n: np.ones(size, np.float32) for n, size in SIZES.items()}
    bad = torch.full((32,), torch.nan)
    payloads = []
    for rank, session in enumerate(sessions):
        for name, gradient in gradients.items():
            if name == "bias":
                session.note(name, finite_future(bad if rank else torch.ones(32)))
            else:
                session.compress(name, gradient.copy())
        payloads.append({bucket: session.payload(bucket) for bucket in session.ready()})
    for session in sessions:
        for bucket in payloads[0]:
            session.receive(bucket, np.concatenate([sent[bucket] for sent in payloads]))
        assert session.accept("bias") is False
        assert session.refused
