"""Conditions whose branches are run for their effects, not for what they return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf


def run_either(condition: tf.Tensor, then: Callable[[], Any], otherwise: Callable[[], Any]) -> None:
    """Runs one of two functions, whatever they return."""

    def only_effects(function: Callable[[], Any]) -> Callable[[], tf.Tensor]:
        def run() -> tf.Tensor:
            function()
            return tf.constant(0)

        return run

    tf.cond(condition, only_effects(then), only_effects(otherwise))
