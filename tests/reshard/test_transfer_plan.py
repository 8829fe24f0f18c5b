"""Transfers between any two plans, for up to 64 ranks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.support.placements import CUT_KINDS, KINDS, Shards, array, box_of, placements
from torchrec_fmp.embeddings.boxes import Box
from torchrec_fmp.reshard.transfer_plan import TableMove, link_bytes, plan_transfers


class Move(NamedTuple):
    rows: int
    columns: int
    ranks: int
    sources: Shards
    targets: Shards


@st.composite
def moves(
    draw: st.DrawFn, old: tuple[str, ...] = KINDS, new: tuple[str, ...] = KINDS, ranks: int = 0
) -> Move:
    rows, columns = draw(st.integers(1, 30)), draw(st.integers(1, 16))
    ranks = ranks or draw(st.integers(1, 64))
    sources = draw(placements(rows, columns, ranks, old))
    return Move(rows, columns, ranks, sources, draw(placements(rows, columns, ranks, new)))


def within(box: Box, other: Box) -> bool:
    return (
        other.row <= box.row
        and other.column <= box.column
        and box.row + box.rows <= other.row + other.rows
        and box.column + box.columns <= other.column + other.columns
    )


@settings(deadline=None)
@given(moves())
def test_every_element_of_every_new_shard_comes_exactly_once_from_a_shard_that_holds_it(
    move: Move,
) -> None:
    arrived = [np.zeros((target["rows"], target["columns"])) for target in move.targets]
    for transfer in plan_transfers(move.sources, move.targets):
        source, target = move.sources[transfer["source"]], move.targets[transfer["target"]]
        box = box_of(transfer)
        assert transfer["source_rank"] == source["rank"]
        assert transfer["target_rank"] == target["rank"]
        assert within(box, box_of(source)) and within(box, box_of(target))
        row, column = box.row - target["row"], box.column - target["column"]
        arrived[transfer["target"]][row : row + box.rows, column : column + box.columns] += 1
    for target, count in zip(move.targets, arrived, strict=True):
        assert (count == 1).all(), target


@settings(deadline=None)
@given(moves())
def test_transfers_are_ordered_by_target_row_and_column(move: Move) -> None:
    order = plan_transfers(move.sources, move.targets)[["target", "row", "column"]].tolist()
    assert order == sorted(order)


@settings(deadline=None)
@given(moves())
def test_elements_that_a_rank_already_holds_are_not_sent(move: Move) -> None:
    transfers = plan_transfers(move.sources, move.sources)
    assert (transfers["source_rank"] == transfers["target_rank"]).all()


@settings(deadline=None)
@given(moves(old=("data_parallel",)))
def test_a_table_that_every_rank_holds_is_never_sent(move: Move) -> None:
    transfers = plan_transfers(move.sources, move.targets)
    assert (transfers["source_rank"] == transfers["target_rank"]).all()


@given(st.integers(1, 64).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_copies_come_from_their_own_rank_or_from_the_holders_in_turn(
    ranks_and_holders: tuple[int, set[int]],
) -> None:
    ranks, holders = ranks_and_holders
    assume(holders)
    sources = array(*((rank, 0, 0, 5, 4) for rank in holders))
    transfers = plan_transfers(sources, array(*((rank, 0, 0, 5, 4) for rank in range(ranks))))
    served_by = dict(transfers[["target_rank", "source_rank"]].tolist())
    assert served_by.keys() == set(range(ranks))
    assert all(served_by[rank] == rank for rank in holders)
    served = np.bincount([served_by[rank] for rank in range(ranks) if rank not in holders] or [0])
    assert served.max() <= -(-ranks // len(holders))


@settings(deadline=None)
@given(moves(), st.data())
def test_shards_that_do_not_cover_a_target_are_refused(move: Move, data: st.DataObject) -> None:
    lost = data.draw(st.sampled_from([box_of(shard) for shard in move.sources]))
    left = move.sources[[box_of(shard) != lost for shard in move.sources]]
    with pytest.raises(ValueError, match="the old shards do not cover"):
        plan_transfers(left, array((0, 0, 0, move.rows, move.columns)))


@settings(deadline=None)
@given(moves(old=CUT_KINDS), st.data())
def test_shards_that_overlap_without_being_copies_are_refused(
    move: Move, data: st.DataObject
) -> None:
    rows, columns = move.rows, move.columns
    row, column = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    height = data.draw(st.integers(1, rows - row))
    width = data.draw(st.integers(1, columns - column))
    intruder = Box(row, column, height, width)
    assume(intruder not in [box_of(shard) for shard in move.sources])
    sources = np.concatenate([move.sources, array((0, *intruder))])
    shuffled = array(*data.draw(st.permutations(sources.tolist())))
    with pytest.raises(ValueError, match="overlap without being copies of each other"):
        plan_transfers(shuffled, move.targets)


BYTES = st.integers(0, 12)


def brute_force(move: Move, per_element: int, per_row: int) -> NDArray[np.int64]:
    """Counted element by element; no element of `sources` lies on two ranks."""
    owner = np.zeros((move.rows, move.columns), dtype=np.int64)
    for position, source in enumerate(move.sources):
        row, column, rows, columns = box_of(source)
        owner[row : row + rows, column : column + columns] = position
    links = np.zeros((move.ranks, move.ranks), dtype=np.int64)
    for target in move.targets:
        row, column, rows, columns = box_of(target)
        block = owner[row : row + rows, column : column + columns]
        for position in np.unique(block):
            here = block == position
            size = here.sum() * per_element + here.any(axis=1).sum() * per_row
            links[move.sources["rank"][position], target["rank"]] += size
    return links


@settings(deadline=None)
@given(
    st.integers(1, 64).flatmap(
        lambda ranks: st.lists(
            st.tuples(moves(old=CUT_KINDS, ranks=ranks), BYTES, BYTES), min_size=1, max_size=3
        )
    )
)
def test_link_bytes_equal_a_count_element_by_element(
    tables: list[tuple[Move, int, int]],
) -> None:
    ranks = tables[0][0].ranks
    planned = [
        TableMove(f"t{i}", move.sources, move.targets, per_element, per_row)
        for i, (move, per_element, per_row) in enumerate(tables)
    ]
    expected = sum(brute_force(*table) for table in tables)
    assert np.array_equal(link_bytes(planned, ranks), expected)


def test_link_bytes_of_no_table_are_zero() -> None:
    assert link_bytes([], 2).tolist() == [[0, 0], [0, 0]]
