"""The same rounds with TensorFlow: steps of a tape in a ``tf.function``, as ``__main__`` for torch.

What is measured is again what is left of a step when gradients cost nothing: they are drawn before
the clock starts, and the tape hands them out. ``hvd.DistributedGradientTape`` does the rest.
"""

from __future__ import annotations

import argparse
import itertools
import os
from pathlib import Path
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

from benchmarks.common.command_line import make_parser
from benchmarks.common.internals import HAVE_NUMBA
from benchmarks.common.method import Method
from benchmarks.common.noise import make_noise
from benchmarks.common.reporting import write_json
from benchmarks.common.shapes import MODELS, Shapes, entries
from benchmarks.rounds.options import add_options
from benchmarks.rounds.turns import Rounds, read_clocks
from hvd_dls.tensorflow import DLSCompressor
from hvd_dls.tensorflow.advising import first_entries

POOL = 1 << 22  # entries of noise that are drawn in advance


class Gradients:
    """Noise, fresh in each step, each layer's with a scale of its own.

    Args:
        shapes: of the variables.
        tail: of the noise, see ``make_noise``.
        seed: of the noise; each rank needs another.
        spread: layers' scales are log-uniform between 1 / spread and 1, the same on every rank.

    Attributes:
        variables: that hold the gradients, in the order of ``shapes``.
    """

    def __init__(self, shapes: Shapes, tail: str, seed: int, spread: float = 100.0) -> None:
        self._offsets = np.random.default_rng(seed)
        self._pool = make_noise(tail, POOL, np.random.default_rng((seed, 1)))
        self._scales = np.exp(np.random.default_rng(0).uniform(-np.log(spread), 0, len(shapes)))
        self.variables = [
            tf.Variable(tf.zeros(shape), trainable=False) for shape in shapes.values()
        ]

    def draw_all(self) -> None:
        """Draws all layers' gradients anew."""
        half = len(self._pool) // 2
        for variable, scale in zip(self.variables, self._scales, strict=True):
            noise = np.empty(int(np.prod(variable.shape)), np.float32)
            for start in range(0, len(noise), half):
                part = noise[start : start + half]
                offset = int(self._offsets.integers(len(self._pool) - len(part) + 1))
                np.multiply(self._pool[offset : offset + len(part)], np.float32(scale), out=part)
            variable.assign(noise.reshape(variable.shape))


