"""Every option of DLS, its meaning and its limits, in one place."""

from __future__ import annotations

import numbers
from dataclasses import dataclass, fields

from hvd_dls.core.prior import PRIORS
from hvd_dls.core.tails import TAILS
from hvd_dls.errors import DLSError

STRATEGIES = ("dls", "layerwise")
VALUES = ("float32", "float16", "bfloat16")
INDEX_CODES = ("elias-fano", "plain")


@dataclass(frozen=True)
class DLSConfig:
    """Options of the compressor; the same for every framework, and the same on every rank.

    Raises:
        DLSError: an option has a value it does not accept; the message names both.
    """

    # Often set ---------------------------------------------------------------------------------
    # Share of the compressed layers' entries sent each step, in (0, 1].  Lower = less traffic.
    density: float = 0.01
    # "dls": ratios move until all layers share one threshold.  "layerwise": density everywhere.
    strategy: str = "dls"

    # Seldom set --------------------------------------------------------------------------------
    # Source of the first step's ratios: "paper" (Eq. 8 and 9), "weight_norm" or "uniform".
    prior: str = "paper"
    # Assumed shape of a layer's gradient, to turn variances into ratios: see core/tails.py.
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
    # Gradient bytes that travel together.  Lower = earlier on their way, but more operations.
    bucket_bytes: int = 32 << 20

    # Diagnostics -------------------------------------------------------------------------------
    # Every how many steps to compare with exact global top-k (sorts the model); 0 = never.
    measure_every: int = 0

    def __post_init__(self) -> None:
        self._require_number("density", "a number in (0, 1]", lambda v: 0 < v <= 1)
        self._require_choice("strategy", STRATEGIES)
        self._require_choice("prior", tuple(PRIORS))
        self._require_choice("tail", tuple(TAILS))
        if self.pair_steps is not None:
            self._require_integer("pair_steps", 1, or_else=" or None")
        self._require_integer("adjust_every", 1)
        self._require_integer("min_k", 1)
        self._require_integer("dense_below", 0)
        self._require_integer("measure_every", 0)
        self._require_choice("values", VALUES)
        self._require_choice("index_code", INDEX_CODES)
        self._require_integer("bucket_bytes", 1)
        if not isinstance(self.cost_rule, bool):
            raise DLSError(f"cost_rule={self.cost_rule!r}: accepted are True and False")

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

    def _require_number(self, name, accepted, ok):  # type: ignore[no-untyped-def]
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not ok(value):
            raise DLSError(f"{name}={value!r}: accepted is {accepted}")

    def _require_integer(self, name: str, least: int, or_else: str = "") -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
            raise DLSError(f"{name}={value!r}: accepted is an integer >= {least}{or_else}")

    def _require_choice(self, name: str, accepted: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in accepted:
            raise DLSError(f"{name}={value!r}: accepted are {', '.join(map(repr, accepted))}")
