"""Boxes: which part of a table a rank holds, and which part goes from where to where.

Pure functions of shard metadata, so every rank computes the same transfers without communication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torchrec.distributed.types import ParameterSharding, ShardingType


@dataclass(frozen=True, order=True)
class Box:
    """Rows [row, row + rows) and columns [column, column + columns) of a table."""

    row: int
    column: int
    rows: int
    columns: int

    def intersect(self, other: Box) -> Box | None:
        """What both cover, None if nothing."""
        row = max(self.row, other.row)
        column = max(self.column, other.column)
        rows = min(self.row + self.rows, other.row + other.rows) - row
        columns = min(self.column + self.columns, other.column + other.columns) - column
        return Box(row, column, rows, columns) if rows > 0 and columns > 0 else None


@dataclass(frozen=True, order=True)
class Shard:
    """A box of a table and the rank that holds it."""

    rank: int
    box: Box


@dataclass(frozen=True)
class Transfer:
    """`box` goes from one shard to another, which may lie on the same rank."""

    source: Shard
    target: Shard
    box: Box


def shards_of(sharding: ParameterSharding, rows: int, columns: int, world_size: int) -> list[Shard]:
    """All shards of a table, in the plan's order; every rank holds a data-parallel table whole."""
    if sharding.sharding_type == ShardingType.DATA_PARALLEL.value:
        return [Shard(rank, Box(0, 0, rows, columns)) for rank in range(world_size)]
    assert sharding.sharding_spec is not None
    shards = []
    for shard in sharding.sharding_spec.shards:
        (row, column), (height, width) = shard.shard_offsets, shard.shard_sizes
        shards.append(Shard(shard.placement.rank(), Box(row, column, height, width)))
    return [shard for shard in shards if shard.box.rows > 0 and shard.box.columns > 0]


def plan_transfers(sources: Sequence[Shard], targets: Sequence[Shard]) -> list[Transfer]:
    """Covers every element of every target shard exactly once.

    Where several ranks hold a box (a data-parallel table), the target's own copy is taken, or else
    the lowest rank's.

    Raises:
        ValueError: if the sources do not cover a target.
    """
    distinct: dict[Box, list[Shard]] = {}
    for shard in sources:
        distinct.setdefault(shard.box, []).append(shard)
    transfers = []
    for target in targets:
        covered = 0
        for box, holders in distinct.items():
            overlap = box.intersect(target.box)
            if overlap is None:
                continue
            source = min(holders, key=lambda holder: (holder.rank != target.rank, holder.rank))
            transfers.append(Transfer(source, target, overlap))
            covered += overlap.rows * overlap.columns
        if covered != target.box.rows * target.box.columns:
            raise ValueError(f"the old shards do not cover {target} exactly once: {list(sources)}")
    return transfers
