"""How many launches a step takes, and how much of the host's time: also without a GPU.

Launches and operations are the same on a CPU and on a GPU, as no shape depends on the device; only
how long they take differs.  So that the kernels run on a CPU, Triton has to interpret them, and
they are given larger blocks there.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common.shapes import MODELS
from benchmarks.gpu.model import Gradients, Model
from benchmarks.gpu.passes import KERNELS, OPERATIONS, Ways, on_device
from benchmarks.gpu.stepping import RANKS, models

DENSITY = 1e-3
COMPRESSED, DENSE, REST, SETTLED = "compressed", "dense", "packed", "settled"
PARTS = (COMPRESSED, DENSE, REST, SETTLED)
BEFORE = "fused kernels, and dense layers told of one by one"
KERNEL, OPERATION, COPY = KINDS = "kernels", "operations", "copies"
AGAIN = "again"  # layers of which kernels had not found enough, or too much, with all that it takes

# Operations that are nothing for a device, beside views.
_NOTHING = ("aten.empty", "aten.promote_types")
_STEPS = 3  # the first has no thresholds; of the others the last is told
_BLOCK = 1 << 18  # entries of a program that is interpreted


def rows_of(
    device: torch.device, ways: Ways, quick: bool, keep: Callable[[dict[str, Any]], None]
) -> None:
    """Counts for all models and ways.

    Args:
        device: where.
        ways: in which this package makes the passes.
        quick: small models.
        keep: is given each row of figures.
    """
    with _large_blocks(device, KERNELS in ways.makers):
        for name in models(quick):
            shapes = MODELS[name]()
            gradients = Gradients(shapes, device)
            makers = {method: (make, False) for method, make in ways.makers.items()}
            if KERNELS in ways.makers:
                makers = {BEFORE: (ways.makers[KERNELS], True), **makers}
            for method, (make, one_by_one) in makers.items():
                model = Model(shapes, gradients, DENSITY, make, RANKS, one_by_one)
                keep(
                    {
                        "model": name,
                        "method": method,
                        "density": DENSITY,
                        "layers": len(shapes),
                        "compressed": len(model.session.residuals),
                        "buckets": len(model.session.routing.buckets),
                        **counted(model, again=method != OPERATIONS),
                        "checksum": model.checksum(),
                    }
                )


def counted(model: Model, again: bool) -> dict[str, Any]:
    """Counts in the last of some steps.

    Args:
        model: that makes them.
        again: whether torch's operations only search what kernels have searched before, which is
            counted apart: it is rare, but for the first steps.

    Returns:
        For each part of it kernels, operations and copies; and the host's time in milliseconds
        that was not spent in these.
    """
    for _ in range(_STEPS):
        model.draw()
        with Watch(again) as watch:
            _step(model, watch)
    return {"counts": watch.counts, "host_ms": watch.host_ms}


def _step(model: Model, watch: Watch) -> None:
    model.begin()
    for name in model.order:
        with watch.part(COMPRESSED if model.session.is_sparse(name) else DENSE):
            model.come_in(name)
            model.session.ready()  # which has what was put off launched
        with watch.part(REST):
            model.pack_ready()
    with watch.part(REST):
        model.receive(model.payloads())
    with watch.part(SETTLED):
        model.decompress()


class Watch(TorchDispatchMode):
    """Counts, while it is entered, what the host gives a device to do.

    Views and new memory are nothing for a device.

    Args:
        again: see ``counted``.

    Attributes:
        counts: by part of the step, how many "kernels", "operations" and "copies", and how many
            layers were searched "again".
        host_ms: by part, milliseconds outside of these.
    """

    def __init__(self, again: bool) -> None:
        super().__init__()
        self._again = again
        self.counts: dict[str, Counter[str]] = {part: Counter() for part in PARTS}
        self.host_ms = dict.fromkeys(PARTS, 0.0)
        self._part, self._within, self._depth = REST, 0.0, 0
        self._stack = ExitStack()

    def __enter__(self) -> Watch:
        self._stack.enter_context(mock.patch.object(torch.Tensor, "to", self._counted_copies()))
        for kernel in _kernels():
            run = self._timed(kernel.run, KERNEL)
            self._stack.enter_context(mock.patch.object(kernel, "run", run))
        if self._again:
            device = on_device().Device
            search = self._timed(device._find, AGAIN)
            self._stack.enter_context(mock.patch.object(device, "_find", search))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Has what happens within count for a part of the step."""
        self._part, self._within, start = name, 0.0, time.perf_counter()
        yield
        self.host_ms[name] += 1e3 * (time.perf_counter() - start - self._within)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        begun = time.perf_counter()
        try:
            return func(*args, **(kwargs or {}))
        finally:
            if not self._depth:
                self._within += time.perf_counter() - begun
                if not (func.is_view or str(func).startswith(_NOTHING)):
                    self.counts[self._part][OPERATION] += 1

    def _timed(self, run: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._depth:  # by the one who interprets a kernel
                return run(*args, **kwargs)
            self.counts[self._part][kind] += 1
            begun = time.perf_counter()
            self._depth += 1
            try:
                return run(*args, **kwargs)
            finally:
                self._depth -= 1
                self._within += time.perf_counter() - begun

        return timed

    def _counted_copies(self) -> Callable[..., Any]:
        """``Tensor.to``: between host and device, this package only copies without waiting."""
        to, timed = torch.Tensor.to, self._timed(torch.Tensor.to, COPY)

        def counted_to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return (timed if kwargs.get("non_blocking") else to)(tensor, *args, **kwargs)

        return counted_to


def _kernels() -> list[Any]:
    """All kernels of the package, if Triton is there."""
    try:
        from hvd_dls.torch.kernels import finding, settling, settling_all
    except ImportError:
        return []
    return [
        *(finding.find, finding.find_all, settling.begins, settling.settle),
        *(settling_all.begins_all, settling_all.settle_all),
    ]


@contextmanager
def _large_blocks(device: torch.device, interpreted: bool) -> Iterator[None]:
    """Has interpreted kernels, which take as long for a small block, work on large ones."""
    with ExitStack() as stack:
        if interpreted and device.type == "cpu":
            from hvd_dls.torch.kernels import finding_all, selector, settling, settling_all

            modules = (selector, finding_all, settling, settling_all)
            for module, name in itertools.product(modules, ("BLOCK", "TILE", "LANES")):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, _BLOCK))
        yield


def total(row: dict[str, Any]) -> int:
    """How many of these kinds a step takes."""
    return sum(counts.get(kind, 0) for counts in row["counts"].values() for kind in KINDS)


def again(row: dict[str, Any]) -> int:
    """How many layers were searched again in a step."""
    return sum(counts.get(AGAIN, 0) for counts in row["counts"].values())
