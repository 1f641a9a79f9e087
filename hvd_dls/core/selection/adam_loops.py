# mypy: allow-untyped-defs, no-check-untyped-defs
"""Adam's moments and update in one pass over memory, as compiled loops: see ``adam``."""

from __future__ import annotations

import math

from hvd_dls.core.jit import jit

_BLOCK = 4096  # entries worked on at once: they stay in the first cache


@jit
def one_pass(gradient, first_before, second_before, first, second, update, by, start, stop):
    """Entries from start to stop; ``by`` are ``adam.Factors`` in the dtype of all arrays."""
    for begin in range(start, stop, _BLOCK):
        end = min(begin + _BLOCK, stop)
        _first(gradient[begin:end], first_before[begin:end], first[begin:end], by)
        _second(gradient[begin:end], second_before[begin:end], second[begin:end], by)
        _update(first[begin:end], second[begin:end], update[begin:end], by)


# Of few arrays each: with more, the compiler gives up on proving that they do not overlap.


@jit
def _first(gradient, before, first, by):
    keep, take, nothing, limit = by[0], by[1], by[8], by[9]
    for i in range(len(gradient)):
        own = min(max(gradient[i], -limit), limit)
        first[i] = before[i] * keep + own * take + gradient[i] * nothing


@jit
def _second(gradient, before, second, by):
    unscale, keep, take, limit = by[2], by[3], by[4], by[9]
    for i in range(len(gradient)):
        own = min(max(gradient[i], -limit), limit) * unscale
        second[i] = before[i] * keep + own * own * take


@jit
def _update(first, second, update, by):
    of_first, of_second, epsilon = by[5], by[6], by[7]
    for i in range(len(first)):
        update[i] = first[i] * of_first / (math.sqrt(second[i] * of_second) + epsilon)
