"""What the compressors of all frameworks share: the class as an instance, models, state."""

from __future__ import annotations

import functools
import gc
import numbers
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, ClassVar

from hvd_dls.adapter.binding import BaseBinding
from hvd_dls.adapter.states import STATE_VERSION, LoadedStates, models_in, take_state_of
from hvd_dls.config import DLSConfig
from hvd_dls.core.session.stats import Stats
from hvd_dls.core.session.telemetry import StepRecord
from hvd_dls.errors import DLSError, StateMismatchError
from hvd_dls.insight import Log, make_log


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
        self._loaded = LoadedStates()  # states of models to come
        self._logs: list[Any] = []  # that observe each model's steps

    @InstanceOrDefault
    def last_step(self) -> StepRecord | None:
        """What happened in the last step of the model that trained last; None before one ended."""
        sessions = [binding.session for binding in self._bindings if binding.session]
        records = [session.last_step for session in sessions if session.last_step]
        return max(records, key=lambda record: record.time, default=None)

    @InstanceOrDefault
    def stats(self, window: int = 100, model: int | None = None) -> Stats | None:
        """What compression did on this rank: in the last step, in a window, and in all steps.

        Args:
            window: number of last steps, 1 to 1000.
            model: number of the model, from 0, of those that have trained with this compressor and
                still exist, in the order in which they began; None: the one that trained last.

        Returns:
            Of this model; None before a step has ended.  ``print`` shows a table.

        Raises:
            DLSError: window is something else, or there is no such model.
        """
        bindings = self._bindings if model is None else self._living()
        sessions = [binding.session for binding in bindings if binding.session]
        trained = [session for session in sessions if session.tally.steps]
        if model is not None and model not in range(max(len(trained), 1)):
            raise DLSError(
                f"stats(model={model!r}): {len(trained)} model(s) have trained with this "
                f"compressor; accepted are None and 0 to {max(len(trained), 1) - 1}"
            )
        if not trained:
            return None
        last = max(trained, key=lambda session: session.last_step.time)
        session = last if model is None else trained[model]
        stats: Stats = session.tally.stats(session.last_step, session.skipped, window)
        return stats

    @InstanceOrDefault
    def log_to(self, target: Any, every: int = 10) -> Log:
        """Logs the first step of each model that is to come, and every few steps after it.

        A rank's own affair: no rank waits for another, and what fails is told once by the logger
        ``hvd_dls``, and ends the log, not the training.  Writing happens in a thread.

        Args:
            target: the path of a file of JSON lines, which is appended to: on rank 0 alone, or on
                every rank if ``{rank}`` is in it; or a writer of TensorBoard's, with ``add_scalar``
                (torch's, tensorboardX's), in TensorFlow one of ``tf.summary``; or a function that
                takes a line as a dictionary.  Writers and functions are called in the thread.
            every: number of steps that a line tells of: of the last one's ratios and thresholds,
                and of bytes and seconds of all together.

        Returns:
            The log, to ``close()``; it closes by itself at the interpreter's end.

        Raises:
            DLSError: target or every is something else.
        """
        log = make_log(self._as_scalars(target), every, self._logs)
        self._logs.append(log)
        return log

    def _as_scalars(self, target: Any) -> Any:
        """A framework's own kind of writer as one with ``add_scalar``; all else as it is."""
        return target

    @InstanceOrDefault
    def skipped_steps(self) -> int:
        """Steps of all models so far, in this process, that were skipped for NaN or Inf."""
        return sum(binding.session.skipped for binding in self._bindings if binding.session)

    @InstanceOrDefault
    def abandon_step(self) -> None:
        """Gives the step in progress up, of every model that is in one.

        Residuals and momentum are then as they were before it; if gradients were being written
        already, the step is brought to its end instead, as the other ranks do.  Call it on all
        ranks, after an exception in the middle of a step, if training is to go on.
        """
        for binding in self._bindings:
            binding.abandon()

    @InstanceOrDefault
    def state_dict(self) -> dict[str, Any]:
        """This rank's residuals, ratios and thresholds: every rank saves its own.

        Returns:
            Values that the framework's ways of saving handle.  Residuals are references, not
            copies, but for TensorFlow's on a device.  In the middle of a step, what was before it.

        Raises:
            DLSError: called while gradients are being written.
        """
        models = [binding.state_dict() for binding in self._living() if binding.session]
        return {"version": STATE_VERSION, "models": [*models, *self._loaded]}

    @InstanceOrDefault
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved state; before the first step or later, on every rank.

        Each model takes the state that was saved of the same layers.  If it has trained already,
        the ranks compare what they load, so that all of them go on, or none.  A step in progress is
        given up; not all ranks need be in one.

        Raises:
            StateMismatchError: it belongs to other layers, other options, another rank or another
                number of ranks, or is damaged; nothing has changed then.  Raised here if the model
                has trained already, on all ranks alike (a RanksDisagreeError where the state is
                good but another rank's is not), else in its first step.
        """
        living = [binding for binding in self._living() if binding.session]
        waiting: list[Mapping[str, Any]] = []
        chosen: list[Mapping[str, Any]] = []
        error: DLSError | None = None
        try:
            waiting = models_in(state)
            for binding in living:
                saved = take_state_of(binding.parameters_of_state, waiting)
                if saved is None:
                    raise StateMismatchError(
                        f"the saved state holds {len(chosen)} model(s), but {len(living)} have "
                        "trained with this compressor"
                    )
                binding.check_state(saved)
                chosen.append(saved)
        except DLSError as met:
            error = met
        rounds = []
        for position, binding in enumerate(living):
            mine = chosen[position] if position < len(chosen) else None
            rounds.append(binding.vote_on_state(mine, error))
        if error is not None:
            raise error
        for binding, saved, of_all in zip(living, chosen, rounds, strict=True):
            binding.load_state_dict(saved, of_all)
        self._loaded.load(waiting)  # models without a session look here

    def __reduce__(self) -> tuple[Any, ...]:
        # Spark and Ray pickle the compressor before training starts: options are all there is.
        if what := self._bound_to():
            raise DLSError(
                f"a compressor with {what} cannot be pickled or copied: make it from its options "
                "where training runs; what it has learnt travels by state_dict()"
            )
        return functools.partial(type(self), **vars(self.config)), ()

    def __repr__(self) -> str:
        defaults = vars(DLSConfig())
        options = {n: v for n, v in vars(self.config).items() if v != defaults[n]}
        told = ", ".join(f"{name}={value!r}" for name, value in options.items())
        return f"{type(self).__name__}({told})"

    def _bound_to(self) -> str:
        """What ties the compressor to this process; empty if nothing does."""
        if self._loss_scale is not None:
            return "loss_scale"
        if self._bindings:
            return "models that it has trained"
        if self._logs:
            return "a log"
        return "a loaded state" if self._loaded else ""

    @classmethod
    def _default(cls) -> Any:
        if vars(cls).get("_default_instance") is None:  # a subclass has one of its own
            cls._default_instance = cls()
        return cls._default_instance

    def _add(self, binding: BaseBinding) -> None:
        """Takes a new model on, and drops those that are gone."""
        binding.loss_scale = self._loss_scale
        binding.states = self._loaded
        binding.observers = self._logs
        self._bindings = [*(old for old in self._bindings if old.alive), binding]

    def _living(self) -> list[Any]:
        """Models that still exist; others are forgotten."""
        if len(self._bindings) > 1:
            gc.collect()  # optimizers and their hooks refer to each other
            self._bindings = [binding for binding in self._bindings if binding.alive]
        return self._bindings


def refuse_number(given: Any, accepted: str) -> None:
    """Raises DLSError if a number came first, which is meant to be the density, presumably.

    Args:
        given: a compressor's first argument.
        accepted: what it is for.
    """
    if isinstance(given, numbers.Real):
        raise DLSError(
            f"DLSCompressor({given}): its first argument takes {accepted}; for the density, write "
            f"DLSCompressor(density={given})"
        )
