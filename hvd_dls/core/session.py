"""One model's compression on one rank: a gradient in, a payload out; all payloads in, a sum out.

``Controller`` holds what all ranks agree on; a session holds what is this rank's own: residuals,
thresholds, and what is on its way.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from hvd_dls.config import DLSConfig
from hvd_dls.core.controller import Controller
from hvd_dls.core.layers import LayerSpec
from hvd_dls.core.plan import initial_k, make_plan
from hvd_dls.core.select import Selection, accumulate_and_select, all_finite
from hvd_dls.core.sketch import Sketch, sketch
from hvd_dls.core.telemetry import StepRecord, measure_quality
from hvd_dls.core.wire import pack, payload_bytes, unpack
from hvd_dls.errors import DLSError, NonFiniteGradientError, StateMismatchError

STATE_VERSION = 1
FREE_OPTIONS = ("measure_every",)  # may differ between saving and loading


class Session:
    """Compresses the gradients of one model.

    In a step each sparse layer goes through ``compress`` and then through ``decompress``; when all
    have, the step ends and the ratios move.  A step that not all layers take part in ends when
    nothing is on its way any more, unless ``step_layers`` says who takes part: a graph may finish
    one layer before it starts another.

    Args:
        layers: all parameters, in model order.
        config: the options.
        world_size: number of ranks, P.
        norms: Frobenius norm of each layer's weights, for prior="weight_norm".

    Raises:
        DLSError: see ``make_plan``.
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        config: DLSConfig,
        world_size: int,
        norms: Mapping[str, float] | None = None,
    ) -> None:
        self.config = config
        self.world_size = world_size
        self.plan = make_plan(layers, config, world_size)
        k = initial_k(self.plan, config, norms)
        self._controller = Controller(self.plan, config, k)
        self._layers = {layer.name: layer for layer in self.plan.sparse}
        self.residuals = {n: np.zeros(x.size, x.work_dtype) for n, x in self._layers.items()}
        self._thresholds = dict.fromkeys(self._layers, 0.0)
        self._in_flight: dict[str, Selection | None] = {}
        self._sent: dict[str, Selection | None] = {}
        self._sketches: dict[str, list[Sketch]] = {}
        self._not_finite: list[tuple[str, int]] = []
        self.step_layers: frozenset[str] | None = None
        self.last_step: StepRecord | None = None

    # The way of a gradient ----------------------------------------------------------------------

    def is_sparse(self, name: str) -> bool:
        """Whether the plan compresses this layer."""
        return name in self._layers

    def compress(self, name: str, gradient: np.ndarray) -> np.ndarray:
        """Adds a gradient to the layer's residual and takes out what is sent in this step.

        Args:
            name: of a sparse layer.
            gradient: (n,) of a type that adds to the layer's work dtype without loss.

        Returns:
            The payload, uint8, to be gathered from all ranks.

        Raises:
            DLSError: the layer is on its way already, or the gradient has another size.
        """
        layer, k = self._layers[name], self._controller.k_of(name)
        if name in self._in_flight or name in self._sent:
            raise DLSError(f"layer {name!r}: compressed twice before it was decompressed")
        if gradient.shape != (layer.size,):
            raise DLSError(
                f"layer {name!r}: gradient of shape {gradient.shape}, expected ({layer.size},)"
            )
        selection = self._select(name, gradient, k)
        self._in_flight[name] = selection
        if selection is None:
            return pack(layer, k, None, None)
        histogram = sketch(selection.values, self.residuals[name], selection.threshold)
        return pack(layer, k, selection, histogram)

    def _select(self, name: str, gradient: np.ndarray, k: int) -> Selection | None:
        if not all_finite(gradient):
            return None
        residual = self.residuals[name]
        with np.errstate(over="ignore"):  # looked for below
            selection = accumulate_and_select(residual, gradient, k, self._thresholds[name])
        if not np.isfinite(selection.values).all():  # the sum overflowed: keep what is finite of it
            residual[selection.indices] = selection.values
            residual[~np.isfinite(residual)] = 0
            return None
        self._thresholds[name] = selection.threshold
        return selection

    def decompress(self, name: str, gathered: np.ndarray, out: np.ndarray) -> None:
        """Adds up what all ranks sent of a layer; with the last layer, ends the step.

        Args:
            name: of a layer that went through ``compress``.
            gathered: (world_size * payload length,) uint8, payloads in rank order.
            out: (n,) of the layer's work dtype; overwritten with the sum over ranks, added rank by
                rank and so the same bits on every rank.

        Raises:
            PayloadError: the payloads are not this layer's.
            NonFiniteGradientError: at the end of a step in which some rank's gradient held NaN
                or Inf; on every rank alike.  What was sent is back in the residuals.
        """
        if name not in self._in_flight:
            raise DLSError(f"layer {name!r}: decompressed, but not on its way")
        layer, k = self._layers[name], self._controller.k_of(name)
        payloads = unpack(layer, k, gathered, self.world_size)
        out[:] = 0
        for rank, payload in enumerate(payloads):
            if payload.not_finite:
                self._not_finite.append((name, rank))
            else:
                out[payload.indices] += payload.values  # indices are unique within a rank
        # Copies: the gathered buffer belongs to the caller.
        self._sketches[name] = [Sketch(p.sketch.base, p.sketch.counts.copy()) for p in payloads]
        self._sent[name] = self._in_flight.pop(name)
        if self.step_layers is None:
            complete = not self._in_flight
        else:
            complete = self._sent.keys() >= self.step_layers
        if complete:
            self._end_step()

    def _end_step(self) -> None:
        sent, sketches, not_finite = self._sent, self._sketches, self._not_finite
        self._sent, self._sketches, self._not_finite = {}, {}, []
        if not_finite:
            for name, selection in sent.items():
                if selection is not None:
                    self.residuals[name][selection.indices] += selection.values
            raise NonFiniteGradientError(not_finite)
        k = self._controller.k.copy()
        self._controller.advance(sketches)
        self.last_step = self._record(k, {n: s for n, s in sent.items() if s is not None})

    def _record(self, k: np.ndarray, sent: Mapping[str, Selection]) -> StepRecord:
        every = self.config.measure_every
        quality = None
        if every and self._controller.step % every == 0:
            values = [selection.values for selection in sent.values()]
            quality = measure_quality(values, [self.residuals[name] for name in sent])
        lengths = (
            payload_bytes(layer, n)
            for layer, n in zip(self.plan.sparse, k.tolist(), strict=True)
            if layer.name in sent
        )
        return StepRecord(
            step=self._controller.step,
            time=time.time(),
            names=tuple(self._layers),
            sizes=self.plan.sizes,
            k=k,
            thresholds=np.array(list(self._thresholds.values())),
            sparse_bytes=sum(lengths),
            dense_bytes=self.plan.dense_bytes,
            quality=quality,
        )

    # Agreement at the start ---------------------------------------------------------------------

    def agreed(self) -> np.ndarray:
        """(1 + L,) int64: step and k of each sparse layer, which rank 0 hands to the others."""
        return np.concatenate([[self._controller.step], self._controller.k])

    def agree(self, agreed: np.ndarray) -> None:
        """Takes over rank 0's ``agreed()``."""
        self._controller.step = int(agreed[0])
        self._controller.k = np.array(agreed[1:], dtype=np.int64)

    # State --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """This rank's training state: plain values and arrays (residuals are not copied)."""
        if self._in_flight or self._sent:
            raise DLSError("state_dict() in the middle of a step: call it after optimizer.step()")
        return {
            "version": STATE_VERSION,
            "config": asdict(self.config),
            "world_size": self.world_size,
            "layers": [
                [layer.name, [*layer.shape, layer.work_dtype.name]] for layer in self.plan.sparse
            ],
            "step": self._controller.step,
            "k": self._controller.k.copy(),
            "thresholds": np.array(list(self._thresholds.values())),
            "residuals": dict(self.residuals),
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Whether a saved state fits.

        Raises:
            StateMismatchError: it belongs to other layers, another configuration or another
                number of ranks; the message names the first difference.
        """
        own = self.state_dict()
        if state.get("version") != STATE_VERSION:
            raise StateMismatchError(
                f"saved state has version {state.get('version')}, expected {STATE_VERSION}"
            )
        if missing := own.keys() - state.keys():
            raise StateMismatchError(f"the saved state lacks {', '.join(sorted(missing))}")
        for option, value in own["config"].items():
            saved = state["config"].get(option)
            if saved != value and option not in FREE_OPTIONS:
                raise StateMismatchError(f"saved with {option}={saved!r}, but it is {value!r} now")
        if state["world_size"] != self.world_size:
            raise StateMismatchError(
                f"saved by one of {state['world_size']} ranks, but there are {self.world_size} now"
            )
        self._check_layers(dict(state["layers"]), dict(own["layers"]))
        for part in ("k", "thresholds", "residuals"):
            if len(state[part]) != len(own[part]):
                raise StateMismatchError(
                    f"the saved state has {len(state[part])} {part}, expected {len(own[part])}"
                )
        for name, residual in self.residuals.items():
            saved_shape = np.shape(state["residuals"].get(name, ()))
            if saved_shape != residual.shape:
                raise StateMismatchError(
                    f"layer {name!r}: saved residual of shape {saved_shape}, expected "
                    f"{residual.shape}"
                )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved state, copying it.

        Raises:
            StateMismatchError: see ``check_state``; nothing has changed then.
        """
        self.check_state(state)
        self._controller.step = int(state["step"])
        self._controller.k = np.array(state["k"], dtype=np.int64)
        self._thresholds = dict(zip(self._layers, map(float, state["thresholds"]), strict=True))
        for name, residual in self.residuals.items():
            residual[:] = np.asarray(state["residuals"][name])

    @staticmethod
    def _check_layers(saved: Mapping[str, list[Any]], own: Mapping[str, list[Any]]) -> None:
        for name in saved:
            if name not in own:
                raise StateMismatchError(f"saved with a compressed layer {name!r}, not there now")
        for name, shape in own.items():
            if name not in saved:
                raise StateMismatchError(f"compressed layer {name!r} is not in the saved state")
            if list(saved[name]) != shape:
                raise StateMismatchError(
                    f"layer {name!r} was saved as {list(saved[name])}, it is {shape} now"
                )
        if list(saved) != list(own):
            raise StateMismatchError("the saved layers stand in another order")
