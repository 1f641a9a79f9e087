"""Ranks of a group that are in different steps, and what ranks of other groups are told."""

import numpy as np
import pytest

from hvd_dls.errors import RanksDisagreeError
from tests.core.world import NAMES, Part, World


def parts(world, rng):
    return [Part(NAMES, set(), set(), world.draw(rng)) for _ in world.ranks]


@pytest.mark.parametrize("exchange", ["allgather", "sparse_allreduce"])
@pytest.mark.parametrize("leaver", range(4))
@pytest.mark.parametrize("sizes", [(1, 3), (3, 1), (2, 2)])
def test_a_step_that_one_rank_alone_gives_up_is_told_everywhere_as_that(sizes, leaver, exchange):
    """Others made the step that the rank gave up after all was sent."""
    options = {"hierarchical": True, "bucket_bytes": 900, "exchange": exchange}
    world, rng = World(sizes, options), np.random.default_rng(5)
    everyone = range(len(world.ranks))
    world.step(parts(world, rng), [NAMES] * 4)
    for number, part in enumerate(parts(world, rng)):
        world.gather(number, part)
    world.receive()
    for number in everyone:
        if number != leaver:
            world.finish(number, NAMES)
    assert world.ranks[leaver].abandon() == {}

    for _ in range(2):  # it stays so, until states are loaded
        for number, part in enumerate(parts(world, rng)):
            world.gather(number, part)
        for rank in world.ranks:
            rank.send_rest()
        for rank in world.ranks:
            with pytest.raises(RanksDisagreeError, match=r"may differ\. Give all ranks the same"):
                rank.receive()
        for rank in world.ranks:
            rank.abandon()
