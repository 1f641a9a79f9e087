# mypy: allow-untyped-defs, no-check-untyped-defs
"""Adding up, as a compiled loop: see ``adding``."""

from __future__ import annotations

import numpy as np

from hvd_dls.core.bits import element
from hvd_dls.core.jit import jit


@jit
def add_up(where, starts, offsets, sums):
    """Layer by layer, so that the sums of one stay in the cache while ranks are added.

    ``where`` tells at which addresses each rank's indices and values begin.
    """
    zero_index, zero = np.uint32(0), sums.dtype.type(0)
    for layer in range(len(offsets) - 1):
        own = sums[offsets[layer] : offsets[layer + 1]]
        for rank in range(len(where)):
            for i in range(starts[rank, layer], starts[rank, layer + 1]):
                at = element(where[rank, 0], i, zero_index)
                own[at] += element(where[rank, 1], i, zero)
