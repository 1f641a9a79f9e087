"""Layers whose passes stay on a device, in real jobs: CPU tensors made to, and a GPU's."""

import horovod.torch as hvd
import numpy as np
import pytest
import torch
from torch import nn

from hvd_dls import NonFiniteGradientError
from hvd_dls.core.selection.backend import Future
from hvd_dls.core.session.baselines import BASELINES
from hvd_dls.torch import DLSCompressor, binding, on_device
from hvd_dls.torch.on_device import Device
from tests.torch.with_ranks.training import (
    SPARSE,
    assert_same_on_all_ranks,
    batch,
    flat,
    linear_loss,
    net,
    net_without_vectors,
    train,
    whole_numbers,
    wrap,
)


def all_of_them(parameter):
    return True


def some_of_them(parameter):
    return parameter.shape[0] % 3 != 0


def none_of_them(parameter):
    return False


@pytest.fixture
def backend(monkeypatch):
    """Chooses which parameters' passes stay on the device."""

    def choose(chosen):
        for module in (binding, on_device):
            monkeypatch.setattr(module, "stays_on_device", chosen)

    return choose


def places_of(compression):
    (bound,) = compression._bindings
    return bound.session._backends


OPTIONS = [
    {},
    {"values": "bfloat16", "index_code": "plain", "bucket_bytes": 2000},
    {"momentum": 0.5, "nesterov": True, "clip_value": 0.5, "warmup_steps": 3},
    {"clip_norm": 0.1, "strategy": "layerwise"},
    {"prior": "measured", "dense_steps": 2, "measure_every": 2},
    {"strategy": "norm"},
    {"strategy": "global", "momentum": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training_is_the_same_to_the_bit_wherever_the_passes_are(options, backend):
    trained = []
    for chosen in (none_of_them, all_of_them, some_of_them):
        backend(chosen)
        torch.manual_seed(1)
        model = net_without_vectors()
        compression = DLSCompressor(
            model.named_parameters(), **{"density": 0.05} | SPARSE | options
        )
        inner = torch.optim.SGD(model.parameters(), lr=0.05)
        train(model, wrap(model, compression, inner), range(8))
        trained.append(flat(model))
        assert_same_on_all_ranks(trained[-1])
        kinds = {type(p) for p in places_of(compression).values()}
        on_host = options.get("strategy") in BASELINES or chosen is none_of_them
        assert (Device in kinds) == (not on_host)
        assert np.isfinite(compression.last_step().thresholds).all()
    if "clip_norm" in options:  # norms are summed up in another order
        torch.testing.assert_close(trained[0], trained[1], rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(trained[0], trained[1])
        assert torch.equal(trained[0], trained[2])


@pytest.mark.parametrize("chosen", [all_of_them, some_of_them])
@pytest.mark.parametrize("momentum", [0, 0.9])
def test_groups_and_layers_that_go_dense(chosen, momentum, backend):
    backend(chosen)
    model = net()
    compression = DLSCompressor(density=0.05, momentum=momentum, **SPARSE)
    inner = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = wrap(model, compression, inner, groups=2)
    train(model, optimizer, range(4))
    assert compression.last_step().step == 4
    assert_same_on_all_ranks(flat(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("values", ["float32", "float16"])
def test_what_was_sent_and_the_residuals_are_all_that_was_accumulated(dtype, values, backend):
    backend(all_of_them)
    shapes = [(40, 30), (7, 5, 3, 3), (300, 2)]
    largest = 3  # sums stay below 256, up to which bfloat16 holds every whole number
    model = nn.ParameterList([nn.Parameter(torch.zeros(s, dtype=dtype)) for s in shapes])
    model.append(nn.Parameter(torch.zeros(30, 40, dtype=dtype).t()))  # not contiguous
    shapes.append((40, 30))
    compression = DLSCompressor(model.named_parameters(), density=0.1, values=values, **SPARSE)
    optimizer = wrap(model, compression, torch.optim.SGD(model.parameters(), lr=1), op=hvd.Sum)
    received = [torch.zeros(s) for s in shapes]
    accumulated = [torch.zeros(s) for s in shapes]
    for step in range(6):
        optimizer.zero_grad()
        sum(linear_loss(p, whole_numbers(p.shape, step, largest=largest)) for p in model).backward()
        optimizer.synchronize()
        for i, parameter in enumerate(model):
            received[i] += parameter.grad.float()
            for rank in range(hvd.size()):
                accumulated[i] += whole_numbers(parameter.shape, step, rank, largest)
        with optimizer.skip_synchronize():
            optimizer.step()
    (state,) = compression.state_dict()["models"]
    for i, shape in enumerate(shapes):
        kept = hvd.allreduce(state["residuals"][str(i)].float(), op=hvd.Sum, name=f"kept.{i}")
        assert kept.abs().sum() > 0
        assert torch.equal(received[i] + kept.reshape(shape), accumulated[i])


@pytest.mark.parametrize("to", [none_of_them, all_of_them])
def test_a_restart_goes_on_bit_for_bit_on_the_device_or_off_it(to, backend):
    def start():
        torch.manual_seed(1)
        model = net_without_vectors()
        compression = DLSCompressor(model.named_parameters(), density=0.05, momentum=0.5, **SPARSE)
        inner = torch.optim.SGD(model.parameters(), lr=0.05)
        return model, compression, wrap(model, compression, inner)

    backend(all_of_them)
    model, compression, optimizer = start()
    train(model, optimizer, range(6))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    (state,) = compression.state_dict()["models"]
    saved = {
        part: {name: values.clone() for name, values in state[part].items()}
        for part in ("residuals", "velocities")
    }
    saved = {"version": 1, "models": [state | saved]}
    train(model, optimizer, range(6, 10))

    backend(to)
    again, compression, optimizer = start()
    again.load_state_dict(weights)
    compression.load_state_dict(saved)
    train(again, optimizer, range(6, 10))
    assert torch.equal(flat(model), flat(again))


@pytest.mark.parametrize("where", ["0.weight", "0.bias", "6.weight"])
@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_nan_on_one_rank(where, nonfinite, backend):
    backend(all_of_them)
    model = net()
    compression = DLSCompressor(
        model.named_parameters(), density=0.1, nonfinite=nonfinite, momentum=0.9, **SPARSE
    )
    optimizer = wrap(model, compression, torch.optim.SGD(model.parameters(), lr=0.01))

    def step(number, bad):
        optimizer.zero_grad()
        loss = 0
        for name, parameter in model.named_parameters():
            gradient = whole_numbers(parameter.shape, number)
            if name == bad and hvd.rank() == hvd.size() - 1:
                gradient.view(-1)[0] = torch.nan
            loss = loss + linear_loss(parameter, gradient)
        loss.backward()
        optimizer.step()

    def everything():
        (state,) = compression.state_dict()["models"]
        parts = [flat(model), *state["residuals"].values(), *state["velocities"].values()]
        return b"".join(part.numpy().tobytes() for part in parts)

    step(0, "")
    before = everything()
    if nonfinite == "raise":
        with pytest.raises(NonFiniteGradientError, match=f"'{where}' on rank {hvd.size() - 1};"):
            step(1, where)
        assert everything() == before
        return
    step(1, where)
    assert everything() == before
    step(2, "")
    assert everything() != before
    assert compression.last_step().step == 2
    assert_same_on_all_ranks(flat(model))


def test_residuals_follow_the_loss_scale(backend):
    trained = []
    for chosen in (none_of_them, all_of_them):
        backend(chosen)
        torch.manual_seed(1)
        model, scale = net_without_vectors(), [1.0]
        compression = DLSCompressor(
            model.named_parameters(), loss_scale=lambda s=scale: s[0], density=0.05, **SPARSE
        )
        optimizer = wrap(model, compression, torch.optim.SGD(model.parameters(), lr=0.01))
        for step in range(8):
            scale[0] = 2.0 ** (step // 3)
            optimizer.zero_grad()
            images, labels = batch(step)
            (scale[0] * nn.functional.cross_entropy(model(images), labels)).backward()
            optimizer.step()
        trained.append(flat(model))
    assert torch.equal(*trained)


class Slow(Future):
    """A device that a rank sees ready after some looks; on another rank, only when it waits."""

    looks = 0

    def __init__(self, copied, read):
        self._copied, self._read = copied, read

    def ready(self):
        self.looks += 1
        return self.looks > 3 and hvd.rank() == 0

    def result(self):
        return self._read(self._copied.numpy())


def test_what_a_device_still_works_on_is_sent_in_a_later_hook_or_at_the_end(backend, monkeypatch):
    backend(all_of_them)
    trained = []
    for slow in (False, True):
        if slow:
            monkeypatch.setattr(on_device, "DeviceFuture", Slow)
        torch.manual_seed(1)
        layers = [nn.Linear(30, 30, bias=False) for _ in range(8)]
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 30, bias=False), *layers)
        compression = DLSCompressor(
            model.named_parameters(), density=0.05, bucket_bytes=4000, **SPARSE
        )
        optimizer = wrap(model, compression)
        for step in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch(step)[0]), batch(step)[1]).backward()
            (bound,) = compression._bindings
            if slow:
                on_their_way = len(bound._delivery.exchange._handles)
                assert (0 < on_their_way < 9) if hvd.rank() == 0 else on_their_way == 0
            else:
                assert len(bound._delivery.exchange._handles) == 9
            optimizer.step()
        trained.append(flat(model))
        assert_same_on_all_ranks(trained[-1])
    assert torch.equal(*trained)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False"
)
@pytest.mark.parametrize("options", [{}, {"momentum": 0.5}, {"strategy": "norm"}], ids=str)
def test_training_on_a_gpu(options):
    """All layers are compressed: Horovod may be built without CUDA, and then takes no others."""
    device = torch.device("cuda", hvd.rank() % torch.cuda.device_count())
    model = net_without_vectors().to(device)
    compression = DLSCompressor(model.named_parameters(), density=0.05, **SPARSE, **options)
    optimizer = wrap(model, compression, torch.optim.SGD(model.parameters(), lr=0.05))
    before = flat(model)
    for step in range(8):
        optimizer.zero_grad()
        images, labels = (values.to(device) for values in batch(step))
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    (state,) = compression.state_dict()["models"]
    kept = "cpu" if "strategy" in options else "cuda"
    assert {values.device.type for values in state["residuals"].values()} == {kept}
    assert compression.last_step().step == 8
    assert not torch.equal(before, flat(model))
    assert flat(model).isfinite().all()
    assert_same_on_all_ranks(flat(model).cpu())
