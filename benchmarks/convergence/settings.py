"""The settings that are compared, and which of them each task is trained with.

A new setting is a new line in ``_settings`` or ``_variants``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.convergence.tasks import TASKS
from hvd_dls.config import DLSConfig

MOMENTUM = 0.9
WORKERS = 4
SEEDS = (0, 1, 2)
MORE_SEEDS = (3, 4)  # of the settings in NEAR_NOISE
DENSITIES = (0.01, 0.001)
WARMUP = {0.01: 0.1, 0.001: 0.3}  # share of the steps, by density
STRATEGIES = {
    "dls": "DLS",
    "layerwise": "layer-wise top-k",
    "global": "global top-k",
    "norm": "by the layers' norms",
    "hard": "constant threshold",
}


class Setting(NamedTuple):
    """Options of a training.

    Attributes:
        title: its name in tables.
        options: of the compressor; None: dense.
        section: of the page; decides which tasks it is tried with.
        momentum: where momentum is kept: "optimizer", or "compressor" (then ``options`` get it,
            and the optimizer has none).
        warmup: share of the steps in which the density falls.
        rate: factor on the task's learning rate.
        longer: whether it trains for more steps, as the task says.
        masking: of momentum correction; None: the task's.
        dense_output: whether the task's output layer goes dense.
        adam: whether Adam takes the place of SGD, with the task's rate for it.
    """

    title: str
    options: dict[str, Any] | None
    section: str = "strategies"
    momentum: str = "optimizer"
    warmup: float = 0.0
    rate: float = 1.0
    longer: bool = False
    masking: bool | None = None
    dense_output: bool = False
    adam: bool = False


def _settings() -> Iterator[tuple[str, Setting]]:
    """Yields names and settings: dense, and all strategies at all densities."""
    yield "dense", Setting("dense", None)
    for density, (strategy, title) in itertools.product(DENSITIES, STRATEGIES.items()):
        setting = Setting(title, {"strategy": strategy, "density": density})
        if strategy not in ("norm", "hard"):
            yield f"{strategy}-{density:g}", setting._replace(section="plain")
        elif density != DENSITIES[0]:
            continue
        corrected = setting._replace(momentum="compressor", warmup=WARMUP[density])
        yield f"{strategy}-{density:g}-corrected", corrected
        if strategy == "dls":
            yield f"{strategy}-{density:g}-long", corrected._replace(section="length", longer=True)
    yield "dense-long", Setting("dense", None, "length", longer=True)
    yield from _variants()


def _variants() -> Iterator[tuple[str, Setting]]:
    """Yields names and settings that differ from those of ``_settings`` in one option."""
    for prior in ("paper", "weight_norm", "uniform", "measured"):
        if prior != DLSConfig().prior:  # which is plain DLS
            options = {"density": 0.01, "prior": prior}
            yield f"dls-0.01-{prior}", Setting(f"prior {prior}", options, "priors")
    for option, value, title in (
        ("pair_steps", 1, "DLS(1): one exchange a step"),
        ("pair_steps", 4, "DLS(4): four exchanges a step"),
        ("adjust_every", 4, "one threshold, every fourth step"),
    ):
        options = {"density": 0.01, option: value}
        yield f"dls-0.01-{option}-{value}", Setting(title, options, "adjustment")
    floor = Setting("min_k=16", {"density": 0.001, "min_k": 16}, "floor")
    yield "dls-0.001-min_k-16", floor
    corrected = floor._replace(momentum="compressor", warmup=WARMUP[0.001])
    yield "dls-0.001-corrected-min_k-16", corrected
    for name, title, change in (
        ("kept", "momentum of sent entries kept", {"masking": False}),
        ("cleared", "momentum of sent entries cleared", {"masking": True}),
        ("nesterov", "Nesterov momentum", {"options": {"density": 0.01, "nesterov": True}}),
        ("no", "no warm-up", {"warmup": 0.0}),
    ):
        usual = Setting(title, {"density": 0.01}, "momentum", momentum="compressor", warmup=0.1)
        yield f"dls-0.01-corrected-{name}", usual._replace(**change)
    dense = Setting("dense", None, "adam", adam=True)
    yield "dense-adam", dense
    for strategy in ("dls", "layerwise", "global"):
        options = {"strategy": strategy, "density": 0.01}
        sparse = dense._replace(title=STRATEGIES[strategy], options=options, warmup=WARMUP[0.01])
        yield f"{strategy}-0.01-adam", sparse
        if strategy == "dls":
            title = f"{STRATEGIES[strategy]}, momentum correction"
            corrected = sparse._replace(title=title, momentum="compressor")
            yield f"{strategy}-0.01-adam-corrected", corrected
    for density in DENSITIES:
        options = {"density": density}
        usual = Setting("output layer dense", options, "output", "compressor", WARMUP[density])
        yield f"dls-{density:g}-corrected-output", usual._replace(dense_output=True)
    for strategy in ("dls", "layerwise", "global"):
        options = {"strategy": strategy, "density": 0.001}
        for name, title, change in (
            ("output", "output layer dense", {"dense_output": True}),
            ("quarter", "a quarter of the learning rate", {"rate": 0.25}),
        ):
            yield f"{strategy}-0.001-{name}", Setting(title, options, "lumps")._replace(**change)
    for factor, title in ((0.5, "half the learning rate"), (2.0, "twice the learning rate")):
        yield f"dense-rate-{factor:g}", Setting(f"dense, {title}", None, "rates", rate=factor)


SETTINGS = dict(_settings())
# Tasks that the settings of a section are tried with.
TASKS_OF = {
    "strategies": tuple(TASKS),
    "plain": ("digits", "images", "text"),
    "length": ("text", "code"),
    "priors": ("digits", "text"),
    "adjustment": ("digits", "text"),
    "floor": ("images",),
    "momentum": tuple(TASKS),
    "adam": ("code",),
    "output": ("images", "code"),
    "lumps": ("images",),
    "rates": ("digits", "images"),
}
# Settings that are tried with more workers, too, by task.
MORE_WORKERS = {
    ("digits", name): (8, 16)
    for name in ("dense", "dls-0.01-corrected", "layerwise-0.01-corrected")
} | {("digits", "global-0.01-corrected"): (8,)}

# Settings, by task, whose results differ by little more than those of two seeds do.
NEAR_NOISE = {
    (task, name)
    for task in ("digits", "images", "text")
    for name in (
        "dense",
        *(f"{s}-{d:g}-corrected" for s in ("dls", "layerwise", "global") for d in DENSITIES),
    )
}
