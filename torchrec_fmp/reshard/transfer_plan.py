"""The transfer plan: which part of which table moves from which rank to which.

Pure functions of shard metadata, so every rank computes the same plan without communication.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.void]
Integers = NDArray[np.int64]

# A box that moves from one shard to another, possibly on the same rank; `source` and `target` are
# positions in the lists of shards.
TRANSFER = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("source", "target", "source_rank", "target_rank"),
            *("row", "column", "rows", "columns"),
        )
    ]
)


@dataclass(frozen=True)
class TableMove:
    """One table's move from the old plan to the new one.

    Args:
        table: fqn of the table.
        sources: shards before, (S,) of dtype `SHARD`.
        targets: shards after, (T,) of dtype `SHARD`.
        bytes_per_element: bytes per element of the weight and of the states of the weight's shape.
        bytes_per_row: bytes per row of the states with one value per row.
    """

    table: str
    sources: Array
    targets: Array
    bytes_per_element: int
    bytes_per_row: int


def plan_transfers(sources: Array, targets: Array) -> Array:
    """Covers every element of every target shard exactly once.

    Several ranks may hold the same box (a data-parallel table). A target is then served by its own
    rank if that rank holds the box, and otherwise by the holders in turn.

    Args:
        sources: shards before, (S,) of dtype `SHARD`.
        targets: shards after, (T,) of dtype `SHARD`.

    Returns:
        (N,) of dtype `TRANSFER`, ordered by target, row and column.

    Raises:
        ValueError: if the sources overlap without being equal, or do not cover a target.
    """
    boxes = sources[["row", "column", "rows", "columns"]]
    distinct, first, holders = np.unique(boxes, return_index=True, return_inverse=True)
    _check_disjoint(distinct)
    box, target = _overlaps(distinct, targets)
    transfers = np.zeros(len(box), dtype=TRANSFER)
    transfers["target"] = target
    transfers["target_rank"] = targets["rank"][target]
    for start, size in (("row", "rows"), ("column", "columns")):
        low = np.maximum(distinct[start][box], targets[start][target])
        high = np.minimum(
            distinct[start][box] + distinct[size][box],
            targets[start][target] + targets[size][target],
        )
        transfers[start], transfers[size] = low, high - low
    covered = np.zeros(len(targets), dtype=np.int64)
    np.add.at(covered, target, transfers["rows"] * transfers["columns"])
    missing = np.flatnonzero(covered != targets["rows"] * targets["columns"])
    if len(missing):
        raise ValueError(f"the old shards do not cover {targets[missing[0]]}: {sources}")
    if len(distinct) == len(sources):
        transfers["source"] = first[box]
    else:
        transfers["source"] = _holders(sources, holders.reshape(-1), box, transfers)
    transfers["source_rank"] = sources["rank"][transfers["source"]]
    return transfers[np.lexsort((transfers["column"], transfers["row"], transfers["target"]))]


def link_bytes(moves: Iterable[TableMove], world_size: int) -> Integers:
    """Bytes from every rank to every rank.

    Returns:
        (world_size, world_size) int64, [i, j] from rank i to rank j; the diagonal is copied within
        the rank.
    """
    total = np.zeros((world_size, world_size), dtype=np.int64)
    for move in moves:
        transfers = plan_transfers(move.sources, move.targets)
        per_row = transfers["columns"] * move.bytes_per_element + move.bytes_per_row
        link = (transfers["source_rank"], transfers["target_rank"])
        np.add.at(total, link, transfers["rows"] * per_row)
    return total


def _overlaps(boxes: Array, others: Array) -> tuple[Integers, Integers]:
    """Positions in `boxes` and `others` of every pair that shares an element.

    The boxes of each band of columns are sorted by row, so two binary searches find the boxes that
    a row range meets.
    """
    pairs: list[tuple[Integers, Integers]] = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
    for column, columns, members in _bands(boxes):
        order = members[np.argsort(boxes["row"][members], kind="stable")]
        starts = boxes["row"][order]
        ends = starts + boxes["rows"][order]
        near = np.flatnonzero(
            (others["column"] < column + columns) & (others["column"] + others["columns"] > column)
        )
        first = np.searchsorted(ends, others["row"][near], side="right")
        last = np.searchsorted(starts, others["row"][near] + others["rows"][near], side="left")
        counts = last - first
        # Counts 0, 1, ... within the boxes that each other box meets.
        step = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        pairs.append((order[np.repeat(first, counts) + step], np.repeat(near, counts)))
    found, met = zip(*pairs, strict=True)
    return np.concatenate(found), np.concatenate(met)


def _bands(boxes: Array) -> Iterator[tuple[int, int, Integers]]:
    """(column, columns, positions of the boxes) of every distinct range of columns."""
    ranges, inverse = np.unique(boxes[["column", "columns"]], return_inverse=True)
    inverse = inverse.reshape(-1)
    members = np.split(np.argsort(inverse, kind="stable"), np.cumsum(np.bincount(inverse)))[:-1]
    for (column, columns), positions in zip(ranges.tolist(), members, strict=True):
        yield column, columns, positions


def _check_disjoint(boxes: Array) -> None:
    in_order = True
    for _, _, members in _bands(boxes):
        rows = np.sort(boxes[["row", "rows"]][members])
        in_order &= bool((rows["row"][1:] >= (rows["row"] + rows["rows"])[:-1]).all())
    if not in_order or len(_overlaps(boxes, boxes)[0]) != len(boxes):
        raise ValueError(f"old shards overlap without being copies of each other: {boxes}")


def _holders(sources: Array, box_of: Integers, box: Integers, transfers: Array) -> Integers:
    """The source shard that serves each transfer, among the shards that hold its box."""
    chosen = np.empty(len(transfers), dtype=np.int64)
    ranks_of: dict[int, Integers] = {}
    for position, (index, target_rank) in enumerate(
        zip(box.tolist(), transfers["target_rank"].tolist(), strict=True)
    ):
        if index not in ranks_of:
            ranks_of[index] = np.flatnonzero(box_of == index)
        holders = ranks_of[index]
        own = holders[sources["rank"][holders] == target_rank]
        chosen[position] = own[0] if len(own) else holders[target_rank % len(holders)]
    return chosen
