"""Random placements of a table on simulated ranks."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray
from torchrec.distributed.types import EnumerableShardingSpec, ParameterSharding, ShardMetadata

from torchrec_fmp.embeddings.boxes import SHARD, Box

Shards = NDArray[np.void]
# Row-wise with empty tail ranks needs no kind of its own: `shards_of` leaves the empty shards out.
CUT_KINDS = ("table", "row", "column", "grid", "uneven_grid", "table_row")
KINDS = (*CUT_KINDS, "data_parallel")


def array(*shards: tuple[int, int, int, int, int]) -> Shards:
    """Shards given as (rank, row, column, rows, columns)."""
    return np.array(list(shards), dtype=SHARD)


def box_of(shard: np.void) -> Box:
    return Box(*(int(shard[name]) for name in Box._fields))


def spans(size: int, ends: list[int]) -> list[tuple[int, int]]:
    """(start, length) of the parts of [0, size) between these ends."""
    bounds = sorted({0, size, *(end % size for end in ends)})
    return [(low, high - low) for low, high in zip(bounds, bounds[1:], strict=False)]


@st.composite
def placements(
    draw: st.DrawFn, rows: int, columns: int, ranks: int, kinds: tuple[str, ...] = KINDS
) -> Shards:
    """A table cut into rows, columns, both (each band of columns alike or not) or not at all, or
    held whole by every rank."""
    kind = draw(st.sampled_from(kinds))
    if kind == "data_parallel":
        return array(*((rank, 0, 0, rows, columns) for rank in range(ranks)))
    some_ends = st.lists(st.integers(0, 1000), max_size=min(ranks, 12) - 1)
    by_column = spans(columns, draw(some_ends) if kind in ("column", "grid", "uneven_grid") else [])
    by_row = spans(rows, draw(some_ends) if kind in ("row", "grid", "table_row") else [])
    some_rank = st.integers(0, ranks - 1)
    shards = []
    for column, width in by_column:
        if kind == "uneven_grid":
            by_row = spans(rows, draw(some_ends))
        # Table-row-wise: the ranks of one host, in order.
        first = draw(some_rank)
        for position, (row, height) in enumerate(by_row):
            rank = (first + position) % ranks if kind == "table_row" else draw(some_rank)
            shards.append((rank, row, column, height, width))
    return array(*draw(st.permutations(shards)))


def sharding_of(shards: Shards, kind: str = "row_wise") -> ParameterSharding:
    """A plan's entry for these shards."""
    return ParameterSharding(
        kind,
        "fused",
        sorted({int(rank) for rank in shards["rank"]}),
        EnumerableShardingSpec(
            [
                ShardMetadata([row, column], [rows, columns], f"rank:{rank}/cpu")
                for rank, row, column, rows, columns in shards.tolist()
            ]
        ),
    )
