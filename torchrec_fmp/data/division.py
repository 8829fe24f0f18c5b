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
    """The number of rows of each rank: equal, plus one for the first `rows % world_size` ranks."""
    share, more = divmod(rows, world_size)
    return [share + (rank < more) for rank in range(world_size)]


def divide(group_rows: Sequence[int], world_size: int, order: Sequence[int]) -> list[list[Segment]]:
    """Gives every row to exactly one rank, and every rank exactly its quota.

    Row groups are assigned in `order`. Each goes to the rank with the fewest rows so far (the
    lowest such rank) and is split only where that rank's quota ends, so there are at most
    `world_size - 1` splits. The result depends on the arguments alone, so it is the same on every
    rank.

    Args:
        group_rows: number of rows in each row group.
        world_size: number of ranks.
        order: a permutation of the positions of `group_rows`.

    Returns:
        The segments of each rank, in `order`.
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
