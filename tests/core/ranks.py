"""Several ranks of one model in one process: what Horovod and the adapters do, without them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hvd_dls.config import DLSConfig
from hvd_dls.core.balancing.layers import LayerSpec, layer_spec
from hvd_dls.core.checkpoint.redistribution import ARRAYS
from hvd_dls.core.selection.passes_numpy import widened
from hvd_dls.core.session.groups import Groups
from hvd_dls.core.session.session import Session
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
SPARSE = ["conv1.weight", "conv2.weight", "conv3.weight", "fc.weight"]
DENSE = ["conv1.bias", "fc.bias"]
SCALES = {"conv1.weight": 8.0, "conv2.weight": 1.0, "conv3.weight": 0.25, "fc.weight": 0.03125}


def make_sessions(
    n_ranks: int,
    layers: Sequence[LayerSpec] = LAYERS,
    groups: Sequence[int] | None = None,
    **options: object,
) -> list[Session]:
    """A session of each rank; ``groups`` are the sizes of groups of ranks, if there are any."""
    options = {"cost_rule": False, "prior": "uniform"} | options
    config = DLSConfig.from_options(**options)
    sizes = [1] * n_ranks if groups is None else groups
    return [
        Session(layers, config, n_ranks, rank, groups=Groups(sizes, rank))
        for rank in range(sum(sizes))
    ]


def draw_gradients(rng: np.random.Generator, session: Session) -> Gradients:
    """Whole numbers of a power of two, so that sums are exact whatever their order."""
    drawn = {}
    for layer in session.plan.layers:
        noise = np.clip(np.round(16 * rng.laplace(size=layer.size)), -512, 512) / 16
        dtype = {2: np.float16, 4: np.float32, 8: np.float64}[layer.itemsize]
        drawn[layer.name] = (SCALES.get(layer.name, 1.0) * noise).astype(dtype)
    return drawn


class Sent(NamedTuple):
    """What a rank sends."""

    payloads: dict[int, np.ndarray]  # by bucket
    whole: Gradients  # of the layers that go dense


def send(session: Session, gradients: Gradients, names: Sequence[str]) -> Sent:
    """A rank goes through its layers, in this order."""
    sent = Sent({}, {})
    for name in names:
        gradient = gradients[name]
        if session.is_sparse(name):
            complete = session.compress(name, gradient)
        else:
            finite = session.dense_step or bool(np.isfinite(widened(gradient)).all())
            complete = session.note(name, finite)
            sent.whole[name] = (
                session.correct(name, gradient) if session.corrects else widened(gradient).copy()
            )
        if complete is not None:
            sent.payloads[complete] = session.payload(complete)
    sent.payloads.update({bucket: session.payload(bucket) for bucket in session.unfinished()})
    return sent


def receive(session: Session, ranks: Sequence[Sent]) -> None:
    """What all ranks sent arrives."""
    for bucket in ranks[0].payloads:
        session.receive(bucket, np.concatenate([sent.payloads[bucket] for sent in ranks]))


def finish(
    session: Session, ranks: Sequence[Sent], names: Sequence[str], out: Gradients, scale: float
) -> None:
    """A rank writes the sums of its layers, in this order; zero or Inf, if they do not count."""
    for name in names:
        if name not in ranks[0].whole:
            session.decompress(name, out[name], scale)
            continue
        with np.errstate(invalid="ignore", over="ignore"):
            reduced = ranks[0].whole[name].copy()
            for sent in ranks[1:]:
                reduced += sent.whole[name]
            reduced *= reduced.dtype.type(scale)
        counts = session.accept(name, reduced if session.dense_step else None)
        out[name][:] = reduced if counts else np.inf if session.marks_skipped else 0


def step(
    sessions: list[Session],
    gradients: list[Gradients],
    rng: np.random.Generator | None = None,
    scale: float = 1.0,
) -> tuple[list[Gradients], list[NonFiniteGradientError]]:
    """One step of all ranks; each goes through the layers in its own order if there is a ``rng``.

    Returns:
        Each rank's sums, times ``scale``; and the errors raised, each with the first layer of its
        rank's step, or with the last, where gradients are sent whole.
    """
    names = list(gradients[0])

    def order() -> list[str]:
        return rng.permutation(names).tolist() if rng else names

    dense_step = sessions[0].dense_step
    ranks = [send(s, g, order()) for s, g in zip(sessions, gradients, strict=True)]
    sums, errors = [], []
    for session in sessions:
        receive(session, ranks)
        work = {layer.name: layer.work_dtype for layer in session.plan.layers}
        out = {name: np.full(len(gradients[0][name]), np.nan, work[name]) for name in names}
        try:
            finish(session, ranks, order(), out, scale)
        except NonFiniteGradientError as error:
            assert dense_step or all(np.isnan(values).all() for values in out.values())
            errors.append(error)
        sums.append(out)
    assert len(errors) in (0, len(sessions))
    return sums, errors


def run(sessions: list[Session], rng: np.random.Generator, n_steps: int) -> Gradients:
    """So many steps; the sums of the last."""
    sums: list[Gradients] = [{}]
    for _ in range(n_steps):
        sums, errors = step(sessions, [draw_gradients(rng, session) for session in sessions])
        assert not errors
    return sums[0]


def k_of(session: Session) -> dict[str, int]:
    """Entries each layer sends in the next step."""
    return dict(zip((x.name for x in session.plan.sparse), session.k.tolist(), strict=True))


def copies(arrays: Gradients) -> Gradients:
    return {name: values.copy() for name, values in arrays.items()}


def same(a: Gradients, b: Gradients) -> bool:
    """Equal dictionaries of arrays, to the bit."""
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def velocities_of(session: Session) -> Gradients:
    """Copies, by name; none without momentum."""
    return copies(session.state_dict()["velocities"])


def contribution(session: Session, velocities: Gradients, name: str, gradient: np.ndarray):
    """What a gradient, not clipped, adds to the residual, by torch.optim.SGD's recurrences.

    With betas of 0, Adam's updates are signs.
    """
    config, own = session.config, widened(gradient)
    if config.adam:
        assert config.adam == (0, 0)
        return np.sign(own) * own.dtype.type(session.loss_scale)
    if not config.momentum:
        return own
    momentum = own.dtype.type(config.momentum)
    velocity = momentum * velocities[name] + own
    return momentum * velocity + own if config.nesterov else velocity


def frozen(session: Session) -> dict[str, object]:
    """All that a session remembers between steps, to the bit.

    As checksums: where two of these differ, pytest prints both, and takes its time with megabytes.
    """
    state = session.state_dict()
    arrays = {
        part: {name: zlib.crc32(values.tobytes()) for name, values in state.pop(part).items()}
        for part in ARRAYS
        if part in state
    }
    arrays |= {part: zlib.crc32(state.pop(part).tobytes()) for part in ("ratios", "thresholds")}
    return arrays | {"others": repr(state)}
