"""The part of a table that each rank holds."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from torchrec.distributed.types import ParameterSharding, ShardingType

from tests.support.placements import CUT_KINDS, array, placements, sharding_of
from torchrec_fmp.embeddings.boxes import SHARD, shards_of


def test_empty_shards_of_a_plan_are_left_out() -> None:
    plan = sharding_of(array((0, 0, 0, 1, 4), (1, 1, 0, 0, 4), (2, 1, 0, 1, 4), (3, 2, 0, 0, 4)))
    assert (shards_of(plan, 2, 4, 4) == array((0, 0, 0, 1, 4), (2, 1, 0, 1, 4))).all()


def test_a_table_of_one_row_over_many_ranks_is_one_shard() -> None:
    plan = sharding_of(array((0, 0, 0, 1, 8), *((rank, 1, 0, 0, 8) for rank in range(1, 64))))
    assert shards_of(plan, 1, 8, 64).tolist() == [(0, 0, 0, 1, 8)]


def test_every_rank_holds_the_whole_of_a_data_parallel_table() -> None:
    held = shards_of(ParameterSharding(ShardingType.DATA_PARALLEL.value, "dense"), 5, 4, 3)
    assert held.dtype == SHARD
    assert held.tolist() == [(rank, 0, 0, 5, 4) for rank in range(3)]


@given(st.data(), st.integers(1, 30), st.integers(1, 16), st.integers(1, 64))
def test_shards_match_the_plan_and_its_order(
    data: st.DataObject, rows: int, columns: int, ranks: int
) -> None:
    planned = data.draw(placements(rows, columns, ranks, CUT_KINDS))
    held = shards_of(sharding_of(planned), rows, columns, ranks)
    assert held.dtype == SHARD
    assert np.array_equal(held, planned)
