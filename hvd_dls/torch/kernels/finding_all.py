"""Finding what many layers send in one launch: of all that have come in when one is asked for."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from hvd_dls.core.selection.backend import Future
from hvd_dls.core.selection.passes_numpy import sample_stride
from hvd_dls.torch.futures import DeviceFuture, stream_of
from hvd_dls.torch.kernels import finding
from hvd_dls.torch.kernels.candidates import BITS
from hvd_dls.torch.kernels.finding import Field
from hvd_dls.torch.kernels.launching import on
from hvd_dls.torch.kernels.selector import (
    BLOCK,
    REGISTERS,
    TILE,
    WARPS,
    Checked,
    Maybe,
    Selector,
    Told,
    most_programs,
)

KINDS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Searches:
    """Layers of a device that have come in and in which nobody has searched yet.

    The largest of all of them are looked for when the first of them is asked for, which is when its
    bucket is complete.  Searches that nobody is waiting for any more are forgotten.
    """

    def __init__(self) -> None:
        self._waiting: dict[Any, list[weakref.ref[_Search]]] = defaultdict(list)

    def put_off(
        self,
        selector: Selector,
        residual: Tensor,
        gradient: Tensor,
        k: int,
        last_threshold: float,
        otherwise: Callable[[], Future[Maybe]],
    ) -> Future[Maybe]:
        """As ``Selector.find``, later; neither array may change before."""
        low = selector.bound(last_threshold)
        search = _Search(self, selector, residual, gradient, k, low, otherwise)
        self._waiting[search.stream, gradient.dtype].append(weakref.ref(search))
        return search

    def launch(self) -> None:
        """Searches in all that have come in: a launch for as many as can run at the same time."""
        waiting, self._waiting = self._waiting, defaultdict(list)
        for (stream, _), references in waiting.items():
            searches = [search for search in (each() for each in references) if search is not None]
            if not searches:
                continue
            device = searches[0].residual.device
            at_once = max(most_programs(device) // 2, 1) if stream else len(searches)
            with on(device), torch.cuda.stream(stream):
                for first in range(0, len(searches), at_once):
                    _launch(searches[first : first + at_once], device)


class _Search(Future[Maybe]):
    """One that is put off."""

    def __init__(
        self,
        searches: Searches,
        selector: Selector,
        residual: Tensor,
        gradient: Tensor,
        k: int,
        low: int,
        otherwise: Callable[[], Future[Maybe]],
    ) -> None:
        self.selector, self.residual, self.gradient = selector, residual, gradient
        self.k, self.low, self.stream = k, low, stream_of(residual)
        self._searches, self._otherwise = searches, otherwise
        self._checked: Checked | None = None

    def launched(self, told: Future[Told]) -> None:
        """Takes what the kernel will have told."""
        self._checked = Checked(told, self.selector.learn, self._otherwise, self.stream)

    def _made(self) -> Checked:
        if self._checked is None:
            self._searches.launch()
        assert self._checked is not None, "a launch before has failed"
        return self._checked

    @property
    def searched_again(self) -> bool:
        """Whether the bound was no good, of one whose result is there."""
        return self._made().searched_again

    def ready(self) -> bool:
        """See ``Future``."""
        return self._made().ready()

    def result(self) -> Maybe:
        """See ``Future``."""
        return self._made().result()


class _Part(Future[Told]):
    """One layer's part of what is copied to the host for several."""

    def __init__(self, whole: DeviceFuture[np.ndarray], begin: int, search: _Search, room: int):
        self._whole, self._begin, self._room = whole, begin, room
        self._k, self._n = search.k, len(search.residual)

    def ready(self) -> bool:
        """See ``Future``."""
        return self._whole.ready()

    def result(self) -> Told:
        """See ``Future``."""
        sent = self._whole.result()[self._begin : self._begin + _told(self._k)]
        return Told(sent, self._k, self._n, self._room)


def _launch(searches: Sequence[_Search], device: torch.device) -> None:
    """Launches the kernel for layers whose gradients have the same type."""
    layers, starts = len(searches), device.type == "cuda"
    blocks = np.array([triton.cdiv(len(search.residual), BLOCK) for search in searches])
    # As many blocks for all programs; so that even with a program less full in each layer, all of
    # them run at the same time.
    each = int(blocks.max())
    if starts:
        each = triton.cdiv(int(blocks.sum()), most_programs(device) - layers)
    programs = -(-blocks // each)
    rooms = np.array(
        [
            search.selector.room(search.k, count, each * BLOCK)
            for search, count in zip(searches, programs.tolist(), strict=True)
        ]
    )
    told = np.array([_told(search.k) for search in searches])
    begins = np.cumsum(told) - told

    table = np.empty((layers, len(Field)), np.int64)
    table[:, Field.RESIDUAL] = [search.residual.data_ptr() for search in searches]
    table[:, Field.GRADIENT] = [search.gradient.data_ptr() for search in searches]
    table[:, Field.N] = [len(search.residual) for search in searches]
    table[:, Field.K] = [search.k for search in searches]
    table[:, Field.LOW] = [search.low for search in searches]
    table[:, Field.STRIDE] = [sample_stride(len(search.residual)) for search in searches]
    table[:, Field.EACH] = each
    table[:, Field.ROOM] = rooms
    table[:, Field.PLACE] = np.cumsum(programs * rooms) - programs * rooms
    table[:, Field.MARKS] = (np.cumsum(blocks) - blocks) * (BLOCK // BITS)
    table[:, Field.WORK] = finding.WORKSPACE * np.arange(layers)
    table[:, Field.OUT] = finding.WORKSPACE * layers + begins
    table[:, Field.FIRST] = np.cumsum(programs) - programs
    table[:, Field.COUNT] = programs
    layer_of = np.repeat(np.arange(layers), programs)

    # Parts begin at 16 bytes, whatever the layers: kernels are compiled for how they are aligned.
    padded = table.size + table.size % 2
    staged = torch.empty(padded + len(layer_of), dtype=torch.int64, pin_memory=starts)
    host = staged.numpy()
    host[: table.size] = table.reshape(-1)
    host[padded:] = layer_of
    there = staged.to(device, non_blocking=True)
    candidates = int((programs * rooms).sum())
    where, what = torch.empty((2, candidates + -candidates % 4), dtype=torch.int32, device=device)
    words = torch.empty(int(blocks.sum()) * (BLOCK // BITS), dtype=torch.int32, device=device)
    work = torch.zeros(
        finding.WORKSPACE * layers + int(told.sum()), dtype=torch.int32, device=device
    )
    finding.find_all[(len(layer_of),)](
        there, there[padded:], where, what, words, work,
        KINDS[searches[0].gradient.dtype], aligned(table[:, : Field.N + 1]), BLOCK, TILE,
        num_warps=WARPS, maxnreg=REGISTERS, launch_cooperative_grid=True,
    )  # fmt: skip
    whole = DeviceFuture(work[finding.WORKSPACE * layers :], lambda array: array)
    for search, begin, room in zip(searches, begins.tolist(), rooms.tolist(), strict=True):
        search.launched(_Part(whole, begin, search, room))


def aligned(numbers: np.ndarray) -> bool:
    """Whether addresses, and numbers of entries, are multiples of 16."""
    return not (numbers % 16).any()


def _told(k: int) -> int:
    """How many numbers are told of a layer."""
    return 2 * k + finding.TOLD
