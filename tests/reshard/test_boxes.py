"""Transfers between any two plans, for up to 64 ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ParameterSharding,
    ShardingType,
    ShardMetadata,
)

from torchrec_fmp.reshard.boxes import Box, Shard, plan_transfers, shards_of


def cuts(size: int, ends: list[int]) -> list[tuple[int, int]]:
    """(start, length) of the parts of [0, size) between these ends."""
    bounds = sorted({0, size, *(end % size for end in ends)})
    return [(low, high - low) for low, high in zip(bounds, bounds[1:], strict=False)]


@st.composite
def placements(draw: st.DrawFn, rows: int, columns: int) -> list[Shard]:
    """A table cut into rows, columns, both or not at all, or held whole by every rank."""
    ranks = draw(st.integers(1, 64))
    kind = draw(st.sampled_from(["table", "row", "column", "grid", "data_parallel"]))
    if kind == "data_parallel":
        return [Shard(rank, Box(0, 0, rows, columns)) for rank in range(ranks)]
    ends = st.lists(st.integers(0, 1000), max_size=ranks - 1)
    by_row = cuts(rows, draw(ends) if kind in ("row", "grid") else [])
    by_column = cuts(columns, draw(ends) if kind in ("column", "grid") else [])
    return [
        Shard(draw(st.integers(0, ranks - 1)), Box(row, column, height, width))
        for row, height in by_row
        for column, width in by_column
    ]


@st.composite
def moves(draw: st.DrawFn) -> tuple[int, int, list[Shard], list[Shard]]:
    rows, columns = draw(st.integers(1, 30)), draw(st.integers(1, 16))
    return rows, columns, draw(placements(rows, columns)), draw(placements(rows, columns))


@settings(deadline=None)
@given(moves())
def test_every_element_of_every_new_shard_comes_exactly_once_from_a_shard_that_holds_it(
    move: tuple[int, int, list[Shard], list[Shard]],
) -> None:
    _, _, sources, targets = move
    arrived = {target: torch.zeros(target.box.rows, target.box.columns) for target in targets}
    for transfer in plan_transfers(sources, targets):
        assert transfer.source in sources
        assert transfer.box.intersect(transfer.source.box) == transfer.box
        assert transfer.box.intersect(transfer.target.box) == transfer.box
        row = transfer.box.row - transfer.target.box.row
        column = transfer.box.column - transfer.target.box.column
        rows, columns = transfer.box.rows, transfer.box.columns
        arrived[transfer.target][row : row + rows, column : column + columns] += 1
    for target, count in arrived.items():
        assert (count == 1).all(), target


@settings(deadline=None)
@given(moves())
def test_what_a_rank_holds_already_does_not_travel(
    move: tuple[int, int, list[Shard], list[Shard]],
) -> None:
    _, _, sources, _ = move
    for transfer in plan_transfers(sources, sources):
        assert transfer.source.rank == transfer.target.rank


@settings(deadline=None)
@given(moves(), st.data())
def test_shards_that_do_not_cover_a_target_are_refused(
    move: tuple[int, int, list[Shard], list[Shard]], data: st.DataObject
) -> None:
    rows, columns, sources, _ = move
    whole = [Shard(0, Box(0, 0, rows, columns))]
    lost = data.draw(st.sampled_from(sorted({shard.box for shard in sources})))
    left = [shard for shard in sources if shard.box != lost]
    with pytest.raises(ValueError, match="the old shards do not cover Shard"):
        plan_transfers(left, whole)


def test_shards_that_overlap_are_refused() -> None:
    sources = [Shard(0, Box(0, 0, 3, 4)), Shard(1, Box(2, 0, 2, 4))]
    with pytest.raises(ValueError, match="do not cover .* exactly once"):
        plan_transfers(sources, [Shard(0, Box(0, 0, 4, 4))])


boxes = st.builds(Box, *[st.integers(0, 6)] * 2, *[st.integers(1, 6)] * 2)


def cells(box: Box) -> set[tuple[int, int]]:
    rows = range(box.row, box.row + box.rows)
    return {(row, c) for row in rows for c in range(box.column, box.column + box.columns)}


@given(boxes, boxes)
def test_the_intersection_is_what_both_boxes_cover(one: Box, other: Box) -> None:
    both = one.intersect(other)
    assert (cells(both) if both else set()) == cells(one) & cells(other)
    assert both == other.intersect(one)


def sharding(boxes: list[tuple[int, list[int], list[int]]]) -> ParameterSharding:
    shards = [ShardMetadata(offsets, sizes, f"rank:{rank}/cpu") for rank, offsets, sizes in boxes]
    return ParameterSharding(
        ShardingType.ROW_WISE.value, "fused", [0, 1], EnumerableShardingSpec(shards)
    )


def test_empty_shards_of_a_plan_are_left_out() -> None:
    plan = EmbeddingModuleShardingPlan(
        t=sharding([(0, [0, 0], [1, 4]), (1, [1, 0], [0, 4]), (2, [1, 0], [1, 4])])
    )
    assert shards_of(plan["t"], 2, 4, 3) == [Shard(0, Box(0, 0, 1, 4)), Shard(2, Box(1, 0, 1, 4))]


def test_every_rank_holds_a_data_parallel_table_whole() -> None:
    held = shards_of(ParameterSharding(ShardingType.DATA_PARALLEL.value, "dense"), 5, 4, 3)
    assert held == [Shard(rank, Box(0, 0, 5, 4)) for rank in range(3)]
    to = [Shard(rank, Box(0, 0, 5, 4)) for rank in range(3)]
    assert all(t.source.rank == t.target.rank for t in plan_transfers(held, to))
