"""The models that each traced function trains, and how ranks agree on them before its steps.

A rank that traces a function compares notes of its models with the other ranks meanwhile, one model
after the other, before anything of the function runs.  In an elastic job a newcomer does so beside
ranks that have traced theirs before.  So these compare all models of the function, in the same
order, before they begin any operation that waits for another rank.
"""

from __future__ import annotations

import weakref

import tensorflow as tf

from hvd_dls.tensorflow.binding import Binding
from hvd_dls.tensorflow.handles import outermost_graph

_models: weakref.WeakKeyDictionary[tf.Graph, list[Binding]] = weakref.WeakKeyDictionary()


def models_of_function() -> list[Binding]:
    """Returns the models of the function that is being traced; more may come until its end."""
    return _models.setdefault(outermost_graph(), [])


def agree_on(models: list[Binding]) -> None:
    """Has all ranks agree on these models, if ``hvd.init()`` was called since they did."""
    for model in models:
        model.agree_anew()


def agreement() -> tf.Operation | None:
    """Adds an operation to the function being traced that does so; None if none is."""
    if tf.executing_eagerly():
        return None
    models = models_of_function()

    def agree() -> bool:
        agree_on(models)
        return True

    with tf.device("CPU:0"):
        agreed: tf.Operation = tf.py_function(agree, [], tf.bool).op
    return agreed
