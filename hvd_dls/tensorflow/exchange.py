"""The operations that exchange payloads for one traced call of Horovod.

``Exchange`` adds them to the graph once; they run in each step.  What becomes of the single
gradients is in ``reduction.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import tensorflow as tf

from hvd_dls.core.session.session import Session
from hvd_dls.errors import DLSError
from hvd_dls.tensorflow import zeroing
from hvd_dls.tensorflow.binding import Binding
from hvd_dls.tensorflow.branches import Branches, freed_in, run_at_once
from hvd_dls.tensorflow.executors import HOST
from hvd_dls.tensorflow.handles import graph_of, handle_of, handle_on_cpu, identity
from hvd_dls.tensorflow.on_device import N_PARTS, DeviceFuture
from hvd_dls.tensorflow.stages import Stage, in_one
from hvd_dls.tensorflow.traced_models import agree_on, models_of_function

_OTHER_MODEL = (
    "a traced function of Horovod that DLSCompressor took part in runs with other variables of the "
    "same shapes, or the same in another order, and residuals would be mixed up. If two models "
    "share the compressor, give each an instance of its own: compression=DLSCompressor()"
)


class Exchange:
    """Exchanges the payloads of one model's gradients: built while a call of Horovod is traced.

    A traced function that got its variables as arguments may run again with other variables of the
    same shapes, without being traced anew.  So each step first compares the variables it got with
    those it was traced for, before anything is sent.

    Args:
        binding: the model; its session has started.
        variables: of all dense gradients of the call; some may not belong to the model.
        gradients: of these variables.
        grouped: whether what Horovod gets must be of its gradient's type, as in Horovod's groups.

    Attributes:
        binding: the model.
        layers: names of the model's layers that take part.
        n_gradients: number of all dense gradients of the call, compressed or not.
        checked: () int64 tensor, computed once the variables are known to be the model's.
        received: () int64 tensor, computed once all ranks' payloads have arrived.
        grouped: as given.
        branches: in which Horovod reduces single gradients; None where no function is traced.
        may_go_dense: whether some steps to come may send the gradients of compressed layers whole.
    """

    def __init__(
        self,
        binding: Binding,
        variables: Sequence[Any],
        gradients: Sequence[tf.Tensor],
        grouped: bool = False,
    ) -> None:
        assert binding.session is not None
        self.binding = binding
        named = zip(map(binding.name_of, variables), variables, gradients, strict=True)
        members = {
            name: (variable, gradient)
            for name, variable, gradient in named
            if name is not None and self.session.takes_part(name)
        }
        self.layers = frozenset(members)
        self.n_gradients = len(variables)
        self.grouped = grouped
        self._stages = binding.stages
        self._seen_to = zeroing.is_seen_to()
        # Not whether this step does: a state of an earlier one may be loaded, and in an elastic job
        # the function may run beside those of ranks that have traced theirs in other steps.
        self.may_go_dense = self.session.dense_step or self.session.dense_steps > 0
        with graph_of(gradients), tf.device("CPU:0"):
            in_graph = tf.is_symbolic_tensor(gradients[0])
            self._models = models_of_function() if in_graph else []
            if not any(model is binding for model in self._models):
                self._models.append(binding)
            self.checked = self._check({n: v for n, (v, _) in members.items()}, in_graph)
            buckets: dict[int | None, dict[str, tf.Tensor]] = {}
            self._own = [(each, tf.identity(zeroing.zero(each))) for each in gradients]
            for name, (_, gradient) in members.items():
                buckets.setdefault(self.session.bucket_of(name), {})[name] = self.own(gradient)
            gathered = {
                bucket: self._gather(bucket, of_bucket)
                for bucket, of_bucket in sorted(buckets.items(), key=str)
            }
            self.received = self._receive(gathered) if gathered else self.checked
            self.branches = Branches(gradients[0].graph) if in_graph else None

    @property
    def session(self) -> Session:
        """Of the model: another one once ``hvd.init()`` was called again."""
        assert self.binding.session is not None
        return self.binding.session

    def own(self, gradient: tf.Tensor) -> tf.Tensor:
        """Returns a gradient, or zeros where this rank has no data.

        Not made in Horovod's branch, and not the very gradient: TensorFlow numbers what it makes of
        branches by their inputs, and these numbers are in the names by which Horovod matches
        operations of ranks.  So there must be as many, however a rank has traced its function.
        """
        return next((own for of, own in self._own if of is gradient), gradient)

    def one(self, dtype: tf.DType) -> tf.Tensor:
        """Returns 1.0, (1,), for Horovod to reduce.

        Not a constant: TensorFlow would run Horovod's operation once, when it optimises a traced
        function, and never again.  A rank that traces it anew in a step of its own, for a smaller
        batch, would wait there for all others; and where workers come and go, those that stay would
        go on with the scale of a number of ranks that has passed.  So it is computed in each run.
        """
        return tf.cast(tf.reshape(tf.minimum(self.checked, 1), [1]), dtype)

    def _check(self, variables: dict[str, Any], in_graph: bool) -> tf.Tensor:
        """Compares a step's variables with those traced, and begins the step."""
        handles = [
            handle_of(variable)
            for name, variable in variables.items()
            if self.session.may_be_sparse(name) or self.session.corrects
        ]
        traced = [identity(handle) for handle in handles]
        seen_to = self._seen_to

        def check(*current: tf.Tensor) -> np.int64:
            if [identity(handle) for handle in current] != traced:
                raise DLSError(_OTHER_MODEL)
            zeroing.exchange_begins(seen_to)
            agree_on(self._models)
            return np.int64(self.binding.begin_step())

        if in_graph:
            inputs = [handle_on_cpu(handle) for handle in handles]
            with tf.control_dependencies(freed_in(tf.compat.v1.get_default_graph())):
                return tf.py_function(check, inputs, tf.int64)
        return tf.constant(check(*handles))

    def _gather(self, bucket: int | None, gradients: dict[str, tf.Tensor]) -> tf.Tensor:
        """Gathers all ranks' payloads of a bucket, as soon as its gradients have been computed.

        Args:
            bucket: its number; None for layers without a payload, of which nothing is gathered.
            gradients: of the bucket's layers.  Those of layers that go dense are only checked for
                NaN and Inf.
        """
        session, binding = self.session, self.binding
        compressed = [name for name in gradients if session.may_be_sparse(name)]
        watched = [name for name in gradients if name not in compressed]
        on_host = [name for name in compressed if name not in binding.devices]
        on_device = [name for name in compressed if name in binding.devices]

        def compress(checked: np.ndarray, finite: np.ndarray, *arrays: np.ndarray) -> Any:
            session = self.session
            with binding.lock:
                binding.enter(self.layers, [*watched, *on_host], int(checked))
                for name, is_finite in zip(watched, finite, strict=True):
                    session.note(name, bool(is_finite))
                for name, array in zip(on_host, arrays[: len(on_host)], strict=True):
                    if session.dense_step:
                        session.note(name, finite=True)  # its sum is checked later
                    else:
                        session.compress(name, HOST.flatten(array))
                if bucket is None or session.dense_step:
                    to_host = bucket is None or session.grouped
                    return in_one(np.zeros(1, dtype) if to_host else self._nothing())
                parts = iter(arrays[len(on_host) :])
                for name in on_device:
                    self._future(name).parts = list(islice(parts, N_PARTS))
                if session.grouped:
                    return in_one(session.contribution(bucket))
                return in_one(self._selected(bucket))

        inputs = [self._as_exchanged(name, gradients[name]) for name in on_host]
        for name in on_device:
            inputs += self._find_on_device(name, gradients[name])
        finite = tf.zeros([0], tf.bool)
        if watched:
            finite = tf.stack([self._all_finite(name, gradients[name]) for name in watched])
        dtype: Any = np.uint8
        if session.grouped and bucket is not None:
            dtype = session.routing.buckets[bucket].layers[0].work_dtype
        inputs = [self.checked, finite, *inputs]
        sent, splits = tf.numpy_function(compress, inputs, [dtype, tf.int32])
        sent = tf.ensure_shape(sent, [None])
        if bucket is None:
            return sent
        if session.grouped:
            sent, splits = self._add_up(bucket, self._stages.run(Stage.ADD_UP, bucket, sent))
        if session.sends(bucket):
            if session.owners is not None:
                parts = self._stages.run(Stage.SCATTER, bucket, sent, splits)
                sent = self._collect(bucket, parts)
            sent = self._stages.run(Stage.GATHER, bucket, sent)
        return self._stages.run(Stage.HAND_ON, bucket, sent) if session.grouped else sent

    def _selected(self, bucket: int) -> Any:
        """What is sent of what was found: to all, or a part for each of the bucket's owners."""
        session = self.session
        return session.payload(bucket) if session.owners is None else session.parts(bucket)

    def _nothing(self) -> Any:
        """What is sent in its place in a step that sends whole gradients."""
        session, nothing = self.session, np.zeros(1, np.uint8)
        return nothing if session.owners is None else [nothing] * session.groups.count

    def _add_up(self, bucket: int, total: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Selects from what was added up inside the host.

        Args:
            bucket: its number.
            total: of the host's ranks.

        Returns:
            What this rank sends then, and how much of it to whom.
        """

        def select(total: np.ndarray) -> Any:
            session = self.session
            with self.binding.lock:
                if session.dense_step:
                    return in_one(self._nothing())
                session.added_up(bucket, total)
                sends = session.sends(bucket)
                return in_one(self._selected(bucket) if sends else session.header(bucket))

        sent, splits = tf.numpy_function(select, [total], [tf.uint8, tf.int32])
        run_at_once(sent)
        return tf.ensure_shape(sent, [None]), splits

    def _collect(self, bucket: int, parts: tf.Tensor) -> tf.Tensor:
        """Has this rank, an owner of the bucket, add up what came of its region.

        Args:
            bucket: its number.
            parts: of all who send it.

        Returns:
            What it hands out.
        """

        def add_up(parts: np.ndarray) -> np.ndarray:
            session, binding = self.session, self.binding
            with binding.lock:
                if session.dense_step:
                    return np.zeros(1, np.uint8)
                with binding.deferred.errors_kept():  # other ranks wait for what is sent now
                    session.collected(bucket, parts)
                return session.payload(bucket)

        sent = tf.numpy_function(add_up, [parts], tf.uint8)
        run_at_once(sent)
        return tf.ensure_shape(sent, [None])

    def _as_exchanged(self, name: str, gradient: tf.Tensor) -> tf.Tensor:
        return tf.cast(gradient, self.binding.exchanged_dtype(name, gradient.dtype))

    def _all_finite(self, name: str, gradient: tf.Tensor) -> tf.Tensor:
        with tf.device(self.binding.executor_of(name).device):
            return tf.reduce_all(tf.math.is_finite(gradient))

    def _find_on_device(self, name: str, gradient: tf.Tensor) -> list[tf.Tensor]:
        """Selects a layer's entries on its device, for the bucket's function on the host.

        TensorFlow copies them to the host behind the device's work and calls the bucket's function
        when they have arrived, so nothing but the payload waits for the device.
        """
        backend = self.binding.devices[name]
        dtypes = backend.parts(self.binding.layer(name).work_dtype)

        def compress(checked: tf.Tensor, array: tf.Tensor) -> Sequence[tf.Tensor]:
            session = self.session
            with self.binding.lock:
                self.binding.enter(self.layers, [name], int(checked))
                if session.dense_step:
                    session.note(name, finite=True)  # its sum is checked later
                    return [tf.zeros(0, dtype) for dtype in dtypes]
                session.compress(name, tf.reshape(array, [-1]))
                return self._future(name).parts

        with tf.device(backend.name):
            inputs = [self.checked, self._as_exchanged(name, gradient)]
            parts: list[tf.Tensor] = tf.py_function(compress, inputs, dtypes)
        return parts

    def _future(self, name: str) -> DeviceFuture[Any]:
        future = self.session.future_of(name)
        assert isinstance(future, DeviceFuture)
        return future

    def _receive(self, gathered: dict[int | None, tf.Tensor]) -> tf.Tensor:
        """Waits for all buckets: a step changes nothing before all payloads have arrived."""
        buckets = list(gathered)

        def receive(*arrays: np.ndarray) -> np.int64:
            session, deferred = self.session, self.binding.deferred
            with self.binding.lock, deferred.errors_kept():
                if not session.dense_step:
                    session.watch.arrived()
                    for bucket, array in zip(buckets, arrays, strict=True):
                        if bucket is not None:
                            session.receive(bucket, array)
            return np.int64(0)

        return tf.numpy_function(receive, list(gathered.values()), tf.int64)