class RunningTape:
    """A method with variables and a compressor of its own, in one ``tf.function``.

    Args:
        method: which one: "nothing", "dense", "fp16" or a sparse one.
        shapes: of the variables.
        gradients: of these shapes.
        bucket_bytes: option of the compressor; None: its default.
    """

    first_steps = 2  # the first one traces

    def __init__(
        self, method: Method, shapes: Shapes, gradients: Gradients, bucket_bytes: int | None
    ) -> None:
        self.method, self._gradients = method, gradients
        self._variables = [
            tf.Variable(tf.zeros(shape), name=f"{method.name}/{name}".replace(":", "_"))
            for name, shape in shapes.items()
        ]
        self._entries = entries(shapes)
        self.compression: Any = None
        if method.density is not None:
            options = method.options | ({"bucket_bytes": bucket_bytes} if bucket_bytes else {})
            self.compression = DLSCompressor(**options)
        self.records: list[Any] = []
        self._function = tf.function(self._one_step, autograph=False)

    def _one_step(self) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = tf.add_n(
                [
                    _with_gradient(variable, gradient)
                    for variable, gradient in zip(
                        self._variables, self._gradients.variables, strict=True
                    )
                ]
            )
        if self.method.compression != "nothing":
            plain = getattr(hvd.Compression, self.method.compression, None)
            tape = hvd.DistributedGradientTape(tape, compression=self.compression or plain)
        return first_entries(tape.gradient(loss, self._variables))

    def step(self, interface: str | None = None) -> list[float]:
        """Does one step with new gradients.

        Args:
            interface: not counted here.

        Returns:
            Seconds by each of CLOCKS, and twice 0.
        """
        self._gradients.draw_all()
        gather([[0.0]], "wait for all")
        start = read_clocks()
        self._function().numpy()
        taken = [*(read_clocks() - start), 0.0, 0.0]
        gather([[0.0]], "wait for all")
        if self.compression is not None:
            self.records.append(self.compression.last_step())
        return taken

    def forget_records(self) -> None:
        """Forgets the steps so far."""
        self.records.clear()

    def figures(self) -> dict[str, Any]:
        """Bytes that a rank hands over in a step, and entries, as ``benchmarks.rounds`` has them;
        without placeholders."""
        plain = {"none": 4.0, "fp16": 2.0}.get(self.method.compression, 0.0) * self._entries
        handed_over = {"allgather": 0.0, "allreduce": plain, "entries": 0.0}
        unchanged = None
        if self.records:
            handed_over = {
                "allgather": float(np.mean([r.sparse_bytes for r in self.records])),
                "allreduce": float(np.mean([r.dense_bytes for r in self.records])),
                "entries": float(np.mean([r.k.sum() for r in self.records])),
            }
            pairs = list(itertools.pairwise(r.sparse_bytes for r in self.records))
            unchanged = sum(a == b for a, b in pairs) / len(pairs) if pairs else None
        ranks = hvd.size()
        ring = 2 * (ranks - 1) / ranks * handed_over["allreduce"]
        return {
            "handed_over": handed_over,
            "claimed_wire_bytes": (ranks - 1) * handed_over["allgather"] + ring,
            "unchanged_lengths": unchanged,
            "spread": self.records[-1].threshold_spread() if self.records else None,
            "profile_ms": None,
        }


def _with_gradient(variable: tf.Variable, gradient: tf.Variable) -> tf.Tensor:
    """Zero, whose gradient with respect to the first variable is what the second one holds."""

    @tf.custom_gradient
    def zero(value: tf.Tensor) -> tuple[tf.Tensor, Any]:
        return tf.zeros([]), lambda upstream: tf.identity(gradient.read_value())

    return zero(variable)


def gather(numbers: Any, name: str) -> np.ndarray:
    """Returns (ranks, ...) numbers of all ranks, as ``benchmarks.rounds.measuring.gather``."""
    mine = tf.constant(np.array(numbers, np.float64)[None])
    return np.asarray(hvd.allgather(mine, name=f"gathered.{name}"))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs warm-ups and rounds of all methods; returns all figures."""
    shapes = MODELS[args.model]()
    gradients = Gradients(shapes, args.tail, seed=hvd.rank())
    running = [
        RunningTape(Method.parse(text), shapes, gradients, args.bucket_bytes)
        for text in args.methods
    ]
    turns = Rounds(running, args, gather, rank=hvd.rank()).take_turns()
    return {
        "model": args.model,
        "entries": entries(shapes),
        "tensors": len(shapes),
        "ranks": hvd.size(),
        "hosts": hvd.cross_size(),
        "about": {
            "numba": HAVE_NUMBA,
            "tensorflow": tf.__version__,
            "threads": args.threads,
            "cores": os.cpu_count(),
        },
        "methods": {
            each.method.name: {"turns": turns[each.method.name], **each.figures()}
            for each in running
        },
    }


def main() -> None:
    """Runs the job; rank 0 writes the figures."""
    parser = make_parser("rounds.tensorflow", __doc__)
    add_options(parser, model="tiny")
    parser.add_argument("--methods", nargs="+", required=True, help="as in dls:0.01:bfloat16")
    parser.add_argument("--threads", type=int, default=1, help="of TensorFlow's operations")
    parser.add_argument("--json", type=Path, required=True, help="where to write all figures")
    args = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(args.threads)
    hvd.init()
    result = run(args)
    if hvd.rank() == 0:
        write_json(result, args.json, indent=None)
    hvd.shutdown()


if __name__ == "__main__":
    main()
