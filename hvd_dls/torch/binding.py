"""Which parameter a gradient belongs to, and the session that compresses it.

Horovod hands a compressor a bare gradient.  At that moment it *is* the ``.grad`` of its parameter,
the same Python object, so parameters are found by identity; ids and addresses, which are used
again after a free, play no part.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import horovod.torch as hvd
import numpy as np
import torch
from torch.utils.weak import TensorWeakRef

from hvd_dls.adapter import BaseBinding
from hvd_dls.config import DLSConfig
from hvd_dls.core.balancing.layers import layer_spec
from hvd_dls.core.selection.backend import Array, Backend, Future
from hvd_dls.core.session.baselines import BASELINES
from hvd_dls.core.session.session import Session
from hvd_dls.errors import DLSError
from hvd_dls.torch import exchange
from hvd_dls.torch.on_device import Device, finite_future

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Dense(NamedTuple):
    """What ``decompress`` needs to know of a gradient that Horovod reduces whole."""

    dtype: torch.dtype
    binding: Binding | None = None  # of the model whose gradient it is, if that is known
    name: str = ""


class InFlight(NamedTuple):
    """What ``decompress`` needs to know of a gradient that ``compress`` sent on its way."""

    binding: Binding
    name: str
    gradient: torch.Tensor
    flat: torch.Tensor  # what the session was given: the gradient's own memory, or a copy


class Binding(BaseBinding):
    """The parameters of one model, and their compression.

    Args:
        named_parameters: (name, parameter) in model order; parameters that need no gradient are
            left out.  Only weak references to them are kept.
        config: the options.
        process_set: the ranks that exchange gradients.

    Raises:
        DLSError: ``named_parameters`` is something else, or a gradient would not be floating point.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        config: DLSConfig,
        process_set: hvd.ProcessSet,
    ) -> None:
        parameters = [(n, p) for n, p in _checked(named_parameters) if p.requires_grad]
        specs = [layer_spec(n, tuple(p.shape), "torch", p.element_size()) for n, p in parameters]
        super().__init__(specs, config)
        self._process_set = process_set
        self._on_device: dict[str, Device] = {}  # layers whose gradients do not come to the host
        self._handles: dict[int, int] = {}  # Horovod's, of the buckets on their way
        self._references = {name: TensorWeakRef(p) for name, p in parameters}
        self._of_shape: dict[torch.Size, list[tuple[str, TensorWeakRef]]] = {}
        for name, parameter in parameters:
            entry = (name, self._references[name])
            self._of_shape.setdefault(parameter.shape, []).append(entry)

    @property
    def alive(self) -> bool:
        """Whether any of the parameters still exists."""
        return bool(self.parameters())

    def parameters(self) -> list[torch.Tensor]:
        """The parameters that still exist."""
        found = (reference() for reference in self._references.values())
        return [parameter for parameter in found if parameter is not None]

    @property
    def refused(self) -> bool:
        """Whether the step in progress, or the last one, is skipped for NaN or Inf."""
        return self.session is not None and self.session.refused

    def owns_none_of(self, parameters: Iterable[torch.Tensor]) -> bool:
        """Whether none of these parameters is this model's."""
        own = {id(parameter) for parameter in self.parameters()}
        return not any(id(parameter) in own for parameter in parameters)

    def name_of(self, gradient: torch.Tensor) -> str | None:
        """Name of the parameter whose ``.grad`` this tensor is, or None."""
        entries = self._of_shape.get(gradient.shape, [])
        for position, (name, reference) in enumerate(entries):
            parameter = reference()
            if parameter is not None and parameter.grad is gradient:
                # Hooks fire in much the same order every step: the next one asked for is now first.
                entries.append(entries.pop(position))
                return name
        return None

    def compress(self, name: str, gradient: torch.Tensor) -> tuple[torch.Tensor, InFlight | Dense]:
        """Sends a gradient's largest entries on their way, or hands it to Horovod as it is.

        Returns:
            What Horovod allreduces, and what ``decompress`` needs: the gradient for a dense layer,
            else a placeholder 1.0.  Whatever factor Horovod's reduction applies to the placeholder
            (average or sum, pre- and postscale) applies to the gradient.
        """
        # At the first gradient, because by then all ranks have come this far.
        session = self.session or self._start_session(self._process_set.size(), hvd.local_size())
        self._follow_loss_scale(session)
        if session.is_sparse(name):
            flat = self._flat(name, gradient)
            session.compress(name, self._array(name, flat))
            self._send_ready(session)
            return torch.ones(1, dtype=torch.float64), InFlight(self, name, gradient, flat)
        session.note(name, session.dense_step or self._finite(session, name, gradient))
        self._send_ready(session)
        whole = gradient
        if session.corrects:
            flat = self._flat(name, gradient)
            corrected = torch.as_tensor(session.correct(name, self._array(name, flat)))
            whole = corrected.view(gradient.shape).to(gradient.device)
        return send_dense(whole)[0], Dense(gradient.dtype, self, name)

    def decompress(self, reduced_one: torch.Tensor, sent: InFlight) -> torch.Tensor:
        """All ranks' entries in the gradient's own memory, scaled as Horovod scaled the 1.0."""
        assert self.session is not None
        self._receive_all(self.session)
        scale = reduced_one.item() / self.session.world_size
        self.session.decompress(sent.name, self._array(sent.name, sent.flat), scale)
        if sent.flat.data_ptr() != sent.gradient.data_ptr():
            sent.gradient.copy_(sent.flat.view(sent.gradient.shape))
        return sent.gradient

    def decompress_dense(self, reduced: torch.Tensor, sent: Dense) -> torch.Tensor:
        """A gradient that Horovod has reduced whole; Inf everywhere, if the step is skipped."""
        assert self.session is not None
        if self.session.dense_step:
            flat = self._flat(sent.name, reduced)
            counts = self.session.accept(sent.name, self._array(sent.name, flat))
        else:
            self._receive_all(self.session)
            counts = self.session.accept(sent.name)
        gradient = reduced.to(sent.dtype)
        return gradient if counts else gradient.fill_(torch.inf)

    def wait(self) -> None:
        """Waits for what is on its way, if all is: sleeping, where Horovod's own wait would spin.

        If some layers have not come in, Horovod's wait, which first compresses gradients of unused
        parameters, must go first: other ranks may be waiting for these.
        """
        if self.session is not None and self.session.complete:
            self._receive_all(self.session)

    def _send_ready(self, session: Session) -> None:
        """Sends what is complete; what a device still works on goes in a later call."""
        for bucket in session.ready():
            self._send(session, bucket)

    def _send(self, session: Session, bucket: int) -> None:
        # A name of its own: Horovod matches operations of different ranks by name.
        name = f"{self._label}.{bucket}"
        self._handles[bucket] = exchange.start(name, session.payload(bucket), self._process_set)

    def _receive_all(self, session: Session) -> None:
        """Waits for all that is on its way: before a step changes anything, all of it is there."""
        # What a device has worked on until now; or other optimizers of this model take no step now.
        for bucket in session.unfinished():
            self._send(session, bucket)
        handles, self._handles = self._handles, {}
        for bucket, handle in handles.items():
            session.receive(bucket, exchange.finish(handle))

    def _gather(self, name: str, array: np.ndarray) -> np.ndarray:
        return exchange.finish(exchange.start(name, array, self._process_set))

    def _norms(self) -> dict[str, float]:
        return {
            layer.name: parameter.detach().double().norm().item()
            for layer, parameter in zip(self._layers, self.parameters(), strict=True)
        }

    # Layers on a device --------------------------------------------------------------------------

    def _backends(self) -> dict[str, Backend]:
        # These strategies look at whole residuals, on the host.
        if self._config.strategy not in BASELINES:
            for name, reference in self._references.items():
                parameter = reference()
                if parameter is not None and stays_on_device(parameter):
                    self._on_device[name] = Device(parameter.device)
        return dict(self._on_device)

    def _flat(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """(n,) where the passes are, and the gradient's own memory if it can be."""
        flat = gradient.detach().reshape(-1)
        return flat if name in self._on_device else flat.cpu()

    def _array(self, name: str, flat: torch.Tensor) -> Array:
        """The same memory as the session takes it."""
        return flat if name in self._on_device else _as_numpy(flat)

    def _finite(self, session: Session, name: str, gradient: torch.Tensor) -> bool | Future[bool]:
        if session.bucket_of(name) is None:
            return True  # nobody asks
        return finite_future(gradient) if name in self._on_device else _finite(gradient)

    # State ---------------------------------------------------------------------------------------

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``BaseBinding``; tensors may have been saved on any device."""
        for part in ("residuals", "velocities"):
            if part in state:
                saved = {name: torch.as_tensor(array).cpu() for name, array in state[part].items()}
                state = state | {part: saved}
        super().load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """The session's state in types that ``torch.load(weights_only=True)`` accepts."""
        state = super().state_dict()
        if self.session is None:
            return state
        return state | {
            "ratios": state["ratios"].tolist(),
            "thresholds": state["thresholds"].tolist(),
            "residuals": _as_tensors(state["residuals"]),
            "velocities": _as_tensors(state["velocities"]),
        }


def send_dense(gradient: torch.Tensor) -> tuple[torch.Tensor, Dense]:
    """A gradient as Horovod takes it: it refuses bfloat16 and memory that is not contiguous."""
    wide = gradient.float() if gradient.dtype == torch.bfloat16 else gradient
    return wide.contiguous(), Dense(gradient.dtype)


def _as_tensors(arrays: dict[str, Array]) -> dict[str, torch.Tensor]:
    return {name: torch.as_tensor(array) for name, array in arrays.items()}


def _finite(gradient: torch.Tensor) -> bool:
    """Whether a gradient is free of NaN and Inf: in one pass, if its sum does not overflow."""
    flat = gradient.detach().cpu()
    if flat.dtype == torch.bfloat16:
        total = float(flat.sum(dtype=torch.float64))
    else:  # NumPy takes a fraction of torch's time for the many small ones
        with np.errstate(all="ignore"):
            total = float(np.sum(flat.numpy(), dtype=np.float64))
    return math.isfinite(total) or bool(flat.isfinite().all())


def _checked(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
) -> list[tuple[str, torch.nn.Parameter]]:
    wanted = "named_parameters takes (name, parameter) pairs, as model.named_parameters() gives"
    try:
        pairs = [(name, parameter) for name, parameter in named_parameters]
    except (TypeError, ValueError) as error:
        raise DLSError(f"{wanted}, not {named_parameters!r}") from error
    for name, parameter in pairs:
        if not isinstance(name, str) or not isinstance(parameter, torch.Tensor):
            raise DLSError(f"{wanted}, not ({name!r}, {type(parameter).__name__})")
        if parameter.requires_grad and parameter.dtype not in _FLOATS:
            raise DLSError(
                f"parameter {name!r} has type {parameter.dtype}; accepted are "
                f"{', '.join(map(str, _FLOATS))}"
            )
    return pairs


def stays_on_device(parameter: torch.Tensor) -> bool:
    """Whether residual and passes are to be where a parameter is; on a CPU, the core's are faster.

    Of other devices than GPUs, gradients go by way of the host.
    """
    return parameter.is_cuda


def _as_numpy(flat: torch.Tensor) -> np.ndarray:
    """The same memory as an array.  NumPy has no bfloat16: that comes as its bits, uint16."""
    if flat.dtype == torch.bfloat16:
        return flat.view(torch.int16).numpy().view(np.uint16)
    return flat.numpy()
