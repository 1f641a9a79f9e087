"""Everything in with_ranks/, as real horovodrun jobs of 2 and 4 ranks; and with_one_rank/.

And Keras 3's where the job can be the same: importing TensorFlow on all ranks takes its time.
"""

from tests.jobs import needs, pytest_on_ranks

pytestmark = needs("tensorflow")

HERE = "tests/tensorflow/with_ranks"
KERAS = "tests/keras/with_ranks/test_keras3.py"
KERAS_UNEVEN = "tests/keras/with_ranks/test_uneven_data.py"
UNEVEN = "test_density_1_trains_as_horovod_does_with_zeros"


def test_tensorflow_and_keras_3_in_a_process_of_their_own():
    """Because horovod.torch and horovod.tensorflow do not go into one."""
    output = pytest_on_ranks(1, "tests/tensorflow/with_one_rank", "tests/keras/with_one_rank")
    assert output.count(" passed") == 1, output


def test_tensorflow_on_two_ranks():
    output = pytest_on_ranks(2, HERE)
    assert output.count(" passed") == 2, output


def test_tensorflow_and_keras_3_on_four_ranks_with_one_thread_for_operations():
    """With one thread, an operation that waits for another rank would wait for ever."""
    output = pytest_on_ranks(
        4,
        *(
            f"{HERE}/test_laws.py::test_parameters_and_ratios_agree_to_the_bit[{mode}-{{}}]"
            for mode in ("eager", "tf.function")
        ),
        f"{HERE}/test_laws.py::test_nothing_is_lost[tf.function-float32]",
        f"{HERE}/test_laws.py::test_the_average_is_that_of_all_ranks_entries",
        f"{HERE}/test_laws.py::test_at_density_one_training_equals_dense_training[eager-average]",
        f"{HERE}/test_horovod_options.py::test_process_sets",
        f"{HERE}/test_horovod_options.py::test_two_models_in_one_function",
        f"{HERE}/test_sparse_allreduce.py",
        f"{HERE}/test_uneven_data.py::{UNEVEN}[tf.function-first]",
        f"{KERAS}::test_fit_with_a_smaller_last_batch[dls]",
        f"{KERAS}::test_fit_with_a_smaller_last_batch[owners]",
        f"{KERAS}::test_custom_loop[dls-eager-apply_gradients]",
        f"{KERAS}::test_nothing_is_lost",
        f"{KERAS}::test_process_sets[dls]",
        f"{KERAS_UNEVEN}::{UNEVEN}[convolution-last-False-options1]",
        env={"TF_NUM_INTEROP_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1"},
    )
    assert output.count(" passed") == 4, output
