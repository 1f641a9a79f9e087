"""What can be given to Horovod as its compression."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hvd_dls.config import DLSConfig


@dataclass(frozen=True)
class Candidate:
    """One way to exchange gradients.

    Attributes:
        method: "alone" (no exchange: what a step takes at least), "dense", "fp16" or "dls".
        density: of DLS, in (0, 1]; 0 otherwise.
        values: type of the values that DLS sends.
        hierarchical: whether ranks of a host average first and one of them sends for all.

    Raises:
        DLSError: DLS does not accept the options.
    """

    method: str
    density: float = 0.0
    values: str = "float32"
    hierarchical: bool = False

    def __post_init__(self) -> None:
        if self.method == "dls":
            DLSConfig.from_options(**self.options)

    @property
    def options(self) -> dict[str, Any]:
        """Options of ``DLSCompressor``; those that are not its defaults, and the density."""
        options: dict[str, Any] = {"density": self.density}
        options |= {} if self.values == "float32" else {"values": self.values}
        return options | ({"hierarchical": True} if self.hierarchical else {})

    @property
    def name(self) -> str:
        """A short name: "dense", "fp16", "dls:0.01", "dls:0.01:bfloat16:hierarchical"."""
        if self.method != "dls":
            return self.method
        parts = [self.method, f"{self.density:g}"]
        parts += [] if self.values == "float32" else [self.values]
        return ":".join([*parts, *(["hierarchical"] if self.hierarchical else [])])

    @property
    def title(self) -> str:
        """A name for tables."""
        if self.method != "dls":
            return self.method
        return ", ".join([f"DLS {100 * self.density:g} %", *self.name.split(":")[2:]])

    @property
    def code(self) -> str:
        """What to write in a training script."""
        if self.method == "dls":
            options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
            return f"compression=DLSCompressor({options})"
        return {"fp16": "compression=hvd.Compression.fp16"}.get(self.method, "no compression")

    @property
    def caution(self) -> tuple[float, ...]:
        """The smaller, the less it changes what dense training does.

        Dense comes first, then rounding to 16 bits, then DLS by density, float32 values first.
        Whether hosts average first makes no difference to the order.
        """
        kind = ("alone", "dense", "fp16", "dls").index(self.method)
        return (kind, -self.density, float(self.values != "float32"))


ALONE, DENSE, FP16 = Candidate("alone"), Candidate("dense"), Candidate("fp16")


def candidates(
    densities: Iterable[float], values: Iterable[str], hierarchical: bool
) -> list[Candidate]:
    """All that are compared, the most cautious first.

    Args:
        densities: of DLS.
        values: types of the values that it sends.
        hierarchical: whether to try DLS between hosts, too.

    Raises:
        DLSError: DLS does not accept a density or type.
    """
    sparse = {
        Candidate("dls", float(density), kind, between)
        for density in densities
        for kind in values
        for between in ((False, True) if hierarchical else (False,))
    }
    return [DENSE, FP16, *sorted(sparse, key=lambda each: (each.caution, each.hierarchical))]
