"""Sessions with layers on a device beside sessions on the host: what tests of frameworks share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from hvd_dls.config import DLSConfig
from hvd_dls.core.balancing.layers import layer_spec
from hvd_dls.core.checkpoint.redistribution import ARRAYS
from hvd_dls.core.session.session import Session
from tests.core.selection.test_passes import load, store

SHAPES = {  # by framework
    "torch": {"conv": (32, 3, 5, 5), "bias": (32,), "hidden": (64, 288), "out": (40, 60)},
    "tensorflow": {"conv": (5, 5, 3, 32), "bias": (32,), "hidden": (288, 64), "out": (60, 40)},
}
RANKS = 2
each_option = pytest.mark.parametrize(
    "options",
    [
        {},
        {"values": "bfloat16", "index_code": "plain"},
        {"values": "float16", "momentum": 0.9},
        {"momentum": 0.5, "nesterov": True, "clip_value": 1.0, "dense_steps": 2},
        {"prior": "measured", "measure_every": 2},
        {"strategy": "layerwise", "momentum": 0.9, "momentum_masking": False},
    ],
    ids=str,
)
each_dtype = pytest.mark.parametrize("dtype", [np.float16, np.uint16, np.float32, np.float64])


class Framework(NamedTuple):
    """What a framework's tensors are to the core's arrays; uint16 is bfloat16.

    Attributes:
        name: of it, whose layout the layers have.
        tensor: a copy of an array, on a device.
        array: a copy of a tensor.
        floats: a tensor as Horovod takes it: not bfloat16.
        writable: a tensor as ``decompress`` writes into it.
    """

    name: str
    tensor: Callable[[np.ndarray, Any], Any]
    array: Callable[[Any], np.ndarray]
    floats: Callable[[Any], Any]
    writable: Callable[[Any], Any]

    def bits(self, values):
        return (values if isinstance(values, np.ndarray) else self.array(values)).tobytes()


def make_sessions(framework, backends, itemsize=4, **options):
    shapes = SHAPES[framework.name]
    layers = [layer_spec(name, s, framework.name, itemsize) for name, s in shapes.items()]
    config = DLSConfig(density=0.05, cost_rule=False, bucket_bytes=40_000, **options)
    return [Session(layers, config, RANKS, r, backends=backends) for r in range(RANKS)]


def check_sessions(framework, device, backend, names, dtype, options):
    """With steps that are skipped, changes of the loss scale, and a restart from the other's state.

    Residuals are not zero at first, so that sums with 16-bit gradients do not tie.

    Args:
        framework: the one that is tested.
        device: as its ``tensor`` takes it.
        backend: of the layers on the device.
        names: of these layers.
        dtype: of the gradients.
        options: of the compressor.
    """
    itemsize, shapes = np.dtype(dtype).itemsize, SHAPES[framework.name]
    options = {"nonfinite": "skip"} | options

    def both():
        return [
            make_sessions(framework, backends, itemsize, **options)
            for backends in ({}, dict.fromkeys(names, backend))
        ]

    host, other = both()
    rng = np.random.default_rng(0)
    for one, two in zip(host, other, strict=True):
        for name, residual in one.residuals.items():
            residual[:] = rng.standard_normal(len(residual))
            two.memory.backends[name].load(two.residuals[name], residual)
    for step in range(8):
        gradients = []
        for _ in range(RANKS):
            of_rank = {n: rng.standard_t(4, np.prod(shape)) for n, shape in shapes.items()}
            if step in (1, 4):
                of_rank[("bias", "hidden")[step // 4]][5] = np.nan
            gradients.append({n: store(g, dtype) for n, g in of_rank.items()})
        there = [
            {n: framework.tensor(g, device) if n in names else g.copy() for n, g in of_rank.items()}
            for of_rank in gradients
        ]
        if step == 3:
            for session in (*host, *other):
                session.scale_to(1024.0)
        expected, own = (_step(framework, *x) for x in ((host, gradients), (other, there)))
        assert own[:2] == expected[:2]
        assert own[2] == expected[2] or host[0].refused
        for one, two in zip(host, other, strict=True):
            assert _state_of(framework, one) == _state_of(framework, two)
            assert (one.skipped, one.refused) == (two.skipped, two.refused)
            if one.last_step is not None:
                assert one.last_step.quality == two.last_step.quality
        if step == 5:
            assert host[0].skipped == 2
            saved = [[session.state_dict() for session in sessions] for sessions in (host, other)]
            host, other = both()
            for one, two, of_host, of_other in zip(host, other, *saved, strict=True):
                two.load_state_dict(of_host)
                parts = {
                    part: {
                        n: np.frombuffer(framework.bits(x), _dtype_of(part, one))
                        for n, x in of_other[part].items()
                    }
                    for part in ARRAYS
                    if part in of_other
                }
                one.load_state_dict(of_other | parts)


def _dtype_of(part, session):
    return np.float64 if part == "moment_weights" else session.residuals["out"].dtype


def _step(framework, sessions, gradients):
    """One step of all ranks: payloads, what came out on each, and what went dense."""
    payloads, waiting, out = [], [], []
    for session, of_rank in zip(sessions, gradients, strict=True):
        sent = {}
        for name, gradient in reversed(of_rank.items()):
            if session.is_sparse(name):
                complete = session.compress(name, gradient)
            else:
                finite = session.memory.backends[name].finite(_floats(framework, gradient))
                complete = session.note(name, session.dense_step or finite)
                corrected = session.correct(name, gradient) if session.corrects else gradient
                waiting.append(corrected)
            if complete is not None:
                sent[complete] = session.payload(complete)
        payloads.append(sent)
    for session, of_rank in zip(sessions, gradients, strict=True):
        for bucket in payloads[0]:
            session.receive(bucket, np.concatenate([sent[bucket] for sent in payloads]))
        for name, gradient in of_rank.items():
            if session.is_sparse(name):
                if not isinstance(gradient, np.ndarray):
                    gradient = framework.writable(gradient)
                session.decompress(name, gradient, 0.5)
                out.append(gradient)
            else:
                # What stands for the sum is the same on all ranks.
                whole = _floats(framework, gradients[0][name]) if session.dense_step else None
                session.accept(name, whole)
    return (
        [sent[bucket].tobytes() for sent in payloads for bucket in sorted(sent)],
        [framework.bits(values) for values in out],
        [framework.bits(values) for values in waiting],
    )


def _floats(framework, gradient):
    if not isinstance(gradient, np.ndarray):
        return framework.floats(gradient)
    return load(gradient).astype(np.float32) if gradient.dtype == np.uint16 else gradient


def _state_of(framework, session):
    state = session.state_dict()
    parts = [array for part in ARRAYS for array in state.get(part, {}).values()]
    bits = [framework.bits(part) for part in parts]
    return bits, state["ratios"].tolist(), state["thresholds"].tolist()
