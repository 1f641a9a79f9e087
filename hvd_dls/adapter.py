"""What the compressors of all frameworks share: the class as an instance, models, state."""

from __future__ import annotations

import functools
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any, ClassVar

import numpy as np

from hvd_dls.config import DLSConfig
from hvd_dls.core.balancing.layers import LayerSpec
from hvd_dls.core.selection import threads
from hvd_dls.core.selection.backend import Backend
from hvd_dls.core.session.session import Session
from hvd_dls.core.session.telemetry import StepRecord
from hvd_dls.core.wire.agreement import check_agreement, digest
from hvd_dls.errors import DLSError, StateMismatchError

STATE_VERSION = 1
_labels_given: Counter[str] = Counter()


class InstanceOrDefault:
    """A method that, called on the class, acts on the class's default instance.

    Horovod's own compressors are classes with static methods, so users pass classes; and people
    write ``DLSCompressor.state_dict()`` if it was the class they passed.
    """

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method
        self.__doc__ = method.__doc__

    def __get__(self, instance: BaseCompressor | None, owner: type[BaseCompressor]) -> MethodType:
        return MethodType(self._method, owner._default() if instance is None else instance)


class BaseBinding(ABC):
    """One model's layers and the session that compresses them.

    Args:
        layers: in model order, with distinct names.
        config: the options.
    """

    def __init__(self, layers: Sequence[LayerSpec], config: DLSConfig) -> None:
        self.session: Session | None = None
        self.loss_scale: Callable[[], float] | None = None
        self._layers = list(layers)
        self._config = config
        self._loaded: dict[str, Any] | None = None  # a state that waits for the session
        # The same on every rank and in every run, so that Horovod's operations match.
        fingerprint = f"{zlib.crc32(repr(self._layers).encode()):08x}"
        _labels_given[fingerprint] += 1
        self._label = f"dls.{fingerprint}.{_labels_given[fingerprint]}"

    @property
    @abstractmethod
    def alive(self) -> bool:
        """Whether the model still exists."""

    @abstractmethod
    def _gather(self, name: str, array: np.ndarray) -> np.ndarray:
        """All ranks' arrays of one length, one after the other in rank order."""

    @abstractmethod
    def _norms(self) -> dict[str, float]:
        """Frobenius norm of each layer's weights, by name."""

    def _backends(self) -> Mapping[str, Backend]:
        """Where arrays of layers are that are not on the host, by name."""
        return {}

    def _start_session(self, world_size: int, local_size: int) -> Session:
        """Makes the session, together with all other ranks.

        Args:
            world_size: number of ranks, P.
            local_size: number of ranks on this host, which share its cores.

        Raises:
            DLSError: the ranks have different options or parameters, or the density is too low
                for the model; on every rank alike.
            StateMismatchError: a state that was loaded before does not fit.
        """
        digests = self._gather(f"{self._label}.digest", digest(self._config, self._layers))
        check_agreement(digests, world_size)
        threads.use(self._config.threads or threads.to_spare(local_size))
        norms = self._norms() if self._config.prior == "weight_norm" else None
        session = Session(self._layers, self._config, world_size, norms, self._backends())
        if self._loaded is not None:
            session.load_state_dict(self._loaded)
            self._loaded = None
        # The first ratios come from logarithms, which may round differently on other processors.
        agreed = self._gather(f"{self._label}.ratios", session.agreed())
        session.agree(agreed[: len(agreed) // world_size])
        self.session = session
        return session

    def _follow_loss_scale(self, session: Session) -> None:
        """To be called before a step's first gradient comes in."""
        if self.loss_scale is not None and not session.in_step:
            session.scale_to(float(self.loss_scale()))

    def state_dict(self) -> dict[str, Any]:
        """The session's state; a state that still waits, as it came."""
        return (self._loaded or {}) if self.session is None else self.session.state_dict()

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


class BaseCompressor:
    """Options, models and their state; the frameworks add ``compress`` and ``decompress``.

    Args:
        loss_scale: tells what the loss is multiplied by at the moment, if it is
            (``torch.amp.GradScaler().get_scale``): asked once a step, so that residuals stay in
            proportion to gradients.  With it, nonfinite="skip" is the default.
        **options: see ``DLSConfig``.

    Raises:
        DLSError: an option that does not exist or a value that is not accepted.
    """

    _default_instance: ClassVar[BaseCompressor | None] = None

    def __init__(self, *, loss_scale: Callable[[], float] | None = None, **options: Any) -> None:
        if loss_scale is not None:
            if not callable(loss_scale):
                raise DLSError(
                    f"loss_scale={loss_scale!r}: accepted is a function without arguments, as "
                    "scaler.get_scale"
                )
            options.setdefault("nonfinite", "skip")
        self.config = DLSConfig.from_options(**options)
        self._loss_scale = loss_scale
        self._bindings: list[Any] = []
        self._loaded: list[dict[str, Any]] = []

    @InstanceOrDefault
    def last_step(self) -> StepRecord | None:
        """What happened in the last step of the model that trained last; None before one ended."""
        sessions = [binding.session for binding in self._bindings if binding.session]
        records = [session.last_step for session in sessions if session.last_step]
        return max(records, key=lambda record: record.time, default=None)

    @InstanceOrDefault
    def skipped_steps(self) -> int:
        """Steps of all models so far, in this process, that were skipped for NaN or Inf."""
        return sum(binding.session.skipped for binding in self._bindings if binding.session)

    @InstanceOrDefault
    def state_dict(self) -> dict[str, Any]:
        """This rank's residuals, ratios and thresholds: every rank saves its own.

        Returns:
            Values that the framework's ways of saving handle.  Residuals are references, not
            copies, but for TensorFlow's on a device.

        Raises:
            DLSError: called in the middle of a step.
        """
        return {"version": STATE_VERSION, "models": [b.state_dict() for b in self._bindings]}

    @InstanceOrDefault
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state; before the first step or later, on every rank.

        Raises:
            StateMismatchError: it belongs to other layers, other options or another number of
                ranks.  Raised here if the model has trained already, else in its first step.
        """
        if state.get("version") != STATE_VERSION:
            raise StateMismatchError(
                f"saved state has version {state.get('version')}, expected {STATE_VERSION}"
            )
        models = list(state["models"])
        for binding, saved in zip(self._bindings, models, strict=False):
            binding.check_state(saved)
        for binding, saved in zip(self._bindings, models, strict=False):
            binding.load_state_dict(saved)
        self._loaded = models[len(self._bindings) :]

    def __reduce__(self) -> tuple[Any, ...]:
        # Spark and Ray pickle the compressor before training starts: only options travel.
        if self._loss_scale is not None:
            raise DLSError(
                "a compressor with loss_scale cannot be pickled: make it where training runs, "
                "beside what scales the loss"
            )
        return functools.partial(type(self), **vars(self.config)), ()

    @classmethod
    def _default(cls) -> Any:
        if vars(cls).get("_default_instance") is None:  # a subclass has one of its own
            cls._default_instance = cls()
        return cls._default_instance

    def _add(self, binding: BaseBinding) -> None:
        """Takes a new model on, with its part of a loaded state, and drops those that are gone."""
        binding.loss_scale = self._loss_scale
        if self._loaded:
            binding.load_state_dict(self._loaded.pop(0))
        self._bindings = [*(old for old in self._bindings if old.alive), binding]
