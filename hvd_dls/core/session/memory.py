"""What a rank remembers of a model between steps: all that is saved and restored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from hvd_dls.config import DLSConfig
from hvd_dls.core.balancing.controller import Controller
from hvd_dls.core.balancing.plan import Plan, initial_k
from hvd_dls.core.selection.backend import HOST, Array, Backend
from hvd_dls.core.selection.correction import Correction
from hvd_dls.core.session.baselines import BASELINES, BaselineStrategy
from hvd_dls.core.session.state import STATE_VERSION, check_state
from hvd_dls.errors import DLSError


class Memory:
    """Residuals, velocities, thresholds and ratios of one model.

    Args:
        plan: the layers and their budget.
        config: the options.
        world_size: number of ranks, P.
        rows: of the sparse layers of each bucket.
        norms: Frobenius norm of each layer's weights, for prior="weight_norm".
        backends: where arrays of layers are that are not on the host, by name.

    Attributes:
        controller: what all ranks agree on.
        baseline: what this rank chooses itself, by strategies that do; or None.
        correction: clipping and momentum.
        residuals: (n,) of each compressed layer, by name.
        thresholds: of the last step, by name; 0 before.
        loss_scale: what residuals and velocities are multiplied by.
        backends: of all layers, by name.
    """

    def __init__(
        self,
        plan: Plan,
        config: DLSConfig,
        world_size: int,
        rows: Sequence[np.ndarray],
        norms: Mapping[str, float] | None,
        backends: Mapping[str, Backend] | None,
    ) -> None:
        self._plan, self._config, self._world_size = plan, config, world_size
        self.backends = dict.fromkeys((x.name for x in plan.layers), HOST) | dict(backends or {})
        self.controller = Controller(plan, config, initial_k(plan, config, norms), rows)
        self.baseline = BaselineStrategy(plan, config) if config.strategy in BASELINES else None
        self.correction = Correction(plan.layers, config, self.backends)
        self.residuals: dict[str, Array] = {
            x.name: self.backends[x.name].zeros(x.size, x.work_dtype) for x in plan.sparse
        }
        self.thresholds = dict.fromkeys(self.residuals, 0.0)
        self.loss_scale = 1.0

    def scale_to(self, loss_scale: float) -> None:
        """Has residuals and velocities follow the loss scale: exactly, by powers of two.

        Raises:
            DLSError: it is not a finite number > 0.
        """
        if not (math.isfinite(loss_scale) and loss_scale > 0):
            raise DLSError(f"loss_scale={loss_scale!r}: accepted is a finite number > 0")
        factor = loss_scale / self.loss_scale
        for arrays in (self.residuals, self.correction.velocities):
            for name, array in arrays.items():
                self.backends[name].scale(array, factor)
        self.thresholds = {name: factor * value for name, value in self.thresholds.items()}
        self.loss_scale = loss_scale

    def agree(self, agreed: np.ndarray) -> None:
        """Takes over another rank's ``controller.state()``."""
        self.controller.restore(agreed)
        if self.baseline is not None:
            self.baseline.start_step(self.controller.density)

    def state(self) -> dict[str, Any]:
        """Plain values and arrays; the large ones are not copied."""
        config = asdict(self._config)
        return {
            "version": STATE_VERSION,
            "config": config | {"layer_density": [list(x) for x in self._config.layer_density]},
            "world_size": self._world_size,
            "layers": [
                [layer.name, [*layer.shape, layer.work_dtype.name]] for layer in self._plan.sparse
            ],
            "step": self.controller.step,
            "loss_scale": self.loss_scale,
            "ratios": self.controller.state(),
            "thresholds": np.array(list(self.thresholds.values())),
            "norms": [] if self.baseline is None else list(self.baseline.norms.values()),
            "residuals": dict(self.residuals),
            "velocities": dict(self.correction.velocities),
        }

    def check(self, state: Mapping[str, Any]) -> None:
        """Whether a saved state fits.

        Raises:
            StateMismatchError: it belongs to other layers, another configuration or another
                number of ranks; the message names the first difference.
        """
        check_state(state, self.state(), ratios=2 + 2 * len(self.residuals))

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved state that fits, copying it."""
        self.controller.restore(np.asarray(state["ratios"], np.int64))
        self.thresholds = dict(zip(self.residuals, map(float, state["thresholds"]), strict=True))
        if self.baseline is not None:
            self.baseline.restore(state["norms"], self.controller.density)
        self.loss_scale = float(state["loss_scale"])
        velocities = self.correction.velocities
        for part, own in (("residuals", self.residuals), ("velocities", velocities)):
            for name, array in own.items():
                self.backends[name].load(array, state[part][name])
