"""As for the tests on several ranks."""

from tests.keras.with_ranks.conftest import all_ranks_get_here, horovod

__all__ = ["all_ranks_get_here", "horovod"]
