"""The variables of one model, the session that compresses them, and its place in a graph."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

from hvd_dls.adapter import BaseBinding
from hvd_dls.config import DLSConfig
from hvd_dls.core.layers import layer_spec
from hvd_dls.core.passes_numpy import widened
from hvd_dls.core.session import Session
from hvd_dls.errors import DLSError, NonFiniteGradientError
from hvd_dls.tensorflow.calls import handle_of, identity
from hvd_dls.tensorflow.turns import Turns

_FLOATS = (tf.float16, tf.bfloat16, tf.float32, tf.float64)
_OTHER_MODEL = (
    "a traced function of Horovod that DLSCompressor took part in runs with other variables of the "
    "same shapes, or the same in another order, and residuals would be mixed up. If two models "
    "share the compressor, give each an instance of its own: compression=DLSCompressor()"
)


class Step(NamedTuple):
    """What one traced call of Horovod exchanges of a model: the same each time it runs.

    Attributes:
        layers: names of the model's layers that take part.
        gradients: number of all dense gradients of the call, compressed or not.
        checked: () int64 tensor that is there once the variables are known to be the model's.
        received: () int64 tensor that is there once all ranks' payloads are.
        grouped: whether a placeholder must be of its gradient's type, as Horovod's groups are.
        some_dense: whether some steps to come may send the gradients of compressed layers whole.
    """

    layers: frozenset[str]
    gradients: int
    checked: tf.Tensor
    received: tf.Tensor
    grouped: bool
    some_dense: bool


class Dense(NamedTuple):
    """What ``decompress`` needs to know of a gradient that Horovod reduces whole."""

    dtype: tf.DType
    binding: Binding | None = None  # of the model whose gradient it is, or others of the call are
    step: Step | None = None
    name: str | None = None


class InFlight(NamedTuple):
    """What ``decompress`` needs to know of a gradient that ``compress`` sent on its way."""

    dtype: tf.DType
    binding: Binding
    step: Step
    name: str


class Binding(BaseBinding):
    """The variables of one model, and their compression.

    Args:
        variables: tf.Variable or Keras's, in model order; only weak references are kept.
        config: the options.

    Raises:
        DLSError: something else was given, or a gradient would not be floating point.
    """

    def __init__(self, variables: Iterable[Any], config: DLSConfig) -> None:
        variables = _checked(variables)
        specs = [
            layer_spec(name, tuple(v.shape), "tensorflow", tf.as_dtype(v.dtype).size)
            for name, v in zip(_names_of(variables), variables, strict=True)
        ]
        super().__init__(specs, config)
        self._position = {layer.name: i for i, layer in enumerate(specs)}
        self._name_of = {
            identity(handle_of(v)): layer.name for v, layer in zip(variables, specs, strict=True)
        }
        self._references = [weakref.ref(v) for v in variables]
        self._process_set: hvd.ProcessSet = hvd.global_process_set
        self._lock = Turns()
        self._reduced = 0  # gradients of the step that Horovod has returned
        self._error: NonFiniteGradientError | None = None  # to be raised with the last of them
        # Whether gradients of a skipped step are to be Inf, for who applies them to see; else zero.
        self.marks_skipped = False

    @property
    def alive(self) -> bool:
        """Whether any of the variables still exists."""
        return any(reference() is not None for reference in self._references)

    def name_of(self, variable: Any) -> str | None:
        """Name of a variable; None if it is none of this model's."""
        return self._name_of.get(identity(handle_of(variable)))

    def start(self, process_set: hvd.ProcessSet) -> None:
        """Makes the session, if there is none yet: on all ranks, which all trace the same.

        Raises:
            DLSError: see ``BaseBinding._start_session``.
        """
        if self.session is None:
            self._process_set = process_set
            self._start_session(process_set.size(), hvd.local_size())

    def _gather(self, name: str, array: np.ndarray) -> np.ndarray:
        """At once, also while a function is being traced."""
        with tf.init_scope(), tf.device("CPU:0"):
            if not tf.executing_eagerly():
                raise DLSError("DLSCompressor needs TensorFlow 2's eager mode to be on")
            gathered = hvd.allgather(tf.constant(array), name=name, process_set=self._process_set)
            return np.asarray(gathered)

    def _norms(self) -> dict[str, float]:
        with tf.init_scope():
            return {
                layer.name: float(np.linalg.norm(np.asarray(reference(), np.float64)))
                for layer, reference in zip(self._layers, self._references, strict=True)
            }

    # In a graph ---------------------------------------------------------------------------------

    def step(
        self, variables: Sequence[Any], gradients: Sequence[tf.Tensor], grouped: bool = False
    ) -> Step:
        """Builds the exchange of one traced call, in the graph of its gradients.

        A traced function that got its variables as arguments may run again with others of the same
        shapes: TensorFlow does not trace anew then.  So it looks each time which ones it got,
        before anything is sent.

        Args:
            variables: of all dense gradients of the call; some may be none of this model's.
            gradients: of these variables.
            grouped: see ``Step``.
        """
        assert self.session is not None
        session = self.session
        named = zip(map(self.name_of, variables), variables, gradients, strict=True)
        ours = {n: (v, g) for n, v, g in named if n is not None and session.takes_part(n)}
        handles = [
            handle_of(variable)
            for name, (variable, _) in ours.items()
            if session.may_be_sparse(name) or session.corrects
        ]
        expected = [identity(handle) for handle in handles]

        def check(*found: tf.Tensor) -> np.int64:
            if [identity(handle) for handle in found] != expected:
                raise DLSError(_OTHER_MODEL)
            with self._lock:
                self._reduced, self._error = 0, None
                self._follow_loss_scale(session)
            return np.int64(0)

        with _graph_of(gradients), tf.device("CPU:0"):
            if tf.is_symbolic_tensor(gradients[0]):
                checked = tf.py_function(check, handles, tf.int64)
            else:
                checked = tf.constant(check(*handles))
            parts: dict[int | None, dict[str, tf.Tensor]] = {}  # what comes in, by bucket
            for name, (_, gradient) in ours.items():
                parts.setdefault(session.bucket_of(name), {})[name] = gradient
            gathered = {
                number: self._exchange(session, number, members, checked)
                for number, members in sorted(parts.items(), key=str)
            }
            received = self._receive(session, gathered) if gathered else checked
        some_dense = session.dense_step
        return Step(frozenset(ours), len(variables), checked, received, grouped, some_dense)

    def _exchange(
        self,
        session: Session,
        bucket: int | None,
        gradients: dict[str, tf.Tensor],
        checked: tf.Tensor,
    ) -> tf.Tensor:
        """All ranks' payloads of a bucket: on its way as soon as its gradients are there.

        Of layers that go dense it only tells whether they are finite.  Bucket None: they have no
        payload.
        """
        compressed = [name for name in gradients if session.may_be_sparse(name)]
        watched = [name for name in gradients if name not in compressed]

        def come_in(checked: np.ndarray, finite: np.ndarray, *arrays: np.ndarray) -> np.ndarray:
            with self._lock:
                for name, good in zip(watched, finite, strict=True):
                    session.note(name, bool(good))
                for name, array in zip(compressed, arrays, strict=True):
                    if session.dense_step:
                        session.note(name, finite=True)  # its sum is looked at
                    else:
                        session.compress(name, _bits(array).reshape(-1))
                if bucket is None or session.dense_step:
                    return np.zeros(1, np.uint8)
                return session.payload(bucket)

        taken = [
            tf.cast(gradients[name], self._exchanged(name, gradients[name].dtype))
            for name in compressed
        ]
        finite = tf.zeros([0], tf.bool)
        if watched:
            finite = tf.stack([tf.reduce_all(tf.math.is_finite(gradients[n])) for n in watched])
        payload = tf.numpy_function(come_in, [checked, finite, *taken], tf.uint8)
        payload = tf.ensure_shape(payload, [None])
        if bucket is None:
            return payload
        # A name of its own: Horovod matches operations of different ranks by name.
        name = f"{self._label}.{bucket}"
        return hvd.allgather(
            payload, name=name, ignore_name_scope=True, process_set=self._process_set
        )

    def _receive(self, session: Session, gathered: dict[int | None, tf.Tensor]) -> tf.Tensor:
        """Waits for all buckets: before a step changes anything, all of it is there."""
        buckets = list(gathered)

        def received(*arrays: np.ndarray) -> np.int64:
            with self._lock:
                if not session.dense_step:
                    for bucket, array in zip(buckets, arrays, strict=True):
                        if bucket is not None:
                            session.receive(bucket, array)
            return np.int64(0)

        return tf.numpy_function(received, list(gathered.values()), tf.int64)

    def compress(
        self, name: str | None, gradient: tf.Tensor, step: Step
    ) -> tuple[tf.Tensor, InFlight | Dense]:
        """A placeholder for a gradient that is on its way in its bucket, or the gradient itself.

        Returns:
            What Horovod allreduces, and what ``decompress`` needs: the gradient for a dense layer,
            else a placeholder (1,) of 1.0.  Whatever factor Horovod's reduction applies to the
            placeholder (average or sum, pre- and postscale) applies to the gradient.
        """
        assert self.session is not None
        if not step.layers:
            return send_dense(gradient)
        if name is None or name not in step.layers:
            with tf.control_dependencies([step.checked]):
                wide, sent = send_dense(tf.identity(gradient))
            return wide, Dense(sent.dtype, self, step)
        if not self.session.may_be_sparse(name):
            whole = self._corrected(name, gradient, step) if self.session.corrects else gradient
            with tf.control_dependencies([step.checked]):
                wide, _ = send_dense(tf.identity(whole))
            return wide, Dense(gradient.dtype, self, step, name)
        accepted = _as_horovod_accepts(gradient.dtype) if step.grouped else tf.float64
        placed = f"{self._label}.{self._position[name]}.scale"
        if step.some_dense:
            offered = tf.identity(self._offered(name, gradient, step), name=placed)
        else:
            offered = tf.ones([1], accepted, name=placed)
        return offered, InFlight(gradient.dtype, self, step, name)

    def _corrected(self, name: str, gradient: tf.Tensor, step: Step) -> tf.Tensor:
        """Clipped and with momentum: what is sent of a gradient that goes dense."""
        session = self.session
        assert session is not None
        work = self._layers[self._position[name]].work_dtype

        def correct(checked: np.ndarray, array: np.ndarray) -> np.ndarray:
            with self._lock:
                flat: np.ndarray = session.correct(name, _bits(array).reshape(-1))
            return flat.reshape(array.shape)

        with tf.device("CPU:0"):
            corrected = tf.numpy_function(correct, [step.checked, gradient], work)
        return tf.ensure_shape(corrected, gradient.shape)

    def _offered(self, name: str, gradient: tf.Tensor, step: Step) -> tf.Tensor:
        """The whole gradient in a dense step, else a placeholder: (n,) or (1,)."""
        session = self.session
        assert session is not None
        work = self._layers[self._position[name]].work_dtype
        accepted = _as_horovod_accepts(gradient.dtype) if step.grouped else tf.as_dtype(work)

        def offer(checked: np.ndarray, array: np.ndarray) -> np.ndarray:
            with self._lock:
                if session.is_sparse(name):
                    return np.ones(1, accepted.as_numpy_dtype)
                whole = _bits(array).reshape(-1)
                if session.corrects:
                    whole = session.correct(name, whole)
                return widened(whole).astype(accepted.as_numpy_dtype)

        with tf.device("CPU:0"):
            offered = tf.numpy_function(offer, [step.checked, gradient], accepted)
        return tf.ensure_shape(offered, [None])

    def decompress(self, reduced_one: tf.Tensor, sent: InFlight) -> tf.Tensor:
        """All ranks' entries as a gradient, scaled as Horovod scaled the 1.0."""
        assert self.session is not None
        session, layer = self.session, self._layers[self._position[sent.name]]
        dtype = self._exchanged(sent.name, sent.dtype)

        def summed(received: np.ndarray, reduced: np.ndarray) -> np.ndarray:
            total = _aligned(layer.size, dtype.as_numpy_dtype)
            with self._lock, self._until_the_last(sent.step):
                counts = self._error is None
                if counts and session.is_sparse(sent.name):
                    scale = float(reduced[0]) / session.world_size
                    session.decompress(sent.name, _bits(total), scale)
                    counts = not session.refused
                elif counts:
                    total[:] = reduced
                    counts = session.accept(sent.name, reduced)
                if not counts:
                    total[:] = self._instead
            if self._error is not None:
                total[:] = 0
            return total.reshape(layer.shape)

        with tf.device("CPU:0"):
            total = tf.numpy_function(summed, [sent.step.received, reduced_one], dtype)
            return tf.cast(tf.ensure_shape(total, layer.shape), sent.dtype)

    def _exchanged(self, name: str, gradient: tf.DType) -> tf.DType:
        """The type in which a gradient is exchanged: its own, if that adds to the residual's."""
        work = tf.as_dtype(self._layers[self._position[name]].work_dtype)
        return gradient if gradient.size == 2 and work == tf.float32 else work

    def decompress_dense(self, reduced: tf.Tensor, sent: Dense) -> tf.Tensor:
        """A gradient that Horovod has reduced whole."""
        step, session, name = sent.step, self.session, sent.name
        assert step is not None
        assert session is not None

        def count(received: np.ndarray, whole: np.ndarray) -> bool:
            with self._lock, self._until_the_last(step):
                if self._error is None and name is not None:
                    return session.accept(name, whole.reshape(-1) if session.dense_step else None)
            return True

        with tf.control_dependencies([reduced]), tf.device("CPU:0"):
            whole = reduced if step.some_dense else tf.zeros([0])
            counts = tf.numpy_function(count, [step.received, whole], tf.bool)
        if self._config.nonfinite == "skip":
            instead = tf.fill(tf.shape(reduced), tf.cast(self._instead, reduced.dtype))
            reduced = tf.where(counts, reduced, instead)
        with tf.control_dependencies([counts]):
            return tf.cast(tf.identity(reduced), sent.dtype)

    @property
    def _instead(self) -> float:
        """What stands for each entry of a gradient that does not count."""
        return np.inf if self.marks_skipped or self.loss_scale is not None else 0.0

    @contextmanager
    def _until_the_last(self, step: Step) -> Iterator[None]:
        """Keeps a step's error until all its gradients are through, and raises it with the last.

        Not before: an error stops all that the graph has not begun, and other ranks would wait for
        ever for an allreduce that this one never got to.
        """
        try:
            yield
        except NonFiniteGradientError as error:
            self._error = error
        self._reduced += 1
        if self._reduced == step.gradients and self._error is not None:
            raise self._error


