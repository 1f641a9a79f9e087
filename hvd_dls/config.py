"""Every option of DLS, its meaning and its limits, in one place."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from hvd_dls.errors import DLSError

STRATEGIES = ("dls", "layerwise", "global", "norm", "hard")
VALUES = ("float32", "float16", "bfloat16")
PRIORS = ("paper", "weight_norm", "uniform")  # laws: core/balancing/prior.py
MEASURED = "measured"  # no law, but what a dense first step shows
TAILS = ("gaussian", "laplace", "weibull", "pareto")  # shapes: core/balancing/tails.py
INDEX_CODES = ("elias-fano", "plain")
NONFINITE = ("raise", "skip")
ALLGATHER, SPARSE_ALLREDUCE, AUTO = EXCHANGES = ("allgather", "sparse_allreduce", "auto")
DENSE = "dense"  # what ``layer_density`` accepts beside a density


@dataclass(frozen=True)
class DLSConfig:
    """Options of the compressor; the same for every framework, and the same on every rank.

    Raises:
        DLSError: an option has a value it does not accept; the message names both.
    """

    # Often set ---------------------------------------------------------------------------------
    # Share of the compressed layers' entries sent each step, in (0, 1].  Lower = less traffic.
    density: float = 0.01
    # "dls": ratios move until all layers share one threshold.  The others are to compare with:
    # "layerwise", density everywhere; and three by which each rank chooses for itself: "global",
    # exact top-k of the whole model, without overlap with backward; "norm", k in proportion to each
    # layer's norm in the step before; "hard", whatever reaches ``threshold``, however much.
    strategy: str = "dls"
    # Momentum before the selection, instead of the optimizer's, which must then be 0 (momentum
    # correction: DGC, arXiv:1712.01887, 3.2), in [0, 1).
    momentum: float = 0.0
    # Adam before the selection, instead of the optimizer's: its betas, such as (0.5, 0.999).  Each
    # rank makes updates of its own gradients and these wait, so the optimizer must be plain SGD, at
    # Adam's learning rate times the root of the number of ranks; its weight decay is decoupled
    # then.  See docs/adam.md.
    adam: tuple[float, float] | None = None
    # Steps at first that send whole gradients.
    dense_steps: int = 0
    # Steps after these in which the density halves, from ``warmup_density`` down to ``density``.
    warmup_steps: int = 0
    # What becomes of a step in which a gradient holds NaN or Inf on any rank: "raise", every rank
    # raises the same error; "skip", no rank changes its weights.  Both leave residuals alone.
    nonfinite: str = "raise"

    # Where several ranks share a host, and its link: average gradients inside the host first, and
    # have one of its ranks send for all.  Needs process sets: see docs/scale.md.
    hierarchical: bool = False

    # How entries get from rank to rank: "allgather", each rank's to all others; "sparse_allreduce",
    # to owners of parts of the model, who add them up and hand the largest sums out.  What a rank
    # receives then does not grow with the number of ranks.  "auto": the latter from eight ranks (or
    # hierarchical hosts) on, where it can be: see docs/scale.md.
    exchange: str = "allgather"

    # Seldom set --------------------------------------------------------------------------------
    # Layers with a density of their own, or "dense": {pattern of names, as a shell's: density}, the
    # first that matches; outside the budget that the other layers share.
    layer_density: tuple[tuple[str, float | str], ...] = ()
    # Density that the warm-up begins with.
    warmup_density: float = 0.25
    # Nesterov's momentum, as torch.optim.SGD has it.
    nesterov: bool = False
    # Clear the momentum of entries that are sent, so that they do not go on in an old direction
    # (momentum factor masking: DGC 3.3).  Of ``momentum`` only: Adam's moments stay.
    momentum_masking: bool = True
    # What Adam adds to the root that it divides by.
    adam_eps: float = 1e-8
    # Largest L2 norm of each layer's own gradient, before it enters momentum and residual.
    clip_norm: float | None = None
    # Largest magnitude of each entry of it.
    clip_value: float | None = None
    # Largest L2 norm of this rank's own gradient of the whole model, by its layers' usual shares of
    # it (core/selection/usual_shares.py): layers are sent before all of them are there.
    clip_global_norm: float | None = None
    # Smallest magnitude sent, for strategy="hard".
    threshold: float | None = None
    # Source of the first step's ratios: "paper" (Eq. 8 and 9), "weight_norm", "uniform", or
    # "measured": from the whole gradients of a first step that is sent dense.
    prior: str = "paper"
    # Assumed shape of a layer's gradient, to turn variances into ratios: see
    # core/balancing/tails.py.
    tail: str = "gaussian"
    # Pair exchanges per adjustment, the s of DLS(s); None = all the way to one threshold.
    pair_steps: int | None = None
    # Steps between adjustments.  Higher = thresholds follow the gradients more slowly.
    adjust_every: int = 1
    # Entries every compressed layer sends at least.
    min_k: int = 1
    # Tensors with fewer entries than this are sent dense.
    dense_below: int = 1024
    # Send a tensor dense where its sparse payload would be no smaller on the wire.
    cost_rule: bool = True
    # Type of the values sent, "float32", "float16" or "bfloat16"; the rounding error stays in the
    # residual.  Gradients in float64 are sent as they are.
    values: str = "float32"
    # Code of the indices sent: "elias-fano" (about 8.6 bits each at density 1 %), or "plain" (32
    # bits), which costs no time to write.
    index_code: str = "elias-fano"
    # Gradient bytes that travel together; None = 32 MiB, with exchange="sparse_allreduce" and more
    # than 64 ranks (or hosts, with hierarchical) more: see core/wire/buckets.py.  Lower = earlier
    # on their way, but more operations.
    bucket_bytes: int | None = None
    # Threads of each process that work on a layer of 16 million entries or more; None = as many as
    # the host has cores for each process on it, but 4 and OMP_NUM_THREADS at most.
    threads: int | None = None

    # Diagnostics -------------------------------------------------------------------------------
    # Every how many steps to compare with exact global top-k (sorts the model); 0 = never.
    measure_every: int = 0

    def __post_init__(self) -> None:
        self._require_number("density", "a number in (0, 1]", lambda v: 0 < v <= 1)
        self._require_choice("strategy", STRATEGIES)
        self._require_number("momentum", "a number in [0, 1)", lambda v: 0 <= v < 1)
        self._check_adam()
        self._require_integer("dense_steps", 0)
        self._require_integer("warmup_steps", 0)
        self._require_number("warmup_density", "a number in (0, 1]", lambda v: 0 < v <= 1)
        self._require_choice("nonfinite", NONFINITE)
        object.__setattr__(self, "layer_density", _pairs(self.layer_density))
        for option in ("clip_norm", "clip_value", "clip_global_norm", "threshold"):
            if getattr(self, option) is not None:
                accepted = "a finite number > 0, or None"
                self._require_number(option, accepted, lambda v: 0 < v < math.inf)
        if (self.strategy == "hard") != (self.threshold is not None):
            raise DLSError(
                f"strategy={self.strategy!r} with threshold={self.threshold!r}: strategy='hard' "
                "needs a threshold, and no other takes one"
            )
        self._require_choice("prior", (*PRIORS, MEASURED))
        self._require_choice("tail", TAILS)
        if self.pair_steps is not None:
            self._require_integer("pair_steps", 1, or_else=" or None")
        self._require_integer("adjust_every", 1)
        self._require_integer("min_k", 1)
        self._require_integer("dense_below", 0)
        self._require_integer("measure_every", 0)
        self._require_choice("values", VALUES)
        self._require_choice("exchange", EXCHANGES)
        self._require_choice("index_code", INDEX_CODES)
        if self.bucket_bytes is not None:
            self._require_integer("bucket_bytes", 1, or_else=" or None")
        if self.threads is not None:
            self._require_integer("threads", 1, or_else=" or None")
        for option in ("cost_rule", "hierarchical", "nesterov", "momentum_masking"):
            if not isinstance(getattr(self, option), bool):
                raise DLSError(f"{option}={getattr(self, option)!r}: accepted are True and False")
        if self.nesterov and not self.momentum:
            raise DLSError("nesterov=True needs a momentum")
        if self.hierarchical:
            self._check_hierarchical()
        if self.exchange == SPARSE_ALLREDUCE:
            self._check_sparse_allreduce()

    @classmethod
    def from_options(cls, **options: object) -> DLSConfig:
        """A configuration from keyword options.

        Raises:
            DLSError: an option does not exist or has a value that is not accepted.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise DLSError(f"unknown option {name!r}: accepted are {', '.join(known)}")
        return cls(**options)  # type: ignore[arg-type]

    def as_plain(self) -> dict[str, Any]:
        """All options by name, in types that JSON has: as saved states have them."""
        options = asdict(self) | {"layer_density": [list(pair) for pair in self.layer_density]}
        return options | {"adam": self.adam and list(self.adam)}

    def _check_adam(self) -> None:
        least = 1e-37  # what float32 has in full
        accepted = f"a finite number >= {least}"
        self._require_number("adam_eps", accepted, lambda v: least <= v < math.inf)
        if self.adam is None:
            return
        try:
            betas = tuple(float(beta) for beta in self.adam)
            good = isinstance(self.adam, (tuple, list)) and len(betas) == 2
            good = good and all(0 <= beta < 1 for beta in betas)
        except (TypeError, ValueError):
            good = False
        if not good:
            raise DLSError(
                f"adam={self.adam!r}: accepted are Adam's two betas, numbers in [0, 1), such as "
                "(0.5, 0.999), or None"
            )
        object.__setattr__(self, "adam", betas)
        if self.momentum or self.nesterov:
            raise DLSError(
                f"adam={self.adam} with momentum={self.momentum}, nesterov={self.nesterov}: Adam's "
                "momentum is its first beta; leave the others out"
            )

    def _check_hierarchical(self) -> None:
        if self.strategy not in ("dls", "layerwise"):
            raise DLSError(
                f"hierarchical=True with strategy={self.strategy!r}: accepted are 'dls' and "
                "'layerwise'; the others are there to compare with, without hosts"
            )
        if (self.momentum or self.adam) and (self.dense_steps or self.prior == MEASURED):
            given = f"adam={self.adam}" if self.adam else f"momentum={self.momentum}"
            raise DLSError(
                f"hierarchical=True and {given} with dense_steps={self.dense_steps}, "
                f"prior={self.prior!r}: a host's velocities begin with its first sparse step; use "
                f"warmup_steps, or the optimizer's {'Adam' if self.adam else 'momentum'}"
            )

    def _check_sparse_allreduce(self) -> None:
        if self.strategy not in ("dls", "layerwise"):
            raise DLSError(
                f"exchange='sparse_allreduce' with strategy={self.strategy!r}: accepted are 'dls' "
                "and 'layerwise'; the others are there to compare with, and are gathered"
            )

    def _require_number(self, name: str, accepted: str, ok: Callable[[Any], bool]) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not ok(value):
            raise DLSError(f"{name}={value!r}: accepted is {accepted}")
        # NumPy's numbers would travel into saved states, which torch then refuses to load.
        object.__setattr__(self, name, float(value))

    def _require_integer(self, name: str, least: int, or_else: str = "") -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
            raise DLSError(f"{name}={value!r}: accepted is an integer >= {least}{or_else}")
        object.__setattr__(self, name, int(value))

    def _require_choice(self, name: str, accepted: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in accepted:
            raise DLSError(f"{name}={value!r}: accepted are {', '.join(map(repr, accepted))}")


def _pairs(given: Any) -> tuple[tuple[str, float | str], ...]:
    """``layer_density`` as pairs, which print the same on every rank."""
    try:
        pairs = tuple(given.items() if isinstance(given, Mapping) else map(tuple, given))
        for pattern, density in pairs:
            number = isinstance(density, numbers.Real) and not isinstance(density, bool)
            if not isinstance(pattern, str) or not (
                density == DENSE or (number and 0 < density <= 1)
            ):
                raise TypeError
        pairs = tuple((p, d if isinstance(d, str) else float(d)) for p, d in pairs)
    except (TypeError, ValueError):
        raise DLSError(
            f"layer_density={given!r}: accepted is {{pattern of layer names: density in (0, 1] or "
            f"{DENSE!r}}}"
        ) from None
    return pairs
