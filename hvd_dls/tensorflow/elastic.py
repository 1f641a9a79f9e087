"""``horovod.tensorflow.elastic`` for trainings with a DLSCompressor: the same names.

    from hvd_dls.tensorflow import elastic

    state = elastic.TensorFlowKerasState(model, optimizer, batch=0)


    @elastic.run
    def train(state): ...

Weights, ratios and the step follow rank 0.  Residuals and velocities are each rank's own: they are
saved and restored with the weights, survivors keep them, and those who join start at zero.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import tensorflow as tf
from horovod.common.elastic import ObjectState, run_fn
from horovod.tensorflow import broadcast_object, init, rank, shutdown

from hvd_dls.adapter.elastic import Commit
from hvd_dls.errors import DLSError
from hvd_dls.tensorflow.broadcasting import broadcast_variables
from hvd_dls.tensorflow.compressor import DLSCompressor
from hvd_dls.tensorflow.handles import handle_of
from hvd_dls.tensorflow.lost_ranks import lost_ranks_told, refuse_horovods_run

__all__ = ["TensorFlowKerasState", "TensorFlowState", "run"]


def run(func: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a function until it returns, on ranks that come and go: see ``hvd.elastic.run``.

    Horovod's own goes on after errors of operations that it knows by their names.  Any other
    ``tf.errors.UnknownError`` it takes for the end of training, and returns without a word: one of
    the compressor's among them.  Here all errors of lost ranks are known, and all others raised.

    Args:
        func: takes a state first.
    """

    @functools.wraps(func)
    def train(state: Any, *args: Any, **kwargs: Any) -> Any:
        with lost_ranks_told():
            return func(state, *args, **kwargs)

    runs_again = run_fn(train, _restart)

    @functools.wraps(func)
    def wrapper(state: Any, *args: Any, **kwargs: Any) -> Any:
        # In a frame of this module: by that ``refuse_horovods_run`` knows it.
        return runs_again(state, *args, **kwargs)

    return wrapper


def _restart() -> None:
    shutdown()
    init()


class CompressedState(ObjectState):
    """Variables, compressors and plain values that are saved, restored and synchronised together.

    Args:
        compression: the compressor, or several; None for all of this process.  What is no
            DLSCompressor is only kept as an attribute.
        **kwargs: see ``horovod.common.elastic.ObjectState``; a compressor among them counts as one
            that was given.
    """

    def __init__(self, compression: Any = None, **kwargs: Any) -> None:
        several = compression if isinstance(compression, list | tuple) else [compression]
        given = [*several, *kwargs.values()]
        self._given = [made for made in map(_compressor_in, given) if made is not None]
        self.compression = compression
        for name in [name for name, value in kwargs.items() if _compressor_in(value) is not None]:
            setattr(self, name, kwargs.pop(name))
        self._values: list[np.ndarray] = []
        self._commits: list[tuple[DLSCompressor, Commit]] = []
        self._save_here()
        super().__init__(bcast_object=broadcast_object, get_rank=rank, **kwargs)

    @abstractmethod
    def _tracked(self) -> list[Any]:
        """The variables, in the same order on every rank."""

    def save(self) -> None:
        """Copies variables, residuals, velocities and ratios to the host's memory.

        Raises:
            DLSError: in the middle of a step.
        """
        self._save_here()
        super().save()

    def restore(self) -> None:
        """Goes back to what was saved last; asks no other rank."""
        for variable, value in zip(self._tracked(), self._values, strict=True):
            variable.assign(value)
        committed = [compressor for compressor, _ in self._commits]
        for compressor in self._compressors():
            if not any(compressor is other for other in committed):  # it is new
                for binding in compressor._bindings:
                    binding.go_back(None)
        for _, commit in self._commits:
            commit.restore()
        super().restore()

    def sync(self) -> None:
        """Gives all ranks rank 0's variables and values.

        Nothing of a compressor travels here: ranks agree on ratios and step with the next gradient.

        Raises:
            DLSError: see ``refuse_horovods_run``.
            HorovodInternalError: a rank is lost meanwhile.
        """
        refuse_horovods_run()
        with lost_ranks_told():
            broadcast_variables(self._tracked(), root_rank=0)
            super().sync()
            # In one broadcast: not all ranks need have as many compressors by now.
            of_first = self._bcast_object([commit.told for _, commit in self._commits])
            for (_, commit), told in zip(self._commits, of_first, strict=False):
                commit.compare(*told)
        self._save_here()

    def _save_here(self) -> None:
        commits = [(compressor, Commit(compressor)) for compressor in self._compressors()]
        self._values = [tf.convert_to_tensor(v).numpy().copy() for v in self._tracked()]
        self._commits = commits

    def _compressors(self) -> list[DLSCompressor]:
        return self._given or DLSCompressor.living()


