"""The variables of one model, the session that compresses them, and its place in a graph."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

from hvd_dls.adapter import BaseBinding
from hvd_dls.config import DLSConfig
from hvd_dls.core.balancing.layers import layer_spec
from hvd_dls.core.selection.backend import Backend
from hvd_dls.core.session.baselines import BASELINES
from hvd_dls.core.session.session import Session
from hvd_dls.errors import DLSError, NonFiniteGradientError
from hvd_dls.tensorflow.calls import handle_of, identity, on_host
from hvd_dls.tensorflow.contexts import Dense, InFlight, Step, as_horovod_accepts, send_dense
from hvd_dls.tensorflow.on_device import N_PARTS, TOO_LARGE, Device, DeviceFuture
from hvd_dls.tensorflow.sides import HOST, OnDevice, Side
from hvd_dls.tensorflow.turns import Turns
from hvd_dls.tensorflow.variables import checked_variables, names_of, stays_on_device

_OTHER_MODEL = (
    "a traced function of Horovod that DLSCompressor took part in runs with other variables of the "
    "same shapes, or the same in another order, and residuals would be mixed up. If two models "
    "share the compressor, give each an instance of its own: compression=DLSCompressor()"
)


class Binding(BaseBinding):
    """The variables of one model, and their compression.

    Args:
        variables: tf.Variable or Keras's, in model order; only weak references are kept.
        config: the options.

    Raises:
        DLSError: something else was given, or a gradient would not be floating point.
    """

    def __init__(self, variables: Iterable[Any], config: DLSConfig) -> None:
        variables = checked_variables(variables)
        specs = [
            layer_spec(name, tuple(v.shape), "tensorflow", tf.as_dtype(v.dtype).size)
            for name, v in zip(names_of(variables), variables, strict=True)
        ]
        super().__init__(specs, config)
        self._position = {layer.name: i for i, layer in enumerate(specs)}
        self._name_of = {
            identity(handle_of(v)): layer.name for v, layer in zip(variables, specs, strict=True)
        }
        self._references = [weakref.ref(v) for v in variables]
        self._on_device: dict[str, Device] = {}  # layers whose gradients do not come to the host
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

    @tf.autograph.experimental.do_not_convert
    def start(self, process_set: hvd.ProcessSet) -> None:
        """Makes the session, if there is none yet: on all ranks, which all trace the same.

        Raises:
            DLSError: see ``BaseBinding._start_session``.
        """
        if self.session is None:
            self._process_set = process_set
            with tf.init_scope():  # what is made on a device is no part of a graph
                self._start_session(process_set.size(), hvd.local_size())

    def _gather(self, name: str, array: np.ndarray) -> np.ndarray:
        with tf.device("CPU:0"):
            if not tf.executing_eagerly():
                raise DLSError("DLSCompressor needs TensorFlow 2's eager mode to be on")
            gathered = hvd.allgather(tf.constant(array), name=name, process_set=self._process_set)
            return np.asarray(gathered)

    def _norms(self) -> dict[str, float]:
        return {
            layer.name: float(np.linalg.norm(np.asarray(reference(), np.float64)))
            for layer, reference in zip(self._layers, self._references, strict=True)
        }

    # Layers on a device --------------------------------------------------------------------------

    def _backends(self) -> Mapping[str, Backend]:
        # These strategies look at whole residuals, on the host.
        if self._config.strategy not in BASELINES:
            for layer, reference in zip(self._layers, self._references, strict=True):
                variable = reference()
                if variable is None or layer.size >= TOO_LARGE:
                    continue
                if stays_on_device(variable):
                    self._on_device[layer.name] = Device(handle_of(variable).device)
        return self._on_device

    def _side(self, name: str | None) -> Side:
        """Where a layer's passes are; the host for what is no layer."""
        backend = self._on_device.get(name or "")
        return HOST if backend is None else OnDevice(backend)

    def state_dict(self) -> dict[str, Any]:
        """The session's state, all of it NumPy arrays and plain values."""
        state = super().state_dict()
        if self.session is None:
            return state
        for part in ("residuals", "velocities"):
            arrays = state[part]
            for name in arrays.keys() & self._on_device.keys():
                arrays[name] = self._on_device[name].to_host(arrays[name])
        return state

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
                checked = tf.py_function(check, [on_host(handle) for handle in handles], tf.int64)
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
        here = [name for name in compressed if name not in self._on_device]
        there = [name for name in compressed if name in self._on_device]

        def come_in(checked: np.ndarray, finite: np.ndarray, *arrays: np.ndarray) -> np.ndarray:
            with self._lock:
                for name, good in zip(watched, finite, strict=True):
                    session.note(name, bool(good))
                for name, array in zip(here, arrays[: len(here)], strict=True):
                    if session.dense_step:
                        session.note(name, finite=True)  # its sum is looked at
                    else:
                        session.compress(name, HOST.flat(array))
                if bucket is None or session.dense_step:
                    return np.zeros(1, np.uint8)
                brought = iter(arrays[len(here) :])
                for name in there:
                    _future(session, name).parts = list(islice(brought, N_PARTS))
                return session.payload(bucket)

        taken = [self._taken(name, gradients[name]) for name in here]
        found = [p for name in there for p in self._find(session, name, gradients[name], checked)]
        finite = tf.zeros([0], tf.bool)
        if watched:
            finite = tf.stack([self._finite(name, gradients[name]) for name in watched])
        payload = tf.numpy_function(come_in, [checked, finite, *taken, *found], tf.uint8)
        payload = tf.ensure_shape(payload, [None])
        if bucket is None:
            return payload
        # A name of its own: Horovod matches operations of different ranks by name.
        name = f"{self._label}.{bucket}"
        return hvd.allgather(
            payload, name=name, ignore_name_scope=True, process_set=self._process_set
        )

    def _taken(self, name: str, gradient: tf.Tensor) -> tf.Tensor:
        return tf.cast(gradient, self._exchanged(name, gradient.dtype))

    def _finite(self, name: str, gradient: tf.Tensor) -> tf.Tensor:
        with tf.device(self._side(name).device):
            return tf.reduce_all(tf.math.is_finite(gradient))

    def _find(
        self, session: Session, name: str, gradient: tf.Tensor, checked: tf.Tensor
    ) -> list[tf.Tensor]:
        """What a device finds in a layer's gradient: for the bucket's function, on the host.

        TensorFlow copies it there behind the device's work and calls that function when it has
        arrived, so nothing waits for the device but the payload itself.
        """
        backend = self._on_device[name]
        dtypes = backend.parts(self._layers[self._position[name]].work_dtype)

        def come_in(checked: tf.Tensor, array: tf.Tensor) -> Sequence[tf.Tensor]:
            with self._lock:
                if session.dense_step:
                    session.note(name, finite=True)  # its sum is looked at
                    return [tf.zeros(0, dtype) for dtype in dtypes]
                session.compress(name, tf.reshape(array, [-1]))
                return _future(session, name).parts

        with tf.device(backend.name):
            parts: list[tf.Tensor] = tf.py_function(
                come_in, [checked, self._taken(name, gradient)], dtypes
            )
        return parts

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
            if step.grouped:
                whole = tf.cast(whole, gradient.dtype)
            with tf.control_dependencies([step.checked]):
                wide, _ = send_dense(tf.identity(whole))
            return wide, Dense(gradient.dtype, self, step, name)
        accepted = as_horovod_accepts(gradient.dtype) if step.grouped else tf.float64
        placed = f"{self._label}.{self._position[name]}.scale"
        if step.some_dense:
            offered = tf.identity(self._offered(name, gradient, step), name=placed)
        else:
            offered = tf.ones([1], accepted, name=placed)
        return offered, InFlight(gradient.dtype, self, step, name)

    def _corrected(self, name: str, gradient: tf.Tensor, step: Step) -> tf.Tensor:
        """Clipped and with momentum: what is sent of a gradient that goes dense."""
        session, side = self.session, self._side(name)
        assert session is not None
        work = tf.as_dtype(self._layers[self._position[name]].work_dtype)

        def correct(checked: Any, array: Any) -> Any:
            with self._lock:
                corrected = session.correct(name, side.flat(array))
            return side.shaped(corrected, array.shape)

        with tf.device(side.device):
            corrected = side.call(correct, [step.checked, gradient], work)
        return tf.ensure_shape(corrected, gradient.shape)

    def _offered(self, name: str, gradient: tf.Tensor, step: Step) -> tf.Tensor:
        """The whole gradient in a dense step, else a placeholder: (n,) or (1,)."""
        session, side = self.session, self._side(name)
        assert session is not None
        work = self._layers[self._position[name]].work_dtype
        accepted = as_horovod_accepts(gradient.dtype) if step.grouped else tf.as_dtype(work)

        def offer(checked: Any, array: Any) -> Any:
            with self._lock:
                if session.is_sparse(name):
                    return np.ones(1, accepted.as_numpy_dtype)
                whole = side.flat(array)
                if session.corrects:
                    whole = session.correct(name, whole)
                return side.cast(whole, accepted)

        with tf.device(side.device):
            offered = side.call(offer, [step.checked, gradient], accepted)
        return tf.ensure_shape(offered, [None])

    def decompress(self, reduced_one: tf.Tensor, sent: InFlight) -> tf.Tensor:
        """All ranks' entries as a gradient, scaled as Horovod scaled the 1.0."""
        assert self.session is not None
        session, side = self.session, self._side(sent.name)
        layer = self._layers[self._position[sent.name]]
        dtype = self._exchanged(sent.name, sent.dtype)

        def summed(received: Any, reduced: Any) -> Any:
            total = side.new(layer.size, dtype)
            with self._lock, self._until_the_last(sent.step):
                counts = self._error is None
                if counts and session.is_sparse(sent.name):
                    scale = side.number(reduced) / session.world_size
                    session.decompress(sent.name, side.writable(total), scale)
                    counts = not session.refused
                elif counts:
                    side.write(total, reduced)
                    counts = session.accept(sent.name, reduced)
                if not counts:
                    side.write(total, self._instead)
            if self._error is not None:
                side.write(total, 0)
            return side.shaped(total, layer.shape)

        with tf.device(side.device):
            total = side.call(summed, [sent.step.received, reduced_one], dtype)
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
        side = self._side(name) if step.some_dense else HOST

        def count(received: Any, whole: Any) -> bool:
            with self._lock, self._until_the_last(step):
                if self._error is None and name is not None:
                    return session.accept(name, side.flat(whole) if session.dense_step else None)
            return True

        with tf.control_dependencies([reduced]), tf.device(side.device):
            whole = reduced if step.some_dense else tf.zeros([0])
            counts = side.call(count, [step.received, whole], tf.bool)
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


def _graph_of(gradients: Sequence[tf.Tensor]) -> AbstractContextManager[Any]:
    """Where the gradients are: Horovod compresses each in a graph of its own within theirs."""
    if tf.is_symbolic_tensor(gradients[0]):
        graph: AbstractContextManager[Any] = gradients[0].graph.as_default()
        return graph
    return nullcontext()


def _future(session: Session, name: str) -> DeviceFuture[Any]:
    future = session.future_of(name)
    assert isinstance(future, DeviceFuture)
    return future
