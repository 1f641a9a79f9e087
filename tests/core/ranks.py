"""Several ranks of one model in one process: what Horovod and the adapters do, without them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hvd_dls.config import DLSConfig
from hvd_dls.core.layers import LayerSpec, layer_spec
from hvd_dls.core.session import Session
from hvd_dls.errors import NonFiniteGradientError

Gradients = dict[str, np.ndarray]

# Sizes 2,400 to 46,080, a small one in the middle, and two that go dense.
LAYERS = [
    layer_spec("conv1.weight", (32, 3, 5, 5)),
    layer_spec("conv1.bias", (32,)),
    layer_spec("conv2.weight", (64, 32, 3, 3)),
    layer_spec("conv3.weight", (64, 20, 1, 1)),
    layer_spec("fc.weight", (40, 1152)),
    layer_spec("fc.bias", (40,)),
]
SCALES = {"conv1.weight": 8.0, "conv2.weight": 1.0, "conv3.weight": 0.25, "fc.weight": 0.03125}


def make_sessions(
    n_ranks: int, layers: Sequence[LayerSpec] = LAYERS, **options: object
) -> list[Session]:
    options = {"cost_rule": False, "prior": "uniform"} | options
    config = DLSConfig.from_options(**options)
    return [Session(layers, config, n_ranks) for _ in range(n_ranks)]


def draw_gradients(rng: np.random.Generator, session: Session) -> Gradients:
    """Whole numbers of a power of two, so that sums are exact whatever their order."""
    drawn = {}
    for layer in session.plan.sparse:
        noise = np.clip(np.round(16 * rng.laplace(size=layer.size)), -512, 512) / 16
        dtype = {2: np.float16, 4: np.float32, 8: np.float64}[layer.itemsize]
        drawn[layer.name] = (SCALES.get(layer.name, 1.0) * noise).astype(dtype)
    return drawn


def send(session: Session, gradients: Gradients, names: Sequence[str]) -> dict[int, np.ndarray]:
    """What a rank sends, by bucket."""
    sent = {}
    for name in names:
        complete = session.compress(name, gradients[name])
        if complete is not None:
            sent[complete] = session.payload(complete)
    return sent | {bucket: session.payload(bucket) for bucket in session.unfinished()}


def receive(session: Session, payloads: Sequence[dict[int, np.ndarray]]) -> None:
    """What all ranks sent arrives."""
    for bucket in payloads[0]:
        session.receive(bucket, np.concatenate([sent[bucket] for sent in payloads]))


def step(
    sessions: list[Session],
    gradients: list[Gradients],
    rng: np.random.Generator | None = None,
) -> tuple[list[Gradients], list[NonFiniteGradientError]]:
    """One step of all ranks; each goes through the layers in its own order if there is a ``rng``.

    Returns:
        Each rank's sums; and the errors raised, each with the first layer of its rank's step.
    """
    names = list(gradients[0])

    def order() -> list[str]:
        return rng.permutation(names).tolist() if rng else names

    payloads = [send(s, g, order()) for s, g in zip(sessions, gradients, strict=True)]
    sums, errors = [], []
    for session in sessions:
        receive(session, payloads)
        out = {n: np.full_like(session.residuals[n], np.nan) for n in names}
        try:
            for name in order():
                session.decompress(name, out[name])
        except NonFiniteGradientError as error:
            assert all(np.isnan(values).all() for values in out.values())
            errors.append(error)
        sums.append(out)
    assert len(errors) in (0, len(sessions))
    return sums, errors


def k_of(session: Session) -> dict[str, int]:
    """Entries each layer sends in the next step."""
    return dict(zip((x.name for x in session.plan.sparse), session.k.tolist(), strict=True))


def copies(arrays: Gradients) -> Gradients:
    return {name: values.copy() for name, values in arrays.items()}
