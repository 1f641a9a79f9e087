"""Adam's moments of all layers as one message, for a rank that has come later."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hvd_dls.core.selection.adam import Weights
from hvd_dls.core.session.memory import Memory


def pack(memory: Memory) -> np.ndarray:
    """A rank's moments: uint8, as long for all ranks with the same layers."""
    parts = [np.array([memory.loss_scale])]
    for name, weights in memory.correction.weights.items():
        to_host = memory.backends[name].to_host
        first, second = memory.correction.velocities[name], memory.correction.second_moments[name]
        parts += [to_host(first), to_host(second), np.array(weights)]
    return np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in parts])


def unpack(message: np.ndarray, memory: Memory) -> None:
    """Takes over another rank's moments.

    Args:
        message: of ``pack``.
        memory: of a rank with the same layers.
    """
    pieces = _pieces(message, memory)
    scale = memory.loss_scale / float(next(pieces)[0])
    for name in memory.correction.weights:
        backend, correction = memory.backends[name], memory.correction
        backend.load(correction.velocities[name], next(pieces))
        backend.scale(correction.velocities[name], scale)
        backend.load(correction.second_moments[name], next(pieces))
        correction.weights[name] = Weights(*map(float, next(pieces)))


def _pieces(message: np.ndarray, memory: Memory) -> Iterator[np.ndarray]:
    layers = {layer.name: layer for layer in memory.plan.layers}
    counts: list[tuple[int, np.dtype]] = [(1, np.dtype(np.float64))]
    for name in memory.correction.weights:
        layer = layers[name]
        counts += [(layer.size, layer.work_dtype)] * 2 + [(2, np.dtype(np.float64))]
    start = 0
    for count, dtype in counts:
        end = start + count * dtype.itemsize
        yield np.frombuffer(message[start:end].tobytes(), dtype)
        start = end
