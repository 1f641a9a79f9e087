"""Before the first exchange: do all ranks compress the same model in the same way?

Every rank gathers a short message, under a name that does not depend on its model, so that a
disagreement is an error on all of them instead of operations that wait for each other.  If the
checksums differ, they gather what the checksums are of, to find the first difference.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np

from hvd_dls.config import DLSConfig
from hvd_dls.core.balancing.layers import LayerSpec
from hvd_dls.core.wire.layout import VERSION
from hvd_dls.errors import RanksDisagreeError

# Options that are a rank's own affair.
OWN_OPTIONS = ("threads", "measure_every")
_HEAD = struct.Struct("<4sI")
_MAGIC = b"DLSa"

Facts = list[tuple[str, Any]]


class Claim(NamedTuple):
    """What a rank says of itself.

    Attributes:
        checksum: of what must be the same on all ranks.
        error: why this rank cannot go on; empty if it can.
        label: of the operations to come, if this is the set's first rank.
        numbers: ``Session.agreed()``, if this is the set's first rank; with Adam each other one's
            begins likewise, with its steps; where ranks vote on a state, ``Session.rounds``.
    """

    checksum: str
    error: str = ""
    label: str = ""
    numbers: list[int] | None = None


def facts_of(version: str, config: DLSConfig, layers: Sequence[LayerSpec]) -> Facts:
    """What must be the same on all ranks, as (what, value), in the order of comparing."""
    facts: Facts = [("version of hvd_dls", version), ("wire format", VERSION)]
    facts += [
        (f"option {field.name}", repr(getattr(config, field.name)))
        for field in fields(config)
        if field.name not in OWN_OPTIONS
    ]
    facts.append(("number of layers", len(layers)))
    for position, layer in enumerate(layers):
        value = f"{layer.stable_name!r} of shape {layer.shape}, {8 * layer.itemsize} bits"
        facts.append((f"layer {position}", value))
    return facts


def checksum(facts: Facts) -> str:
    """Of a rank's facts."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def encode(content: Any) -> np.ndarray:
    """A message: uint8, as long as it is."""
    body = zlib.compress(json.dumps(content).encode())
    return np.frombuffer(_HEAD.pack(_MAGIC, len(body)) + body, np.uint8).copy()


def decode(gathered: np.ndarray, world_size: int) -> list[Any]:
    """All ranks' messages, in rank order.

    Raises:
        RanksDisagreeError: they are something else.
    """
    raw, messages = gathered.tobytes(), []
    for rank in range(world_size):
        try:
            magic, length = _HEAD.unpack_from(raw)
            body, raw = raw[_HEAD.size : _HEAD.size + length], raw[_HEAD.size + length :]
            messages.append(json.loads(zlib.decompress(body)))
        except (struct.error, zlib.error, ValueError):
            magic = b""
        if magic != _MAGIC or (raw and rank == world_size - 1):
            raise RanksDisagreeError(
                f"rank {rank} sent no message of this version of hvd_dls: install the same version "
                "everywhere, and call what takes all ranks on all of them"
            )
    return messages


def check_errors(claims: Sequence[Claim]) -> None:
    """Raises what some rank has met, on those that have not.

    Raises:
        RanksDisagreeError: naming the rank and its error.
    """
    for rank, claim in enumerate(claims):
        if claim.error:
            raise RanksDisagreeError(f"rank {rank} cannot go on: {claim.error}")


def check_facts(ranks: Sequence[Facts]) -> None:
    """Compares what all ranks said.

    Raises:
        RanksDisagreeError: on every rank alike, naming the first rank that differs from rank 0 and
            the first difference.
    """
    first = [tuple(fact) for fact in ranks[0]]
    for rank, facts in enumerate(ranks):
        for theirs, own in zip(map(tuple, facts), first, strict=False):
            if theirs != own:
                what = own[0] if own[0] == theirs[0] else f"{own[0]} / {theirs[0]}"
                raise RanksDisagreeError(
                    f"rank {rank} has {what}: {theirs[1]}, rank 0: {own[1]}; all ranks must have "
                    "the same"
                )
        if len(facts) != len(first):
            raise RanksDisagreeError(
                f"rank {rank} says {len(facts)} things of itself, rank 0 {len(first)}"
            )
