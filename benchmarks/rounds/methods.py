"""Methods to exchange gradients with Horovod, and one step of each."""

from __future__ import annotations

import itertools
from typing import Any

import horovod.torch as hvd
import numpy as np

from benchmarks.common.internals import received_from_ranks
from benchmarks.common.method import HOSTS_AND_OWNERS, OWNERS, Method
from benchmarks.common.shapes import Shapes
from benchmarks.common.synthetic_model import (
    Gradients,
    NoUpdate,
    SyntheticModel,
    make_compression,
)
from benchmarks.rounds.measuring import gather, interface_bytes, wait_for_all
from benchmarks.rounds.turns import read_clocks
from hvd_dls.torch import DLSCompressor


class RunningMethod:
    """A method with its own model, optimizer and compressor; all methods share their gradients.

    Args:
        method: which one.
        shapes: of the parameters.
        gradients: of these shapes.
        bucket_bytes: option of the compressor; None: its default.

    Attributes:
        method: which one.
        compression: what Horovod's optimizer has been given; None for "nothing".
        optimizer: what steps; Horovod's, but for "nothing".
        records: what the compressor sent in each step; empty if it is not ours.
        received: with owners, (P,) payload bytes that each rank received in each of these steps,
            or where hosts average first, each host.
        first_steps: that are unlike all others.
    """

    first_steps = 1

    def __init__(
        self,
        method: Method,
        shapes: Shapes,
        gradients: Gradients,
        bucket_bytes: int | None,
    ) -> None:
        self.method, self._gradients = method, gradients
        # Names of its own, so that Horovod's response cache knows each method's tensors.
        named = {f"{method.name}/{name}": shape for name, shape in shapes.items()}
        self._model: Any = SyntheticModel(named, gradients.last_drawn, stand_in=True)
        self._parameters = [p for _, p in self._model.named_parameters()]
        self.optimizer: Any = NoUpdate(self._parameters)
        self.compression: Any = None
        self.records: list[dict[str, float]] = []
        self.received: list[np.ndarray] = []
        if method.compression != "nothing":
            self._set_up(bucket_bytes)

    def _set_up(self, bucket_bytes: int | None) -> None:
        """Puts what exchanges gradients around the optimizer, or the model."""
        self.compression = self._wrap_optimizer(bucket_bytes)

    def _wrap_optimizer(self, bucket_bytes: int | None) -> Any:
        """Puts Horovod's optimizer around ours; returns its compression."""
        options: dict[str, Any] = {}
        if self.method.density is not None:
            options = {
                "density": self.method.density,
                "values": self.method.values,
                "named_parameters": self._model.named_parameters(),
            }
            options |= {"bucket_bytes": bucket_bytes} if bucket_bytes else {}
        compression = make_compression(self.method.compression, **options)
        self.optimizer = hvd.DistributedOptimizer(
            self.optimizer,
            named_parameters=self._model.named_parameters(),
            compression=compression,
        )
        return compression

    def step(self, interface: str | None = None) -> list[float]:
        """Does one step with new gradients.

        Args:
            interface: whose bytes to count.

        Returns:
            Seconds by each of CLOCKS, and the bytes that the interface received and sent from the
            step's beginning until all ranks were done.
        """
        self._gradients.draw_all()
        for parameter in self._parameters:
            parameter.grad = None
        loss = self._model()
        self._note_received()
        wait_for_all()
        before = interface_bytes(interface)
        start = read_clocks()
        loss.backward()
        self.optimizer.step()
        taken = read_clocks() - start
        wait_for_all()
        counted = interface_bytes(interface) - before
        if isinstance(self.compression, DLSCompressor):
            self._record_step()
        return [*taken, *counted]

    def _note_received(self) -> None:
        """Of the step to come: when it has ended, owners may have moved."""
        if self.method.compression not in (OWNERS, HOSTS_AND_OWNERS):
            return
        session = self.compression.binding_of(self.optimizer).session
        if session is not None:  # or it is the first step
            self.received.append(received_from_ranks(session))

    def forget_records(self) -> None:
        """Forgets the steps so far."""
        self.records.clear()
        self.received.clear()

    def _record_step(self) -> None:
        record = self.compression.last_step()
        self.records.append(
            {
                "sparse_bytes": record.sparse_bytes,
                "dense_bytes": record.dense_bytes,
                "entries": int(record.k.sum()),
                "spread": record.threshold_spread(),
            }
        )

    def handed_over(self) -> dict[str, float]:
        """Returns the bytes a rank hands to allgather and allreduce in a step, and the entries."""
        whole = 4.0 * sum(p.numel() for p in self._parameters)
        plain = {"nothing": 0.0, "none": whole, "fp16": whole / 2}
        if self.method.compression in plain:
            return {"allgather": 0.0, "allreduce": plain[self.method.compression], "entries": 0.0}
        mean = {key: np.mean([r[key] for r in self.records]) for key in self.records[0]}
        # What is sparse has a placeholder to reduce, a float64.
        placeholders = 8.0 * len(self.compression.last_step().names)
        return {
            "allgather": float(mean["sparse_bytes"]),
            "allreduce": float(mean["dense_bytes"]) + placeholders,
            "entries": float(mean["entries"]),
        }

    def unchanged_lengths(self) -> float | None:
        """Returns the share of steps with payloads as long as in the step before."""
        lengths = [r["sparse_bytes"] for r in self.records]
        pairs = list(itertools.pairwise(lengths))
        return sum(a == b for a, b in pairs) / len(pairs) if pairs else None

    def link_bytes(self) -> float:
        """Returns the bytes a host's link carries each way in a step, without any headers.

        By ring algorithms, ranks numbered host by host; with one rank a host, what a rank sends.
        Where owners add up, what the busiest rank or host receives: of its own regions from the
        others, and of theirs, what they hand out.  To be called on all ranks.
        """
        handed_over, ranks, hosts = self.handed_over(), hvd.size(), hvd.cross_size()
        gathered = handed_over["allgather"] * (ranks - 1)
        if self.method.compression == "hierarchical":
            # One rank of each host sends a bucket, to those of the other hosts.
            name = f"handed over.{self.method.name}"
            gathered = gather([handed_over["allgather"]], name).sum() * (hosts - 1) / hosts
        if self.received:
            gathered = float(np.mean(self.received, axis=0).max())
        return float(gathered + handed_over["allreduce"] * 2 * (ranks - 1) / ranks)
