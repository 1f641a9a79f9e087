"""Which parameter a gradient belongs to, and the session that compresses it.

Horovod hands a compressor a bare gradient.  At that moment it *is* the ``.grad`` of its parameter,
the same Python object, so parameters are found by identity; ids and addresses, which are used
again after a free, play no part.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import horovod.torch as hvd
import numpy as np
import torch
from torch.utils.weak import TensorWeakRef

from hvd_dls.config import DLSConfig
from hvd_dls.core.agreement import check_agreement, digest
from hvd_dls.core.layers import layer_spec
from hvd_dls.core.session import Session
from hvd_dls.errors import DLSError
from hvd_dls.torch import exchange

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_labels_given: Counter[str] = Counter()


class Dense(NamedTuple):
    """What ``decompress`` needs to know of a gradient that Horovod reduces whole."""

    dtype: torch.dtype


class InFlight(NamedTuple):
    """What ``decompress`` needs to know of a gradient that ``compress`` sent on its way."""

    binding: Binding
    name: str
    gradient: torch.Tensor
    handle: int


class Binding:
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
        self._config = config
        self._process_set = process_set
        self._layers = [
            layer_spec(name, tuple(p.shape), "torch", p.element_size()) for name, p in parameters
        ]
        self._references = {name: TensorWeakRef(p) for name, p in parameters}
        self._of_shape: dict[torch.Size, list[tuple[str, TensorWeakRef]]] = {}
        for name, parameter in parameters:
            entry = (name, self._references[name])
            self._of_shape.setdefault(parameter.shape, []).append(entry)
        # The same on every rank and in every run, so that Horovod's operations match.
        fingerprint = f"{zlib.crc32(repr(self._layers).encode()):08x}"
        _labels_given[fingerprint] += 1
        self._label = f"dls.{fingerprint}.{_labels_given[fingerprint]}"
        self.session: Session | None = None
        self._loaded: dict[str, Any] | None = None  # a state that waits for the session

    def parameters(self) -> list[torch.Tensor]:
        """The parameters that still exist."""
        found = (reference() for reference in self._references.values())
        return [parameter for parameter in found if parameter is not None]

    def name_of(self, gradient: torch.Tensor) -> str | None:
        """Name of the parameter whose ``.grad`` this tensor is, or None."""
        for name, reference in self._of_shape.get(gradient.shape, ()):
            parameter = reference()
            if parameter is not None and parameter.grad is gradient:
                return name
        return None

    def compress(self, name: str, gradient: torch.Tensor) -> tuple[torch.Tensor, InFlight | Dense]:
        """Sends a gradient's largest entries on their way, or hands it to Horovod as it is.

        Returns:
            What Horovod allreduces, and what ``decompress`` needs: the gradient for a dense layer,
            else a placeholder 1.0.  Whatever factor Horovod's reduction applies to the placeholder
            (average or sum, pre- and postscale) applies to the gradient.
        """
        session = self.session or self._start()
        if not session.is_sparse(name):
            return send_dense(gradient)
        payload = session.compress(name, _as_numpy(gradient))
        handle = exchange.start(f"{self._label}.{name}", payload, self._process_set)
        placeholder = torch.ones(1, dtype=torch.float64)
        return placeholder, InFlight(self, name, gradient, handle)

    def decompress(self, reduced_one: torch.Tensor, sent: InFlight) -> torch.Tensor:
        """All ranks' entries in the gradient's own memory, scaled as Horovod scaled the 1.0."""
        assert self.session is not None
        gathered = exchange.finish(sent.handle)
        gradient = sent.gradient
        work_dtype = torch.float64 if gradient.dtype == torch.float64 else torch.float32
        in_place = gradient.is_contiguous() and (gradient.dtype, gradient.device.type) == (
            work_dtype,
            "cpu",
        )
        total = gradient if in_place else torch.empty(gradient.shape, dtype=work_dtype)
        self.session.decompress(sent.name, gathered, total.view(-1).numpy())
        total.mul_(reduced_one.item() / self.session.world_size)
        return gradient if in_place else gradient.copy_(total)

    def _start(self) -> Session:
        """Makes the session, at the first gradient: now all ranks have come this far."""
        world_size = self._process_set.size()
        digests = exchange.gather(
            f"{self._label}.digest", digest(self._config, self._layers), self._process_set
        )
        check_agreement(digests, world_size)
        norms = None
        if self._config.prior == "weight_norm":
            norms = {
                layer.name: parameter.detach().double().norm().item()
                for layer, parameter in zip(self._layers, self.parameters(), strict=True)
            }
        session = Session(self._layers, self._config, world_size, norms)
        if self._loaded is not None:
            session.load_state_dict(self._loaded)
            self._loaded = None
        # The first ratios come from logarithms, which may round differently on other processors.
        agreed = exchange.gather(f"{self._label}.ratios", session.agreed(), self._process_set)
        session.agree(agreed[: len(agreed) // world_size])
        self.session = session
        return session

    # State --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The session's state, with tensors for arrays; a state that still waits, as it came."""
        if self.session is None:
            return self._loaded or {}
        state = self.session.state_dict()
        residuals = {name: torch.from_numpy(r) for name, r in state["residuals"].items()}
        return state | {
            "k": state["k"].tolist(),
            "thresholds": state["thresholds"].tolist(),
            "residuals": residuals,
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raises StateMismatchError if the state does not fit, as far as is known yet."""
        if self.session is not None:
            self.session.check_state(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state: now, or as soon as there is a session."""
        if self.session is not None:
            self.session.load_state_dict(state)
        else:
            self._loaded = state or None


def send_dense(gradient: torch.Tensor) -> tuple[torch.Tensor, Dense]:
    """A gradient as Horovod takes it: it refuses bfloat16 and memory that is not contiguous."""
    wide = gradient.float() if gradient.dtype == torch.bfloat16 else gradient
    return wide.contiguous(), Dense(gradient.dtype)


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


def _as_numpy(gradient: torch.Tensor) -> np.ndarray:
    """The gradient as a flat array: its own memory if it is contiguous, on the CPU and not 16-bit.

    On a GPU this waits for the gradient and copies it to the host.
    """
    flat = gradient.detach().reshape(-1).cpu()
    return (flat.float() if flat.element_size() == 2 else flat).numpy()
