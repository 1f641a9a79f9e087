"""What to try, and for how long."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hvd_dls.advice.candidates import Candidate, candidates
from hvd_dls.config import ALLGATHER, SPARSE_ALLREDUCE
from hvd_dls.errors import DLSError

OWNERS_FROM = 4  # senders: with fewer, owners have been slower everywhere (docs/scale.md)


@dataclass(frozen=True)
class Plan:
    """What to try, and for how long; the same on all ranks.

    Attributes:
        densities: of DLS, each in (0, 1].
        values: types of the values that it sends, of "float32", "bfloat16", "float16".
        exchanges: of DLS, of "allgather", "sparse_allreduce"; None: the former, and from
            OWNERS_FROM ranks on (with ``hierarchical``, hosts) the latter, too.
        seconds: that turns should take together, about; slow steps take longer.
        turns: of each candidate, 2 at least.
        worth: how many times as fast a step has to be for a less cautious candidate, >= 1.

    Raises:
        DLSError: something else is given.
    """

    densities: tuple[float, ...] = (0.05, 0.01, 0.001)
    values: tuple[str, ...] = ("float32",)
    exchanges: tuple[str, ...] | None = None
    seconds: float = 40.0
    turns: int = 5
    worth: float = 1.2

    def __post_init__(self) -> None:
        lists = ["densities", "values", *([] if self.exchanges is None else ["exchanges"])]
        for name in lists:
            given = tuple(getattr(self, name))
            if not given:
                raise DLSError(f"{name}={given!r}: one at least")
            object.__setattr__(self, name, given)
        for name, least in (("seconds", 0.0), ("worth", 1.0)):
            value = getattr(self, name)
            if not least <= value < math.inf:
                raise DLSError(f"{name}={value!r}: accepted is a number >= {least:g}")
        if not isinstance(self.turns, int) or self.turns < 2:
            raise DLSError(f"turns={self.turns!r}: accepted is an integer >= 2")
        for exchange in self.exchanges or ():
            if exchange not in (ALLGATHER, SPARSE_ALLREDUCE):
                raise DLSError(
                    f"exchange={exchange!r}: accepted are {ALLGATHER!r} and {SPARSE_ALLREDUCE!r}"
                )
        candidates(self.densities, self.values)  # refuses what DLS does not accept

    def candidates(self, ranks: int, hosts: int) -> list[Candidate]:
        """All that are compared in a job of so many ranks and hosts, the most cautious first."""
        between_hosts = self._among(hosts) if 1 < hosts < ranks else ()
        return candidates(self.densities, self.values, self._among(ranks), between_hosts)

    def _among(self, senders: int) -> tuple[str, ...]:
        """Exchanges to try among so many that send."""
        if self.exchanges is not None:
            return self.exchanges
        return (ALLGATHER, SPARSE_ALLREDUCE) if senders >= OWNERS_FROM else (ALLGATHER,)


def plan_of(options: dict[str, Any]) -> Plan:
    """The plan that options describe.

    Raises:
        DLSError: an option does not exist or has a value that is not accepted.
    """
    known = Plan.__dataclass_fields__
    for name in options:
        if name not in known:
            raise DLSError(f"unknown option {name!r}: accepted are {', '.join(known)}")
    try:
        return Plan(**options)
    except TypeError as error:  # densities=0.01, for example
        raise DLSError(f"{error}, in {options}") from None
