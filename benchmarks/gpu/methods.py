"""Ways to find the k largest entries of residual + gradient, on a device.

The usual ones leave indices and values on the device.  This package's also sorts the indices,
counts entries around the threshold, and copies all that to the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.passes import Make, count_searches

FLOOR, TOPK, SAMPLED = "plain add", "torch.topk of the whole", "sampled threshold"

_STRIDE, _SAMPLE_LEAST = 100, 4096  # every 100th entry, but so many at least


class Layer(NamedTuple):
    """A layer in some step.

    Attributes:
        residual: (n,) float32.
        gradients: (n,) float32 each, for several steps.
        scratch: (n,) float32.
        k: how many entries to find.
    """

    residual: Tensor
    gradients: list[Tensor]
    scratch: Tensor
    k: int

    def gradient(self, step: int) -> Tensor:
        """The gradient of a step."""
        return self.gradients[step % len(self.gradients)]


class Again:
    """How often a method had to search again when its result was asked for.

    Attributes:
        times: so often.
        steps: of so many.
        known: whether this was counted.
    """

    def __init__(self) -> None:
        self.times, self.steps, self.known = 0, 0, False


class Method(NamedTuple):
    """A way to find entries.

    Attributes:
        launch: starts a step, given its number.
        finish: waits for its result, given what ``launch`` returned, and returns it; None: nothing
            but to wait for the device.
        again: counts its searches; None: it has no second ones.
    """

    launch: Callable[[int], Any]
    finish: Callable[[Any], Any] | None = None
    again: Again | None = None


def floor(layer: Layer) -> Method:
    """Adds only, which is the least that any method does."""
    return Method(lambda step: torch.add(layer.residual, layer.gradient(step), out=layer.scratch))


def topk(layer: Layer) -> Method:
    """``torch.topk`` of all magnitudes."""

    def launch(step: int) -> Tensor:
        total = torch.add(layer.residual, layer.gradient(step), out=layer.scratch)
        chosen = total.abs().topk(layer.k, sorted=False).indices
        return total.index_select(0, chosen)

    return Method(launch)


def sampled(layer: Layer) -> Method:
    """A threshold from a sample of 1 %, as Deep Gradient Compression has it (Lin et al. 2018).

    How many entries reach it the host must know, so it waits for the device.
    """
    stride = max(1, min(_STRIDE, len(layer.residual) // _SAMPLE_LEAST))

    def launch(step: int) -> Tensor:
        total = torch.add(layer.residual, layer.gradient(step), out=layer.scratch)
        magnitudes = total.abs()
        sample = magnitudes[::stride]
        wanted = max(1, layer.k * len(sample) // len(magnitudes))
        threshold = sample.topk(wanted, sorted=False).values.min()
        chosen = (magnitudes >= threshold).nonzero().view(-1)
        if len(chosen) > layer.k:
            largest = magnitudes.index_select(0, chosen).topk(layer.k, sorted=False).indices
            chosen = chosen.index_select(0, largest)
        return total.index_select(0, chosen)

    return Method(launch)


def ours(layer: Layer, make: Make) -> Method:
    """This package's ``find``, each step with the threshold of the one before."""
    backend, last, again = make(), [0.0], Again()
    searches = count_searches(backend)
    again.known = searches is not None

    def launch(step: int) -> Any:
        future = backend.find(layer.residual, layer.gradient(step), layer.k, last[0])
        future.ready()  # has it launched, where that is put off until somebody asks
        return future

    def finish(future: Any) -> Any:
        before = searches() if searches else 0
        found = future.result()
        assert found is not None, "noise without NaN and Inf was taken for something else"
        if last[0]:  # the first step has nothing to guess from
            again.steps += 1
            again.times += searches() > before if searches else 0
        last[0] = found.threshold
        return found

    return Method(launch, finish, again)


def is_exact(layer: Layer, method: Method) -> bool:
    """Whether what this package found in a step is what ``torch.topk`` says.

    Which of the entries that tie at the threshold were chosen is left open.
    """
    assert method.finish is not None
    found = method.finish(method.launch(0))
    total = layer.residual + layer.gradient(0)
    smallest = total.abs().topk(layer.k, sorted=False).values.min().item()
    where = torch.from_numpy(found.indices.astype("int64"))
    ascending = bool((where[1:] > where[:-1]).all())
    values = torch.from_numpy(found.values).to(total.device)
    same = bool(torch.equal(total[where.to(total.device)], values))
    return ascending and same and len(where) == layer.k and found.threshold == smallest
