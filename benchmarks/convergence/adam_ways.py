"""Ways to train sparsely with Adam: where each moment is kept, and what a worker divides by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.convergence.preconditioning import Moments

BETAS = (0.9, 0.999)


class Way(NamedTuple):
    """A way to train.

    Attributes:
        title: its name in the table.
        options: of the compressor, without the density; None: dense.
        moments: how updates are made in front of the selection; None: Adam is behind it.
        rate: factor on the learning rate.
        rate_when: a waiting update has the learning rate of when it "arrives" (it waits without
            one), or of when it "leaves" the worker.
        kept: share of what waits that is still there in the next step; 1: all.
        warmup: share of the steps in which the density falls from 25 % to 1 %, longer for a lower
            one; with "frozen", in which whole gradients are sent.
        sign: whether only the sign of what arrives counts (DeMo, arXiv:2411.19870).
        first: β₁ of Adam behind the compressor, where that is.
        amsgrad: whether that one is AMSGrad (COMP-AMS, arXiv:2205.05632).
    """

    title: str
    options: dict[str, Any] | None = {}  # noqa: RUF012 (never changed)
    moments: Moments | None = None
    rate: float = 1.0
    rate_when: str = "arrives"
    kept: float = 1.0
    warmup: float = 0.1
    sign: bool = False
    first: float = BETAS[0]
    amsgrad: bool = False


def _in_front(momentum: float, nesterov: bool = False) -> dict[str, Any]:
    """Options that keep the first moment in the compressor."""
    options = {"momentum": momentum, "momentum_masking": False}
    return options | ({"nesterov": True} if nesterov else {})


def _ways() -> Iterator[tuple[str, Way]]:
    """Yields names and ways; in a title, β₁ is 0.9 where nothing is said."""
    for first in (0.9, 0.7, 0.5, 0.0):
        beta = "" if first == 0.9 else f"-{first:g}"
        said = "" if first == 0.9 else f", β₁ = {first:g}"
        yield f"dense{beta}", Way(f"dense{said}", None, first=first)
        if first:
            options = _in_front(first)
            title = f"first moment in front, second behind{said}"
            yield f"momentum{beta}", Way(title, options, first=0.0)
        title = f"both moments behind the compressor{said}"
        yield f"behind{beta}", Way(title, first=first)
        options = {"adam": (first, BETAS[1])}
        title = f"Adam in the compressor, twice the learning rate{said}"
        yield f"adam-double{beta}", Way(title, options, rate=2.0)
        own = Moments("own", first=first)
        title = f"own second moment in front, twice the learning rate{said}"
        yield f"own-double{beta}", Way(title, moments=own, rate=2.0)
        title = f"own second moment in front, scaled to the averaged gradient's{said}"
        yield f"scaled{beta}", Way(title, moments=Moments("scaled", first=first))
        title = f"the averaged gradient's in front, which no worker knows{said}"
        yield f"oracle{beta}", Way(title, moments=Moments("oracle", first=first))
    title = "first moment in front, second behind, half the learning rate"
    yield "momentum-half", Way(title, _in_front(0.9), first=0.0, rate=0.5)
    title = "first moment in front with Nesterov's, second behind"
    for first in (0.9, 0.7):
        said = "" if first == 0.9 else f", β₁ = {first:g}"
        name = "nesterov" if first == 0.9 else f"nesterov-{first:g}"
        yield name, Way(title + said, _in_front(first, nesterov=True), first=0.0)
    yield "amsgrad", Way("AMSGrad behind the compressor", amsgrad=True)
    yield "own", Way("own second moment in front", moments=Moments("own"))
    leaves = Way("own, twice, with the learning rate of when it left", moments=Moments("own"))
    yield "own-double-leaves", leaves._replace(rate=2.0, rate_when="leaves")
    scaled = Way("", moments=Moments("scaled"))
    fades = "scaled, what waits fades by 0.2 % a step"
    yield "scaled-kept", scaled._replace(title=fades, kept=0.998)
    yield "scaled-warmup", scaled._replace(title="scaled, twice the warm-up", warmup=0.2)
    yield "scaled-sign", scaled._replace(title="scaled, sign of what arrives", sign=True)
    yield "shared", Way("shared, refreshed every 100 steps", moments=Moments("shared"))
    yield "frozen", Way("frozen after a dense warm-up", moments=Moments("frozen"))


WAYS = dict(_ways())
