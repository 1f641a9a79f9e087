"""Finding what a layer sends by the kernels of ``finding``: memory, launches and result."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
import triton
from torch import Tensor

from hvd_dls.core.balancing.sketch import BELOW, LAST_BASE, MANTISSA_SHIFT, WINDOW, Sketch
from hvd_dls.core.selection.backend import Future
from hvd_dls.core.selection.passes import Found
from hvd_dls.core.selection.passes_numpy import sample_stride
from hvd_dls.torch.futures import DeviceFuture, stream_of
from hvd_dls.torch.kernels import finding
from hvd_dls.torch.kernels.launching import on

# Of seven such sets the fastest on an H200, for layers of 25 million entries.
BLOCK = 2048  # entries that a program looks at at once
TILE = 1024  # candidates
WARPS = 4
PER_PROCESSOR = 4  # programs that a multiprocessor runs at the same time
REGISTERS = 128  # of a thread, so that it can: of 65,536
LARGEST = float(np.finfo(np.float32).max)
_FIRST_MARGIN = 0.8  # part of the last threshold above which candidates are looked for

Maybe = Found | None


class Selector:
    """Finds the k largest entries of a layer, given roughly the threshold.

    What it remembers of steps before changes the speed, never the result.
    """

    def __init__(self) -> None:
        self._margin = _FIRST_MARGIN
        self._spread = 4.0  # room of a program, in parts of k that fall to it

    def find(
        self,
        residual: Tensor,
        gradient: Tensor,
        k: int,
        last_threshold: float,
        otherwise: Callable[[], Future[Maybe]],
    ) -> Future[Maybe]:
        """See ``core.passes.find``; ties to the lower index, as there.

        Args:
            residual: (n,) float32 on a GPU, as the gradient.
            gradient: (n,) float32, float16 or bfloat16.
            k: of at most n / 4.
            last_threshold: of this layer's last step.
            otherwise: finds them whatever the threshold; called where this bound was no good.

        Returns:
            A future, made without waiting for the GPU.
        """
        low = self.bound(last_threshold)
        with on(residual.device):
            room, sent = self._launch(residual, gradient, k, low)
            first = DeviceFuture(sent, lambda array: Told(array, k, len(residual), room))
        return Checked(first, self.learn, otherwise, stream_of(residual))

    def bound(self, last_threshold: float) -> int:
        """Bits of the magnitude from which on entries are candidates."""
        return int(np.float32(min(self._margin * last_threshold, LARGEST)).view(np.int32))

    def room(self, k: int, programs: int, entries: int) -> int:
        """For how many candidates each of a layer's programs is to have room.

        Args:
            k: as for ``find``.
            programs: how many the layer has.
            entries: that each of them looks at.
        """
        return min(int(self._spread * k / programs) + 256, entries)

    def _launch(self, residual: Tensor, gradient: Tensor, k: int, low: int) -> tuple[int, Tensor]:
        n, device = len(residual), residual.device
        blocks = triton.cdiv(n, BLOCK)
        each = triton.cdiv(blocks, most_programs(device))
        programs = triton.cdiv(blocks, each)
        room = self.room(k, programs, each * BLOCK)
        where, what = torch.empty((2, programs * room), dtype=torch.int32, device=device)
        work = torch.zeros(
            finding.WORKSPACE + 2 * k + finding.TOLD, dtype=torch.int32, device=device
        )
        finding.find[(programs,)](
            residual, gradient, n, k, low, sample_stride(n), each, room, where, what, work,
            BLOCK, TILE, num_warps=WARPS, maxnreg=REGISTERS, launch_cooperative_grid=True,
        )  # fmt: skip
        return room, work[finding.WORKSPACE :]

    def learn(self, told: Told) -> None:
        """Aims at twice as many candidates as are sent, and at room for all of a program's."""
        if told.candidates < 1.5 * told.k:
            self._margin = max(1 - 1.5 * (1 - self._margin), 0.5)
        elif told.candidates > 2.5 * told.k:
            self._margin = 1 - (0.5 if told.candidates > 4 * told.k else 0.8) * (1 - self._margin)
        elif told.fullest > told.room:  # the largest entries lie close together
            self._spread *= 2 * told.fullest / told.room


@cache
def most_programs(device: torch.device) -> int:
    """How many run at the same time."""
    if device.type != "cuda":
        return 1  # interpreted, one after the other
    processors = int(torch.cuda.get_device_properties(device).multi_processor_count)
    return min(PER_PROCESSOR * processors, finding.PROGRAMS)


class Told:
    """What the kernels wrote, as arrays on the host: see ``finding``.

    Attributes:
        candidates: how many entries reached the bound.
        fullest: most of a program.
    """

    def __init__(self, sent: np.ndarray, k: int, n: int, room: int) -> None:
        self.k, self.room = k, room
        self._sent, self._told, self._stride = sent, sent[2 * k :], sample_stride(n)
        self.candidates = int(self._told[finding.CANDIDATES])
        self.fullest = int(self._told[finding.FULLEST])

    @property
    def good(self) -> bool:
        """Whether the k largest are among the candidates, and all of these had room."""
        return self.candidates >= self.k and self.fullest <= self.room

    def found(self) -> Maybe:
        """See ``core.passes.find``."""
        told, k = self._told, self.k
        if told[finding.NOT_FINITE]:
            return None
        bits = told[finding.THRESHOLD : finding.THRESHOLD + 1]
        edge = int(bits[0]) >> MANTISSA_SHIFT
        base = min(max(edge - BELOW, 0), LAST_BASE)
        position = edge - base
        counts = told[finding.SENT : finding.SENT + WINDOW].astype(np.int64)  # exact
        unsent = told[finding.SAMPLED : finding.SAMPLED + position + 1].astype(np.int64)
        unsent[position] -= told[finding.BOTH]
        if base == 0:
            unsent[0] = 0  # zeros, which nobody sends
        counts[: position + 1] += self._stride * unsent
        threshold = float(bits.view(np.float32)[0])
        values, indices = self._sent[:k].view(np.float32), self._sent[k : 2 * k].view(np.uint32)
        return Found(indices, values, threshold, Sketch(base, counts.astype(np.uint32)))


class Checked(Future[Maybe]):
    """What was found, unless the bound was no good: then what is found otherwise.

    Args:
        first: what the kernels wrote.
        learn: called with it.
        otherwise: see ``Selector.find``.
        stream: on which to launch that.
    """

    def __init__(
        self,
        first: Future[Told],
        learn: Callable[[Told], None],
        otherwise: Callable[[], Future[Maybe]],
        stream: torch.cuda.Stream | None,
    ) -> None:
        self._first, self._learn, self._otherwise = first, learn, otherwise
        self._stream = stream
        self._told: Told | None = None
        self._second: Future[Maybe] | None = None

    def _look(self) -> None:
        if self._told is not None:
            return
        told = self._first.result()
        if not told.good:
            with torch.cuda.stream(self._stream):
                self._second = self._otherwise()
        self._learn(told)
        self._told = told

    @property
    def searched_again(self) -> bool:
        """Whether the bound was no good, of one whose result is there."""
        return self._second is not None

    def ready(self) -> bool:
        """See ``Future``."""
        if self._told is None and not self._first.ready():
            return False
        self._look()
        return self._second is None or self._second.ready()

    def result(self) -> Maybe:
        """See ``Future``."""
        self._look()
        if self._second is not None:
            return self._second.result()
        assert self._told is not None
        return self._told.found()
