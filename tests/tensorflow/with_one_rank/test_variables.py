"""Names of variables that ranks compare: without what Keras numbers by itself."""

import subprocess
import sys

import keras
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_dls.tensorflow.variables import layer_specs_of, stable_names

some = settings(derandomize=True, deadline=None, max_examples=200)
WORDS = ["dense", "sequential", "conv2d", "kernel", "block_a", "a#1", "x.3", "01", ""]
counters = st.lists(st.integers(0, 12), max_size=2)
parts = st.builds(
    lambda word, numbers: "_".join([word, *map(str, numbers)]), st.sampled_from(WORDS), counters
)
paths = st.builds("/".join, st.lists(parts, min_size=1, max_size=3))
models = st.lists(paths, max_size=12)
# Of each word, the counters of a model's layers: those of the same process, in order.
layers = st.lists(
    st.lists(st.tuples(st.sampled_from(WORDS[:3]), st.integers(0, 5)), min_size=1, max_size=3),
    max_size=10,
)


def automatic(word, counter):
    """A name as Keras makes it."""
    return f"{word}_{counter}" if counter else word


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["sequential_3/dense_7/kernel", "sequential_3/dense_8/kernel"],
            ["sequential/dense/kernel", "sequential/dense_1/kernel"],
        ),
        (
            ["sequential/dense/kernel", "sequential/dense_1/kernel"],
            ["sequential/dense/kernel", "sequential/dense_1/kernel"],
        ),
        (["dense_9/kernel", "dense_10/kernel"], ["dense/kernel", "dense_1/kernel"]),
        (["b_2", "b_1"], ["b_1", "b"]),  # not what b_1, b_2 is: layers that changed places
        (["Variable_2", "Variable_2", "w"], ["Variable", "Variable.1", "w"]),
        (["a", "a", "a.1"], ["a", "a.1", "a.1.2"]),
        (["a.3", "a", "b", "a"], ["a.3", "a", "b", "a.3.3"]),
        (["a_1_2", "a_3", "a_5"], ["a", "a_1", "a_2"]),
        (["l_1", "l_01"], ["l_1", "l"]),
        (["block_1_expand/kernel", "block_2_expand/kernel"],) * 2,
        ([], []),
    ],
)
def test_examples(names, expected):
    assert stable_names(names) == expected


@some
@given(models)
def test_names_of_one_model_are_all_different(names):
    stable = stable_names(names)
    assert len(set(stable)) == len(stable) == len(names)


@some
@given(models)
def test_stable_names_stay_as_they_are(names):
    stable = stable_names(list(dict.fromkeys(names)))
    assert stable_names(stable) == stable


@some
@given(
    layers,
    st.dictionaries(
        st.sampled_from(WORDS[:3]), st.lists(st.integers(1, 9), min_size=6, max_size=6)
    ),
)
def test_other_models_of_the_process_do_not_matter(model, made_before):
    """Layers made in between shift counters, but keep their order."""

    def shifted(word, counter):
        return automatic(word, counter + sum(made_before.get(word, [0] * 6)[: counter + 1]))

    alone = ["/".join(automatic(*part) for part in path) for path in model]
    among_others = ["/".join(shifted(*part) for part in path) for path in model]
    assert stable_names(among_others) == stable_names(alone)


@some
@given(st.lists(st.integers(0, 20), unique=True, min_size=2, max_size=6), st.randoms())
def test_layers_that_changed_places_are_told_apart(numbers, random):
    order = [automatic("dense", i) for i in numbers]
    other = random.sample(order, len(order))
    assert (stable_names(order) == stable_names(other)) == (order == other)


def test_layers_have_the_names_that_users_know_and_stable_ones():
    def model():
        built = keras.Sequential([keras.layers.Dense(3), keras.layers.Dense(2)])
        built.build((1, 4))
        return layer_specs_of(built.trainable_variables)

    first, second = model(), model()
    assert [x.name for x in first] != [x.name for x in second]
    assert [x.stable_name for x in first] == [x.stable_name for x in second]
    assert first[0].stable_name != first[2].stable_name
    named = layer_specs_of([tf.Variable(tf.zeros(3), name="w"), tf.Variable(tf.zeros(3), name="w")])
    assert [x.name for x in named] == [x.stable_name for x in named] == ["w", "w.1"]


def test_tf_keras_too():
    program = """
import tf_keras
from hvd_dls.tensorflow.variables import layer_specs_of
def model():
    built = tf_keras.Sequential([tf_keras.layers.Dense(3), tf_keras.layers.Dense(2)])
    built.build((1, 4))
    return layer_specs_of(built.trainable_variables)
first, second = model(), model()
assert [x.name for x in first] != [x.name for x in second], first
assert [x.stable_name for x in first] == [x.stable_name for x in second]
print("the same")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "the same", done.stderr
