"""Passes over many layers at once: a few launches for all layers of a bucket, not for each."""

from __future__ import annotations

from functools import cache
from typing import NoReturn

import numpy as np
import torch

from hvd_dls.core.received import Received
from hvd_dls.core.session import log
from hvd_dls.torch.kernels.finding_all import Searches
from hvd_dls.torch.kernels.selector import Selector
from hvd_dls.torch.kernels.settling_all import Bookings

_SENT = 16  # entries of each layer that are looked for when the kernels are tried
# Of layers then: of many programs, where they run at the same time, and of no multiple of 16.
_LARGE, _SMALL, _ODD = 1 << 21, 4096, 4099


class Together:
    """What layers of one device put off: see ``Searches`` and ``Bookings``."""

    def __init__(self) -> None:
        self.searches, self.bookings = Searches(), Bookings()


@cache
def runs(device: torch.device, gradient: torch.dtype, out: torch.dtype) -> bool:
    """Whether these kernels do what they should on a device; tried once for these types.

    That compiles them, and waits for the device.
    """
    try:
        large = _LARGE if device.type == "cuda" else 2 * _SMALL  # interpreted it takes long
        sets = [_SMALL, large], [_SMALL, large, _ODD]
        right = all(_right(device, gradient, out, sizes) for sizes in sets)
    except Exception as error:  # whatever a compiler or driver may raise
        log.layer_by_layer(f"{type(error).__name__}: {error}")
        return False
    if not right:
        log.layer_by_layer("their results are wrong")
    return right


def _right(
    device: torch.device, kind: torch.dtype, out_kind: torch.dtype, sizes: list[int]
) -> bool:
    """Has some entries of several layers found and settled; whether that came out right."""
    together = Together()
    residuals = [torch.zeros(size, device=device) for size in sizes]
    gradients, futures, places = [], [], []
    for residual in residuals:
        places.append(np.arange(_SENT, dtype=np.uint32) * (len(residual) // _SENT) + 5)
        gradient = torch.zeros_like(residual)
        gradient[torch.from_numpy(places[-1].astype(np.int64)).to(device)] = torch.arange(
            1.0, _SENT + 1, device=device
        )
        gradients.append(gradient.to(kind))
        futures.append(
            together.searches.put_off(Selector(), residual, gradients[-1], _SENT, 1.1, _never)
        )
    found = [future.result() for future in futures]
    values = np.arange(1.0, _SENT + 1, dtype=np.float32)
    for one, where in zip(found, places, strict=True):
        if one is None or one.threshold != 1.0:
            return False
        if not (np.array_equal(one.indices, where) and np.array_equal(one.values, values)):
            return False
    sent = np.concatenate(places), np.tile(values, len(sizes))
    ranks = [sent, sent]
    outs = [torch.empty(size, dtype=out_kind, device=device) for size in sizes]
    for layer, (residual, gradient, out) in enumerate(zip(residuals, gradients, outs, strict=True)):
        part = [[_SENT * layer, _SENT * (layer + 1)]] * len(ranks)
        received = Received(ranks, np.array(part, np.int64), np.empty((0, 3), np.int64))
        together.bookings.put_off(residual, gradient, places[layer], None, received, 0.5, out)
    together.bookings.launch()
    return all(
        torch.equal(out, gradient.to(out_kind)) and not residual.any()
        for residual, gradient, out in zip(residuals, gradients, outs, strict=True)
    )


def _never() -> NoReturn:
    raise AssertionError("a bound below the threshold was taken for one above it")
