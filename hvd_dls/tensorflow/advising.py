"""``advise`` for ``horovod.tensorflow``: steps of a model with each compression, in turn."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

from hvd_dls.advice.advice import Advice
from hvd_dls.advice.candidates import Candidate
from hvd_dls.advice.lab import Lab, Subject, Trial
from hvd_dls.advice.plan import Plan, plan_of
from hvd_dls.advice.trying import find_out
from hvd_dls.core.session.stats import Stats
from hvd_dls.core.wire.agreement import Facts
from hvd_dls.errors import DLSError
from hvd_dls.tensorflow.compressor import DLSCompressor

Step = Callable[[Any], tf.Tensor]
MakeOptimizer = Callable[[], Any]


def advise(
    model: Any,
    step: Step,
    *,
    optimizer: MakeOptimizer | None = None,
    quiet: bool = False,
    **options: Any,
) -> Advice:
    """Tries dense, fp16 and DLS in this job, and says which to take; to be called on all ranks.

    Takes a minute or so, and memory: each DLS candidate remembers as much as the gradients take.
    Weights are afterwards as they were.

    Args:
        model: that is built; what is trained are its ``trainable_variables``.
        step: takes the model and returns its loss for a batch; becomes part of a ``tf.function``,
            so it is called a few times only.
        optimizer: makes an optimizer, so that the time of its update counts, too; None: there is
            no update.
        quiet: say nothing meanwhile.
        **options: see ``hvd_dls.advice.plan.Plan``.

    Returns:
        The advice: ``print`` it; ``.recommended.code`` is what to write.

    Raises:
        RanksDisagreeError: models or options differ between ranks; on all of them alike.
        DLSError: an option is not accepted, there is one rank only, or the first step failed on
            some rank; on all of them alike.
    """
    before = [np.asarray(variable) for variable in model.trainable_variables]

    def prepare() -> tuple[Plan, Subject]:
        return plan_of(options), subject_of(model, step, optimizer)

    def say(text: str) -> None:
        if not quiet:
            print(f"hvd-dls advise: {text}", file=sys.stderr, flush=True)

    try:
        return find_out(make_lab(), prepare, say)
    finally:
        for variable, value in zip(model.trainable_variables, before, strict=True):
            variable.assign(value)


def make_lab() -> Lab:
    """This process among all of the job; after ``hvd.init()``."""
    return TensorFlowLab()


def subject_of(model: Any, step: Step, optimizer: MakeOptimizer | None = None) -> Subject:
    """A model to try; see ``advise``."""
    return TensorFlowSubject(model, step, optimizer)


def subject_of_shapes(shapes: Sequence[Sequence[int]], seconds: float, busy: bool) -> Subject:
    """A model of which only shapes are known, with noise as gradients.

    Args:
        shapes: of the variables.
        seconds: that forward and backward take together; here all of it before backward.
        busy: whether a processor is busy meanwhile.
    """
    return TensorFlowSubject(_ShapesOnly(shapes, seconds, busy), lambda model: model())


class _ShapesOnly:
    def __init__(self, shapes: Sequence[Sequence[int]], seconds: float, busy: bool) -> None:
        self.trainable_variables = [
            tf.Variable(tf.zeros(shape), name=f"variable_{position}")
            for position, shape in enumerate(shapes)
        ]
        self._seconds, self._busy = seconds, busy

    def __call__(self) -> tf.Tensor:
        waited = tf.py_function(self._compute, [], tf.float32)
        with tf.control_dependencies([waited]):
            products = [v * tf.random.normal(v.shape) for v in self.trainable_variables]
        return tf.add_n([tf.reduce_sum(product) for product in products])

    def _compute(self) -> float:
        end = time.perf_counter() + self._seconds
        if not self._busy:
            time.sleep(self._seconds)
        while time.perf_counter() < end:
            pass
        return 0.0


class TensorFlowLab(Lab):
    """This process among all of the job."""

    def __init__(self) -> None:
        self.rank, self.size = hvd.rank(), hvd.size()
        self.local_size, self.cross_size = hvd.local_size(), hvd.cross_size()

    def gather(self, name: str, array: np.ndarray) -> np.ndarray:
        with tf.device("CPU:0"):
            return np.asarray(hvd.allgather(tf.constant(array), name=name))

    def operate(self, operation: str, length: int) -> None:
        name = f"hvd_dls.advise.{operation.replace(' ', '.')}.{length}"
        with tf.device("CPU:0"):
            if operation == "allgather":
                np.asarray(hvd.allgather(tf.zeros(length, tf.uint8), name=name))
                return
            dtype = tf.float16 if operation.endswith("float16") else tf.float32
            np.asarray(hvd.allreduce(tf.zeros(length // dtype.size, dtype), name=name, op=hvd.Sum))


class TensorFlowSubject(Subject):
    """A model and what makes its loss.

    Args:
        model, step, optimizer: see ``advise``.

    Raises:
        DLSError: the model has nothing to train.
    """

    def __init__(self, model: Any, step: Step, optimizer: MakeOptimizer | None = None) -> None:
        self._model, self._step, self._make_optimizer = model, step, optimizer
        self._variables = list(model.trainable_variables)
        if not self._variables:
            raise DLSError("the model has no variable that is trained: is it built?")

    def facts(self) -> Facts:
        facts: Facts = [("number of trained variables", len(self._variables))]
        return facts + [
            (f"variable {position}", f"{_name(v)!r} of shape {tuple(v.shape)}, {_dtype(v).name}")
            for position, v in enumerate(self._variables)
        ]

    def gradients(self) -> list[tuple[int, int]]:
        return [(int(np.prod(v.shape)), _dtype(v).size) for v in self._variables]

    def trial(self, candidate: Candidate) -> TensorFlowTrial:
        optimizer = self._make_optimizer() if self._make_optimizer else None
        return TensorFlowTrial(candidate, self._model, self._step, self._variables, optimizer)


class TensorFlowTrial(Trial):
    """Steps of the model, as one ``tf.function``.

    Args:
        candidate: how gradients are exchanged.
        model, step: of the subject.
        variables: that are trained.
        optimizer: None if there is no update.
    """

    def __init__(
        self, candidate: Candidate, model: Any, step: Step, variables: list[Any], optimizer: Any
    ) -> None:
        self._compression: DLSCompressor | None = None
        compression: Any = hvd.Compression.fp16 if candidate.method == "fp16" else None
        if candidate.method == "dls":
            compression = self._compression = DLSCompressor(**candidate.options)
            compression.is_trial = True
        if hasattr(optimizer, "build"):
            optimizer.build(variables)  # a tf.function may make no variables later

        def one_step() -> tf.Tensor:
            with tf.GradientTape() as tape:
                loss = step(model)
            if not tf.is_tensor(loss):
                raise DLSError(f"step(model) returned {type(loss).__name__}: accepted is the loss")
            if candidate.method != "alone":
                tape = hvd.DistributedGradientTape(
                    tape, compression=compression or hvd.Compression.none
                )
            gradients = tape.gradient(loss, variables)
            if optimizer is not None:
                optimizer.apply_gradients(zip(gradients, variables, strict=True))
                return loss
            return first_entries([loss, *gradients])

        self._one_step = tf.function(one_step, autograph=False)
        self._last: Any = None

    def step(self) -> None:
        self._last = self._one_step()

    def wait(self) -> None:
        if self._last is not None:
            np.asarray(self._last)

    def rest(self) -> None:
        self._last = None

    def stats(self, window: int) -> Stats | None:
        if self._compression is None:
            return None
        stats: Stats | None = self._compression.stats(window)
        return stats


def first_entries(tensors: Sequence[Any]) -> tf.Tensor:
    """(T,) or fewer: the first entry of each tensor, which has an operation read all of them.

    In a graph Horovod reduces in the branch of a condition.  If only control edges lead to what
    comes of it, TensorFlow makes the condition and leaves the reduction out.

    Args:
        tensors: dense ones, ``IndexedSlices``, and None, which is left out.
    """
    values = [getattr(each, "values", each) for each in tensors if each is not None]
    return tf.concat([tf.cast(tf.reshape(v, [-1])[:1], tf.float32) for v in values], axis=0)


def _name(variable: Any) -> str:
    return str(getattr(variable, "path", variable.name))


def _dtype(variable: Any) -> tf.DType:
    return tf.as_dtype(variable.dtype)
