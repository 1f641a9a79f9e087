"""As for the tests on several ranks."""

from tests.tensorflow.with_ranks.conftest import fresh, horovod

__all__ = ["fresh", "horovod"]
