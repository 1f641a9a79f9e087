"""What ranks tell each other, so that they do the same, and none waits for another in vain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from hvd_dls.advice.lab import Lab
from hvd_dls.core.wire import agreement
from hvd_dls.errors import DLSError

T = TypeVar("T")


def everyone(lab: Lab, name: str, content: Any) -> list[Any]:
    """What all ranks say.

    Args:
        lab: this rank's.
        name: of the operation.
        content: something that JSON can hold.
    """
    array = agreement.encode(content)
    return agreement.decode(lab.gather(f"hvd_dls.advise.{name}", array), lab.size)


def slowest(lab: Lab, seconds: list[float]) -> list[float]:
    """The largest of all ranks' times, one by one: what they decide by, all alike."""
    times: list[float] = np.max(everyone(lab, "seconds", seconds), axis=0).tolist()
    return times


def on_all(lab: Lab, action: Callable[[], T]) -> T:
    """Acts on each rank and waits for the others.

    Args:
        lab: this rank's.
        action: exchanges nothing.

    Raises:
        DLSError: on all ranks, if the action raised on some; names the rank and its error.
    """
    results: list[T] = []
    error: Exception | None = None
    try:
        results.append(action())
    except Exception as met:
        error = met
    told = None
    if error is not None:
        told = str(error) if isinstance(error, DLSError) else f"{type(error).__name__}: {error}"
    said = everyone(lab, "errors", told)
    failed = [(rank, words) for rank, words in enumerate(said) if words is not None]
    if failed:
        rank, words = failed[0]
        alike = len(failed) == lab.size and len({each for _, each in failed}) == 1
        raise DLSError(words if alike else f"rank {rank}: {words}") from error
    return results[0]