def send_dense(gradient: tf.Tensor) -> tuple[tf.Tensor, Dense]:
    """A gradient as Horovod takes it."""
    return tf.cast(gradient, _as_horovod_accepts(gradient.dtype)), Dense(gradient.dtype)


def _graph_of(gradients: Sequence[tf.Tensor]) -> AbstractContextManager[Any]:
    """Where the gradients are: Horovod compresses each in a graph of its own within theirs."""
    if tf.is_symbolic_tensor(gradients[0]):
        graph: AbstractContextManager[Any] = gradients[0].graph.as_default()
        return graph
    return nullcontext()


def _bits(array: np.ndarray) -> np.ndarray:
    """The array; of bfloat16, which is not NumPy's own, the bits as uint16."""
    return array.view(np.uint16) if array.dtype == tf.bfloat16.as_numpy_dtype else array


def _aligned(size: int, dtype: Any) -> np.ndarray:
    """An array that TensorFlow takes over without copying: it wants multiples of 64 bytes."""
    raw = np.empty(size * np.dtype(dtype).itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size * np.dtype(dtype).itemsize].view(dtype)


def _as_horovod_accepts(dtype: tf.DType) -> tf.DType:
    """Horovod's operations refuse bfloat16."""
    return tf.float32 if dtype == tf.bfloat16 else dtype


def _checked(variables: Iterable[Any]) -> list[Any]:
    wanted = "variables takes tf.Variable or Keras's, as model.trainable_variables gives"
    try:
        variables = list(variables)
    except TypeError as error:
        raise DLSError(f"{wanted}, not {variables!r}") from error
    for variable in variables:
        if handle_of(variable) is None:
            raise DLSError(f"{wanted}, not {type(variable).__name__}")
        if tf.as_dtype(variable.dtype) not in _FLOATS:
            raise DLSError(
                f"variable {variable.name!r} has type {tf.as_dtype(variable.dtype).name}; accepted "
                f"are {', '.join(dtype.name for dtype in _FLOATS)}"
            )
    return variables


def _names_of(variables: Iterable[Any]) -> list[str]:
    """Keras's paths or TensorFlow's names; where they repeat, with their position."""
    names: list[str] = []
    for position, variable in enumerate(variables):
        name = getattr(variable, "path", None) or variable.name.removesuffix(":0")
        names.append(f"{name}.{position}" if name in names else name)
    return names
