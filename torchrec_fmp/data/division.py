"""The division of a data set's rows among ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """Rows [start, stop) of the row group at position `group`."""

    group: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


def quotas(rows: int, world_size: int) -> list[int]:
    """The number of rows of each rank: equal, the first `rows % world_size` ranks one more."""
    share, more = divmod(rows, world_size)
    return [share + (rank < more) for rank in range(world_size)]


def divide(group_rows: Sequence[int], world_size: int, order: Sequence[int]) -> list[list[Segment]]:
    """Gives every row to exactly one rank, and to every rank exactly its quota.

    Row groups are taken in `order`; each goes to the rank that has the fewest rows so far (the
    lowest such rank) and is split only where that rank's quota ends. So at most `world_size - 1`
    cuts are made, and the result depends on the arguments alone: every rank computes the same.

    Args:
        group_rows: rows of each row group.
        world_size: number of ranks.
        order: a permutation of the positions of `group_rows`.

    Returns:
        For each rank its segments, in `order`.
    """
    room = quotas(sum(group_rows), world_size)
    held = [0] * world_size
    segments: list[list[Segment]] = [[] for _ in range(world_size)]
    for group in order:
        start = 0
        while start < group_rows[group]:
            rank = min((r for r in range(world_size) if room[r]), key=lambda r: held[r])
            rows = min(room[rank], group_rows[group] - start)
            segments[rank].append(Segment(group, start, start + rows))
            room[rank] -= rows
            held[rank] += rows
            start += rows
    return segments
