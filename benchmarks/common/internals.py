"""What benchmarks use of hvd_dls beyond its public interface.

It is imported here only, so that a change in the core needs to be followed in this file alone.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from benchmarks.common.shapes import Shapes
from hvd_dls.config import DLSConfig
from hvd_dls.core.balancing.controller import Controller
from hvd_dls.core.balancing.layers import LayerSpec, layer_spec
from hvd_dls.core.balancing.sketch import WINDOW, Sketch
from hvd_dls.core.jit import HAVE_NUMBA
from hvd_dls.core.selection import threads
from hvd_dls.core.selection.passes import Found, find, settle, sum_up
from hvd_dls.core.session import averaging, ending, gathering, owning, settling, stopwatch
from hvd_dls.core.session.groups import Groups
from hvd_dls.core.session.planning import make_plan
from hvd_dls.core.session.session import Session
from hvd_dls.core.session.stopwatch import Stopwatch
from hvd_dls.core.session.tally import Tally
from hvd_dls.core.wire import elias_fano
from hvd_dls.core.wire.buckets import make_buckets
from hvd_dls.core.wire.layout import Bucket, payload_bytes
from hvd_dls.core.wire.pack import pack
from hvd_dls.core.wire.payload import Payloads
from hvd_dls.core.wire.unpack import unpack

__all__ = [
    "HAVE_NUMBA",
    "WINDOW",
    "Bucket",
    "Controller",
    "Found",
    "Groups",
    "LayerSpec",
    "Payloads",
    "Session",
    "Sketch",
    "StepSize",
    "Stopwatch",
    "Tally",
    "clocked_modules",
    "elias_fano",
    "find",
    "layer_spec",
    "pack",
    "payload_bytes",
    "settle",
    "step_size",
    "sum_up",
    "threads",
    "unpack",
]


class StepSize(NamedTuple):
    """What a rank sends in a step, by the plan alone.

    Attributes:
        entries: of all compressed layers.
        payload_bytes: of all buckets, with headers and sketches.
        dense_bytes: of the layers that go dense.
    """

    entries: int
    payload_bytes: int
    dense_bytes: int


def step_size(shapes: Shapes, config: DLSConfig, ranks: int) -> StepSize:
    """Computes what a rank sends in a step, if each layer has the same density.

    Args:
        shapes: of the model's parameters.
        config: the compressor's options.
        ranks: number of ranks.
    """
    layers = [layer_spec(name, shape) for name, shape in shapes.items()]
    plan = make_plan(layers, config, ranks)
    entries = plan.budget(config.density)
    buckets = make_buckets(plan.layers, plan.sparse, config)
    shares = (round(entries * bucket.size / plan.sizes.sum()) for bucket in buckets)
    payloads = sum(payload_bytes(b, share) for b, share in zip(buckets, shares, strict=True))
    return StepSize(entries, payloads, plan.dense_bytes)


def clocked_modules() -> list[ModuleType]:
    """Returns the modules that look at the clock, each by its own ``perf_counter``."""
    return [averaging, ending, gathering, owning, settling, stopwatch]
