"""The compressor for ``horovod.tensorflow``: ``compression=DLSCompressor``."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import horovod.tensorflow as hvd
import tensorflow as tf

from hvd_dls.adapter import BaseCompressor, InstanceOrDefault, is_elastic, refuse_number
from hvd_dls.errors import DLSError
from hvd_dls.tensorflow import single_process, zeroing
from hvd_dls.tensorflow.binding import Binding
from hvd_dls.tensorflow.exchange import Exchange
from hvd_dls.tensorflow.handles import handle_of
from hvd_dls.tensorflow.horovod_frames import (
    AllreduceCall,
    current_call,
    direct_op,
    wrapping_keras3_optimizer,
)
from hvd_dls.tensorflow.reduction import Context, compress_gradient, send_uncompressed
from hvd_dls.tensorflow.refusals import refuse_slices, refuse_twice
from hvd_dls.tensorflow.summaries import SummaryScalars

_log = logging.getLogger("hvd_dls")
_SLICES = (
    "join(...): gradients that are IndexedSlices (of embeddings) do not come to the compressor, so "
    "those of ranks without data would not become zeros. Accepted are tensors: pass "
    "sparse_as_dense=True to hvd.DistributedGradientTape, or use hvd_dls.keras"
)
_ANOTHER = (
    "another DLSCompressor has compressed gradients of these variables; what it kept of them is "
    "not in this one. If compression=DLSCompressor(...) stands in a training step, each step (or "
    "trace) begins without it: make the compressor once, before the loop (said once)"
)
_do_not_convert = tf.autograph.experimental.do_not_convert


class _RefusesKeras3(type):
    """Makes the class itself refuse what ``DLSCompressor.__hash__`` refuses."""

    def __hash__(cls) -> int:
        _refuse_keras3()
        return super().__hash__()


class DLSCompressor(BaseCompressor, metaclass=_RefusesKeras3):
    """Dynamic layer-wise sparsification for ``horovod.tensorflow``.

    Sends each step the largest entries of each layer's accumulated gradient and keeps the rest for
    later (error feedback).  How many a layer sends moves, step after step, until all layers share
    one threshold; no function is traced anew for that.

    Pass the class itself, or an instance with options.  Variables are those that Horovod's call
    names: each set of variables is a model with residuals of its own.

    Args:
        variables: the model's, in order (``model.trainable_variables``), if some of them get no
            gradient in the first step or if the compressor should take no others; None to take
            them from Horovod's calls.
        loss_scale: for gradients of a scaled loss, a function that tells the scale
            (``lambda: float(optimizer.dynamic_scale)``); see ``BaseCompressor``.
        **options: see ``DLSConfig``.

    Raises:
        DLSError: an option that does not exist or a value that is not accepted.

    Examples:
        >>> compression = DLSCompressor(density=0.001)  # once, not in each step
        >>> tape = hvd.DistributedGradientTape(tape, compression=compression)
    """

    _bindings: list[Binding]
    _made: ClassVar[list[weakref.ref[DLSCompressor]]] = []
    _warned_of_another: ClassVar[bool] = False

    def __init__(
        self,
        variables: Iterable[Any] | None = None,
        *,
        loss_scale: Callable[[], float] | None = None,
        **options: Any,
    ) -> None:
        refuse_number(variables, "variables, as model.trainable_variables")
        super().__init__(loss_scale=loss_scale, **options)
        self._given = None if variables is None else Binding(variables, self.config)
        self._call: AllreduceCall | None = None  # Horovod's call that is being traced
        self._exchange: Exchange | None = None  # of that call
        self._warned_of_unknown = False
        self.is_trial = False  # of advise: nobody misses what it keeps
        if self._given is not None:
            self._add(self._given)
        self._made[:] = [made for made in self._made if made() is not None]
        self._made.append(weakref.ref(self))

    @classmethod
    def living(cls) -> list[DLSCompressor]:
        """All compressors of this process, in the order in which they were made."""
        return [compressor for made in cls._made if (compressor := made()) is not None]

    # What Horovod calls -------------------------------------------------------------------------

    @InstanceOrDefault
    @_do_not_convert
    def compress(self, tensor: tf.Tensor) -> tuple[tf.Tensor, Context]:
        """Called by Horovod with a gradient; returns what it allreduces, and a context.

        Called while a function is traced: what runs in each step are the operations it adds.

        Raises:
            DLSError: the ranks have different options or variables, the density is too low for
                the model, or the operation is hvd.Adasum; on every rank alike.
        """
        call = current_call(self._call)
        if hvd.Adasum == (call.op if call else direct_op()):
            raise DLSError(
                "op=hvd.Adasum: accepted are hvd.Average and hvd.Sum (Adasum combines whole "
                "updates, which cannot be sent in part)"
            )
        variable = call and call.take_variable(tensor)
        if call is None or variable is None:
            self._warn_of_unknown(tensor)
            return send_uncompressed(zeroing.zero(tensor))
        if call is not self._call:
            self._call, self._exchange = call, self._prepare(call)
        exchange = self._exchange
        if call.finished:  # or a reference to it would keep its graph alive
            self._call = self._exchange = None
        if exchange is None:
            return send_uncompressed(tensor)
        if exchange.branches is not None:
            exchange.branches.run_at_once()
        name = exchange.binding.name_of(variable)
        if name is None:
            self._warn_of_unknown(tensor)
        return compress_gradient(tensor, name, exchange)

    @InstanceOrDefault
    @_do_not_convert
    def decompress(self, tensor: tf.Tensor, ctx: Context) -> tf.Tensor:
        """Called by Horovod with what came back and the context; returns the reduced gradient.

        When it runs, the last gradient of a step raises NonFiniteGradientError if some rank's held
        NaN or Inf; on every rank alike.  TensorFlow hands the error on as one of ``tf.errors``,
        with our message in it.
        """
        return ctx.decompress(tensor)

    def __hash__(self) -> int:  # Horovod keeps one function for each compressor
        _refuse_keras3()
        return super().__hash__()

    def _as_scalars(self, target: Any) -> Any:
        return SummaryScalars(target) if isinstance(target, tf.summary.SummaryWriter) else target

    # Finding the variables ----------------------------------------------------------------------

    def _prepare(self, call: AllreduceCall) -> Exchange | None:
        """Adds a call's exchange to its graph.

        Returns:
            None if there is nothing to exchange: the call is of no variables, this rank has no part
            in it, or is alone.
        """
        if not call.process_set.included():  # Horovod traces its operations all the same
            return None
        variables = [v for v in call.dense_variables if handle_of(v) is not None]
        if not variables:  # a tape may be asked for the gradients of plain tensors
            return None
        if call.process_set.size() == 1:
            single_process.refuse_options(self.config)
            if not is_elastic():  # or others may join, with this graph
                if self._loss_scale is None:  # or whoever scales the loss looks for Inf
                    single_process.check_finite(
                        self.config, call.dense_variables, call.dense_gradients
                    )
                return None
        if zeroing.applies() and any(isinstance(g, tf.IndexedSlices) for g in call.gradients):
            raise DLSError(_SLICES)
        refuse_slices(self.config, call.gradients)
        refuse_twice(variables)
        binding = self.binding_of(variables)
        binding.left_out_alone = True
        binding.start(call.process_set, call.op)
        return Exchange(binding, call.dense_variables, call.dense_gradients, call.grouped)

    def binding_of(self, variables: list[Any]) -> Binding:
        """Returns the model that holds all of these variables; a new one if none does."""
        if self._given is not None:
            self._warn_of_another(self._given)
            return self._given
        for binding in self._bindings:
            if all(binding.name_of(variable) is not None for variable in variables):
                return binding
        binding = Binding(variables, self.config)
        self._warn_of_another(binding)
        self._add(binding)
        return binding

    def _warn_of_another(self, binding: Binding) -> None:
        """Says so, once in a process, if a new model is one that another compressor trains."""
        if DLSCompressor._warned_of_another or self.is_trial or binding.session is not None:
            return
        others = (each for each in self.living() if each is not self and not each.is_trial)
        if any(theirs.trains_some_of(binding) for each in others for theirs in each._bindings):
            DLSCompressor._warned_of_another = True
            _log.warning(_ANOTHER)

    def _warn_of_unknown(self, gradient: tf.Tensor) -> None:
        if not self._warned_of_unknown:
            self._warned_of_unknown = True
            _log.warning(
                "a gradient of shape %s belongs to no known variable; it goes dense, as will "
                "others like it (said once)",
                tuple(gradient.shape),
            )


def _refuse_keras3() -> None:
    if wrapping_keras3_optimizer():
        raise DLSError(
            "Horovod's own DistributedOptimizer does not average gradients with Keras 3: the ranks "
            "would drift apart. Use hvd_dls.keras.DistributedOptimizer, or tf_keras with "
            "TF_USE_LEGACY_KERAS=1"
        )
