"""One model: its variables, the session that compresses their gradients, and its devices."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

from hvd_dls.adapter import BaseBinding, World, is_elastic
from hvd_dls.config import ALLGATHER, DLSConfig
from hvd_dls.core.balancing.layers import LayerSpec
from hvd_dls.core.checkpoint.redistribution import ARRAYS
from hvd_dls.core.selection.backend import Backend
from hvd_dls.core.session.baselines import BASELINES
from hvd_dls.core.session.session import Session
from hvd_dls.errors import DLSError
from hvd_dls.tensorflow import single_process
from hvd_dls.tensorflow.deferred_error import DeferredError
from hvd_dls.tensorflow.executors import HOST, DeviceExecutor, Executor
from hvd_dls.tensorflow.handles import handle_of, identity
from hvd_dls.tensorflow.lost_ranks import refuse_horovods_run
from hvd_dls.tensorflow.on_device import TOO_LARGE, Device
from hvd_dls.tensorflow.stages import Stages
from hvd_dls.tensorflow.step_lock import StepLock
from hvd_dls.tensorflow.variables import checked_variables, layer_specs_of, stays_on_device


class Binding(BaseBinding):
    """The variables of one model and the session that compresses their gradients.

    Args:
        variables: tf.Variable or Keras's, in model order; only weak references are kept.
        config: the options.

    Attributes:
        config: the options.
        process_set: the ranks that exchange gradients; known once the session has started.
        lock: held by each Python function of a step while it uses the session.
        deferred: the error of the step in progress.
        devices: backends of the layers whose gradients stay on a device, by name.
        marks_skipped: whether gradients of a skipped step are to be Inf, for whoever applies them
            to see; else they are zero.
        left_out_alone: whether Horovod applies gradients as they are, without the compressor, while
            there is one rank only.

    Raises:
        DLSError: something else was given, or a gradient would not be floating point.
    """

    def __init__(self, variables: Iterable[Any], config: DLSConfig) -> None:
        variables = checked_variables(variables)
        specs = layer_specs_of(variables)
        super().__init__(specs, config)
        self._position = {layer.name: i for i, layer in enumerate(specs)}
        self._name_of = {
            identity(handle_of(v)): layer.name for v, layer in zip(variables, specs, strict=True)
        }
        self._references = [weakref.ref(v) for v in variables]
        self.config = config
        self.process_set: hvd.ProcessSet = hvd.global_process_set
        self._op: int = hvd.Average
        self._runs = 0  # of traced calls
        self._run_of: dict[str, int] = {}  # in which each layer came in last
        self.lock = StepLock()
        self.deferred = DeferredError()
        self.devices: dict[str, Device] = {}
        self.marks_skipped = False
        self.left_out_alone = False

    @property
    def alive(self) -> bool:
        """Whether any of the variables still exists."""
        return any(reference() is not None for reference in self._references)

    def name_of(self, variable: Any) -> str | None:
        """Returns the name of a variable; None if it does not belong to this model."""
        return self._name_of.get(identity(handle_of(variable)))

    def trains_some_of(self, other: Binding) -> bool:
        """Whether its session has begun, and variables of another model are its own."""
        return self.session is not None and not self._name_of.keys().isdisjoint(other._name_of)

    def layer(self, name: str) -> LayerSpec:
        """Returns the layer of this name."""
        return self._layers[self._position[name]]

    # The session ----------------------------------------------------------------------------------

    @tf.autograph.experimental.do_not_convert
    def start(self, process_set: hvd.ProcessSet, op: int = hvd.Average) -> None:
        """Makes the session, if there is none yet; on all ranks, which all trace the same.

        Args:
            process_set: the ranks that exchange gradients.
            op: with which Horovod reduces them.

        Raises:
            DLSError: see ``BaseBinding.agree``.
        """
        self.process_set, self._op = process_set, op
        if not self.agreed:
            if is_elastic():
                refuse_horovods_run()
            with tf.init_scope():  # arrays made on a device must not become part of a graph
                self._agree()

    def _agree(self) -> None:
        process_set = self.process_set
        whole = process_set.process_set_id == 0
        if is_elastic() and not whole:
            raise DLSError(
                "a process set in an elastic job: Horovod does not form process sets anew when "
                "workers come and go; leave process_set out"
            )
        world = World(
            rank=hvd.rank() if whole else process_set.rank(),
            size=hvd.size() if whole else process_set.size(),
            local_size=hvd.local_size(),
            set_id=process_set.process_set_id,
            global_rank=hvd.rank(),
            local_rank=hvd.local_rank(),
            averages=self._op == hvd.Average,
        )
        if world.size == 1 and self.left_out_alone:
            single_process.refuse_options(self.config)
        self.abandon()  # Horovod was shut down: nobody waits any more
        self.agree(world)

    @property
    def _planned_for(self) -> int | None:
        """See ``BaseBinding``: a traced function outlives a change in the number of ranks.

        What it sends, and in how many operations, must suit those that ranks trace that come later.
        So in an elastic job the same layers are compressed, with whatever number of ranks.
        """
        return 2 if is_elastic() else None

    def go_back(self, session: Session | None) -> None:
        """See ``BaseBinding``; traced functions go on with the names of their operations."""
        label = self._label
        super().go_back(session)
        self._label = label
        self._run_of.clear()
        self.deferred.begin_step()

    def agree_anew(self) -> None:
        """Compares with the other ranks if ``hvd.init()`` was called since that was done last."""
        with self.lock:
            if not self.agreed:
                self._agree()

    def begin_step(self) -> int:
        """Prepares for the first gradient of a step, which may still be some way off.

        The ranks have to agree: see ``agree_anew``.

        Returns:
            A number of this run of the traced call, for ``enter``.
        """
        with self.lock:
            session = self.session
            assert session is not None
            self.deferred.begin_step()
            self._follow_loss_scale(session)
            session.marks_skipped |= self.marks_skipped
            self._runs += 1
            return self._runs

    def enter(self, layers: Collection[str], arriving: Collection[str], run: int) -> None:
        """To be called before gradients come in, with the lock held.

        If a layer of the call is in a step already, since another run, an error ended that step
        before its end, and it is abandoned.

        Args:
            layers: of the traced call.
            arriving: those of them that come in now.
            run: see ``begin_step``.
        """
        session = self.session
        assert session is not None
        if any(session.has(name) and self._run_of.get(name) != run for name in layers):
            session.abandon()
        self._run_of.update(dict.fromkeys(arriving, run))

    @property
    def skipped_value(self) -> float:
        """What replaces each entry of a gradient whose step is skipped.

        A graph is traced before its first step, in which the session is told.
        """
        marks = self.marks_skipped or self.loss_scale is not None
        return np.inf if marks or (self.session and self.session.marks_skipped) else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Returns the session's state: NumPy arrays and plain values only."""
        state = super().state_dict()
        if self.session is None:
            return state
        for part in ARRAYS:
            arrays = state.get(part, {})
            for name in arrays.keys() & self.devices.keys():
                arrays[name] = self.devices[name].to_host(arrays[name])
        return state

    def _gather(self, name: str, array: np.ndarray) -> np.ndarray:
        with tf.device("CPU:0"):
            if not tf.executing_eagerly():
                raise DLSError("DLSCompressor needs TensorFlow 2's eager mode to be on")
            gathered = hvd.allgather(tf.constant(array), name=name, process_set=self.process_set)
            return np.asarray(gathered)

    def _norms(self) -> dict[str, float]:
        return {
            layer.name: float(np.linalg.norm(np.asarray(reference(), np.float64)))
            for layer, reference in zip(self._layers, self._references, strict=True)
        }

    # Operations of a graph ------------------------------------------------------------------------

    def operation_name(self, suffix: str | int) -> str:
        """Returns a name for a Horovod operation: the same on every rank, and this model's own."""
        return f"{self._label}.{suffix}"

    @property
    def stages(self) -> Stages:
        """The operations of its buckets."""
        return Stages(self._label, self.process_set, self.host_sets)

    def scale_name(self, name: str) -> str:
        """Returns the name of the operation whose result scales a compressed layer's gradient."""
        return self.operation_name(f"{self._position[name]}.scale")

    def executor_of(self, name: str | None) -> Executor:
        """Returns where a layer's functions run; the host for None and for what is no layer."""
        backend = self.devices.get(name or "")
        return HOST if backend is None else DeviceExecutor(backend)

    def exchanged_dtype(self, name: str, gradient: tf.DType) -> tf.DType:
        """Returns the type a gradient is exchanged in: its own, if it can be added to a residual.

        Args:
            name: of the layer.
            gradient: type of its gradient.
        """
        work = tf.as_dtype(self.layer(name).work_dtype)
        return gradient if gradient.size == 2 and work == tf.float32 else work

    @property
    def _wants_device(self) -> bool:
        variables = (reference() for reference in self._references)
        return any(v is not None and stays_on_device(v) for v in variables)

    def _backends(self, config: DLSConfig) -> Mapping[str, Backend]:
        # These strategies look at whole residuals, on the host; hosts and owners add up there.
        on_host = config.strategy in BASELINES or config.hierarchical
        if not on_host and config.exchange == ALLGATHER:
            for layer, reference in zip(self._layers, self._references, strict=True):
                variable = reference()
                if variable is None or layer.size >= TOO_LARGE:
                    continue
                if stays_on_device(variable):
                    self.devices[layer.name] = Device(handle_of(variable).device)
        return self.devices