class TensorFlowState(CompressedState):
    """The state of a list of variables: see ``hvd.elastic.TensorFlowState``.

    Unlike Horovod's it is made without a broadcast, for which the other ranks would have to be
    making theirs; variables are broadcast in ``sync``.

    Args:
        variables: tf.Variable or Keras's, in the same order on every rank: the model's and the
            optimizer's.
        session: of TensorFlow 1; must be None.
        compression: the compressor, or several; None for all of this process.
        **kwargs: plain values that all ranks share, which become attributes.

    Raises:
        DLSError: no variables, or a session.
    """

    def __init__(
        self,
        variables: Iterable[Any] | None = None,
        session: Any = None,
        compression: Any = None,
        **kwargs: Any,
    ) -> None:
        if session is not None:
            raise DLSError(f"session={session!r}: TensorFlow 2 has none; leave it out")
        self.variables = list(variables or ())
        if not self.variables or any(handle_of(v) is None for v in self.variables):
            raise DLSError(
                "TensorFlowState: variables takes a list of tf.Variable or Keras's, as "
                "model.weights + optimizer.variables; TensorFlow 2 has no global ones"
            )
        super().__init__(compression, **kwargs)

    def _tracked(self) -> list[Any]:
        return self.variables


class TensorFlowKerasState(CompressedState):
    """The state of a Keras model and its optimizer: see ``hvd.elastic.TensorFlowKerasState``.

    Of Keras 3 and of tf_keras.  The optimizer's variables are made now, if they are not there, so
    that all ranks have the same.  Random seeds and metrics stay each rank's own.

    Args:
        model: built.
        optimizer: None for the one that the model was compiled with.
        backend: taken for Horovod's sake; makes no difference.
        compression: the compressor, or several; None for all of this process.
        **kwargs: plain values that all ranks share, which become attributes (batch=0, epoch=0).

    Raises:
        ValueError: the model is not built.
        DLSError: there is no optimizer.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any = None,
        backend: Any = None,
        compression: Any = None,
        **kwargs: Any,
    ) -> None:
        if not model.built:
            raise ValueError("Model must be built first. Run `model.build(input_shape)`.")
        self.model, self.backend = model, backend
        self.optimizer = getattr(model, "optimizer", None) if optimizer is None else optimizer
        if self.optimizer is None:
            raise DLSError("the model has no optimizer: compile it first, or pass optimizer=")
        _build(self.optimizer, model.trainable_variables)
        super().__init__(compression, **kwargs)

    def _tracked(self) -> list[Any]:
        return [*self.model.weights, *_variables_of(self.optimizer)]


def _variables_of(optimizer: Any) -> list[Any]:
    variables = optimizer.variables  # a method, before Keras 2.12 and in its "legacy" optimizers
    return list(variables() if callable(variables) else variables)


def _build(optimizer: Any, variables: list[Any]) -> None:
    if hasattr(optimizer, "_create_all_weights"):  # "legacy"
        optimizer._create_all_weights(variables)
    elif not getattr(optimizer, "built", getattr(optimizer, "_built", False)):
        with tf.init_scope():
            optimizer.build(variables)


def _compressor_in(value: Any) -> DLSCompressor | None:
    """The compressor that a value is, or is the class of."""
    if isinstance(value, type) and issubclass(value, DLSCompressor):
        made: DLSCompressor = value._default()
        return made
    return value if isinstance(value, DLSCompressor) else None
