"""What can be given to Horovod as its compression."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hvd_dls.config import ALLGATHER, SPARSE_ALLREDUCE, VALUES, DLSConfig


@dataclass(frozen=True)
class Candidate:
    """One way to exchange gradients.

    Attributes:
        method: "alone" (no exchange: what a step takes at least), "dense", "fp16" or "dls".
        density: of DLS, in (0, 1]; 0 otherwise.
        values: type of the values that DLS sends.
        hierarchical: whether ranks of a host average first and one of them sends for all.
        exchange: how its entries get from rank to rank: "allgather" or "sparse_allreduce".

    Raises:
        DLSError: DLS does not accept the options.
    """

    method: str
    density: float = 0.0
    values: str = "float32"
    hierarchical: bool = False
    exchange: str = ALLGATHER

    def __post_init__(self) -> None:
        if self.method == "dls":
            DLSConfig.from_options(**self.options)

    @property
    def options(self) -> dict[str, Any]:
        """Options of ``DLSCompressor``; those that are not its defaults, and the density."""
        options: dict[str, Any] = {"density": self.density}
        options |= {} if self.values == "float32" else {"values": self.values}
        options |= {"hierarchical": True} if self.hierarchical else {}
        return options | ({} if self.exchange == ALLGATHER else {"exchange": self.exchange})

    @property
    def name(self) -> str:
        """A short name: "dense", "fp16", "dls:0.01", "dls:0.01:hierarchical:sparse_allreduce"."""
        if self.method != "dls":
            return self.method
        parts = [self.method, f"{self.density:g}"]
        parts += [] if self.values == "float32" else [self.values]
        parts += ["hierarchical"] if self.hierarchical else []
        return ":".join([*parts, *([] if self.exchange == ALLGATHER else [self.exchange])])

    @classmethod
    def of(cls, name: str) -> Candidate:
        """The candidate with such a name."""
        method, *rest = name.split(":")
        if not rest:
            return cls(method)
        density, *more = rest
        return cls(
            method,
            float(density),
            values=next((each for each in more if each in VALUES), "float32"),
            hierarchical="hierarchical" in more,
            exchange=SPARSE_ALLREDUCE if SPARSE_ALLREDUCE in more else ALLGATHER,
        )

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

        Dense comes first, then rounding to 16 bits, then DLS by density.  At the same density
        allgather comes before sparse_allreduce, with which a step changes fewer entries of the
        model, and float32 values before others, whose rounding at least stays in residuals.
        Whether hosts average first makes no difference to the order.
        """
        kind = ("alone", "dense", "fp16", "dls").index(self.method)
        owners, rounded = self.exchange != ALLGATHER, self.values != "float32"
        return (kind, -self.density, float(owners), float(rounded))


ALONE, DENSE, FP16 = Candidate("alone"), Candidate("dense"), Candidate("fp16")


def candidates(
    densities: Iterable[float],
    values: Iterable[str],
    exchanges: Iterable[str] = (ALLGATHER,),
    between_hosts: Iterable[str] = (),
) -> list[Candidate]:
    """All that are compared, the most cautious first.

    Args:
        densities: of DLS.
        values: types of the values that it sends.
        exchanges: of DLS among all ranks.
        between_hosts: of DLS among hosts whose ranks average first; none: that is not tried.

    Raises:
        DLSError: DLS does not accept a density, type or exchange.
    """
    sparse = {
        Candidate("dls", float(density), kind, hierarchical, exchange)
        for density in densities
        for kind in values
        for hierarchical, among in ((False, exchanges), (True, between_hosts))
        for exchange in among
    }
    return [DENSE, FP16, *sorted(sparse, key=lambda each: (each.caution, each.hierarchical))]
