"""What benchmarks call the ways to exchange gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

OWNERS, HOSTS_AND_OWNERS = "sparse_allreduce", "hierarchical_sparse_allreduce"
SPARSE = ("layerwise", "dls", "hierarchical", OWNERS, HOSTS_AND_OWNERS)


@dataclass(frozen=True)
class Method:
    """A method to exchange gradients.

    Attributes:
        compression: "nothing" (no exchange at all), "none" (dense, as they are), "fp16",
            "layerwise", "dls", "hierarchical" (DLS between hosts, behind averages inside),
            "sparse_allreduce" (DLS where owners add up) or "hierarchical_sparse_allreduce" (both);
            with torch's DistributedDataParallel: "ddp" (dense), "ddp-fp16" or "powersgd";
            with torch.distributed: "local" (no gradients but, now and then, changes of weights), or
            "local-dls" (these changes sparse, by DLS).
        density: of the sparse ones.
        values: type of the values they send.
        rank: of PowerSGD's matrices.
        every: steps of a round of local steps.
        outer: learning rate and momentum of a round of local steps; None: the usual.  Sparse
            ones have no momentum.
        longer: factor on the steps of a training.
    """

    compression: str
    density: float | None = None
    values: str = "float32"
    rank: int | None = None
    every: int | None = None
    outer: tuple[float, float] | None = None
    longer: int = 1

    @classmethod
    def parse(cls, text: str) -> Method:
        """Parses "dense", "fp16", "nothing", "dls:0.01", "dls:0.01:bfloat16", "powersgd:4".

        And "local:8", or "local:8:0.7:0.9" with learning rate and momentum of the rounds;
        "local-dls:8:0.05", or "local-dls:8:0.05:2.5" with the learning rate; "x2" behind any of
        them is for a training of twice the steps.
        """
        text, _, longer = text.partition("x")
        kind, *rest = text.split(":")
        about: dict[str, Any] = {"longer": int(longer or 1)}
        if kind == "powersgd":
            return cls(kind, rank=int(rest[0]), **about)
        if kind == "local":
            outer = (float(rest[1]), float(rest[2])) if rest[1:] else None
            return cls(kind, every=int(rest[0]), outer=outer, **about)
        if kind == "local-dls":
            outer = (float(rest[2]), 0.0) if rest[2:] else None
            return cls(kind, float(rest[1]), every=int(rest[0]), outer=outer, **about)
        if kind in SPARSE and rest:
            about["values"] = rest[1] if rest[1:] else "float32"
            return cls(kind, float(rest[0]), **about)
        return cls({"dense": "none"}.get(kind, kind), **about)

    @property
    def name(self) -> str:
        """The method as ``parse`` takes it."""
        return self._exchange + (f"x{self.longer}" if self.longer > 1 else "")

    @property
    def _exchange(self) -> str:
        if self.rank is not None:
            return f"{self.compression}:{self.rank}"
        if self.every is not None:
            outer = self.outer or ()
            if self.density is not None:  # has no momentum
                outer = (self.density, *outer[:1])
            return f"{self.compression}:{self.every}" + "".join(f":{v:g}" for v in outer)
        if self.density is None:
            return {"none": "dense"}.get(self.compression, self.compression)
        values = "" if self.values == "float32" else f":{self.values}"
        return f"{self.compression}:{self.density:g}{values}"

    @property
    def options(self) -> dict[str, Any]:
        """Options of ``DLSCompressor``; empty if it is not one of the sparse ones."""
        if self.density is None:
            return {}
        options: dict[str, Any] = {"density": self.density, "values": self.values}
        options |= {"exchange": OWNERS} if self.compression.endswith(OWNERS) else {}
        options |= {"hierarchical": True} if self.compression.startswith("hierarchical") else {}
        return options | ({"strategy": "layerwise"} if self.compression == "layerwise" else {})
