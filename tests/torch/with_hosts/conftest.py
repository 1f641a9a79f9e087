"""As for the tests on several ranks."""

from tests.torch.with_ranks.conftest import all_ranks_get_here, fresh, horovod

__all__ = ["all_ranks_get_here", "fresh", "horovod"]
