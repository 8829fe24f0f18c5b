"""One rank's work to fill the new tables: copies, and parts to and from other ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from torchrec_fmp.embeddings.boxes import Box
from torchrec_fmp.embeddings.local_shards import LocalShard
from torchrec_fmp.reshard.chunks import Part
from torchrec_fmp.reshard.tables import Tables
from torchrec_fmp.reshard.transfer_plan import plan_transfers

# Row-wise Adagrad with counted weight decay keeps these states equal in all column shards of a row,
# so any shard's value will do.
_COUNTERS = ("prev_iter", "row_counter")


@dataclass
class Itinerary:
    """One rank's work: local copies, and parts to and from each other rank.

    The parts for a rank are in the order in which that rank expects them.
    """

    local: list[tuple[Part, Part]] = field(default_factory=list)
    outgoing: dict[int, list[Part]] = field(default_factory=lambda: defaultdict(list))
    incoming: dict[int, list[Part]] = field(default_factory=lambda: defaultdict(list))


@dataclass(frozen=True)
class _End:
    """One table, at one end of its move.

    Args:
        shards: shards on all ranks, of dtype `SHARD`.
        held: this rank's shards, by the part of the table that each holds.
    """

    shards: NDArray[np.void]
    held: Mapping[Box, LocalShard]

    @staticmethod
    def of(tables: Tables, fqn: str) -> _End:
        return _End(tables.shards[fqn], {shard.box: shard for shard in tables.local[fqn]})

    def parts(self, index: int, box: Box, share: float) -> list[Part]:
        """Views of `box` in one of this rank's shards."""
        return _parts(self.held[_box(self.shards[index])], box, share)


def itinerary(old: Tables, new: Tables, moved: Iterable[tuple[str, str]], rank: int) -> Itinerary:
    """This rank's work to fill the new tables.

    Args:
        old: tables before.
        new: tables after; states that are merged from several column shards are set to zero.
        moved: pair (fqn before, fqn after) of every table that survives.
        rank: this rank.
    """
    todo = Itinerary()
    for source, target in moved:
        before, after = _End.of(old, source), _End.of(new, target)
        transfers = plan_transfers(before.shards, after.shards)
        mine = (transfers["source_rank"] == rank) | (transfers["target_rank"] == rank)
        for transfer in transfers[mine]:
            _add(todo, transfer, before, after, rank)
    return todo


def _add(todo: Itinerary, transfer: np.void, before: _End, after: _End, rank: int) -> None:
    box = _box(transfer)
    share = box.columns / _box(after.shards[transfer["target"]]).columns
    leaving = arriving = None
    if transfer["source_rank"] == rank:
        leaving = before.parts(transfer["source"], box, share)
    if transfer["target_rank"] == rank:
        arriving = after.parts(transfer["target"], box, share)
        for part in arriving:
            if part.share != 1 and part.view.dim() == 1:
                part.view.zero_()
    if leaving is not None and arriving is not None:
        todo.local.extend(zip(leaving, arriving, strict=True))
    elif leaving is not None:
        todo.outgoing[int(transfer["target_rank"])].extend(leaving)
    elif arriving is not None:
        todo.incoming[int(transfer["source_rank"])].extend(arriving)


def _box(shard: np.void | NDArray[np.void]) -> Box:
    return Box(*(int(shard[name]) for name in Box._fields))


def _parts(shard: LocalShard, box: Box, share: float) -> list[Part]:
    """Views of `box` in the shard's weight and states."""
    parts = []
    for name, tensor in shard.tensors.items():
        view = tensor.narrow(0, box.row - shard.box.row, box.rows)
        if view.dim() > 1:
            view = view.narrow(1, box.column - shard.box.column, box.columns)
        of_target = 1.0 if name in _COUNTERS else share
        parts.append(Part(f"{name} of table {shard.table}, {box}", view, of_target))
    return parts


def copy_local(todo: Itinerary) -> None:
    """Does the copies, which need no other rank."""
    for source, target in todo.local:
        target.accept(source.view)
