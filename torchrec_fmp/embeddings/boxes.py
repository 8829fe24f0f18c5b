"""Shards of a table by rank, as arrays, because a table may have a shard on every rank."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import ParameterSharding, ShardingType

# Rows [row, row + rows) and columns [column, column + columns) of a table, on a rank.
SHARD = np.dtype(
    [
        ("rank", np.int64),
        ("row", np.int64),
        ("column", np.int64),
        ("rows", np.int64),
        ("columns", np.int64),
    ]
)


class Box(NamedTuple):
    """Rows [row, row + rows) and columns [column, column + columns) of a table."""

    row: int
    column: int
    rows: int
    columns: int


def shards_of(
    sharding: ParameterSharding, rows: int, columns: int, world_size: int
) -> NDArray[np.void]:
    """All non-empty shards of a table, in the plan's order.

    Every rank holds a data-parallel table in full.

    Args:
        sharding: the table's sharding in the plan.
        rows: number of rows in the table.
        columns: number of columns in the table.
        world_size: number of ranks.

    Returns:
        (S,) of dtype `SHARD`.
    """
    if sharding.sharding_type == ShardingType.DATA_PARALLEL.value:
        return np.array([(rank, 0, 0, rows, columns) for rank in range(world_size)], dtype=SHARD)
    assert sharding.sharding_spec is not None
    shards = np.array(
        [
            (shard.placement.rank(), *shard.shard_offsets, *shard.shard_sizes)
            for shard in sharding.sharding_spec.shards
        ],
        dtype=SHARD,
    )
    return shards[(shards["rows"] > 0) & (shards["columns"] > 0)]


def is_dense(sharding: ParameterSharding) -> bool:
    """Whether the dense optimizer, rather than a fused one, trains the table."""
    return (
        sharding.sharding_type == ShardingType.DATA_PARALLEL.value
        or sharding.compute_kernel == EmbeddingComputeKernel.DENSE.value
    )
