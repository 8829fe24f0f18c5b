"""Moves tables from rank to rank, box by box.

A rank holds its old and its new shards and, of one table at a time, what it sends and receives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from torchrec_fmp.reshard.boxes import Box, Shard, Transfer, plan_transfers
from torchrec_fmp.reshard.local_shards import LocalShard

_WEIGHT = "weight"


def move_table(
    old: Sequence[LocalShard],
    new: Sequence[LocalShard],
    sources: Sequence[Shard],
    targets: Sequence[Shard],
    group: dist.ProcessGroup,
) -> None:
    """Fills the new local shards of one table, weights and fused optimizer state.

    A state with one value a row (row-wise Adagrad) is kept once per column shard. Where a new
    column shard is made of several old ones its state is their width-weighted mean, which is what
    row-wise Adagrad's mean of squared gradients over the columns would be; where it is a part of an
    old one, it is copied.

    Every rank of the group calls this with its own shards and the same `sources` and `targets`.

    Args:
        old: this rank's shards of the table before.
        new: this rank's shards of the table after; overwritten.
        sources: all ranks' shards before.
        targets: all ranks' shards after.
        group: process group that both plans are for.

    Raises:
        ValueError: if old and new shards have different optimizer states.
    """
    rank = dist.get_rank(group)
    old_by_box = {shard.box: shard for shard in old}
    new_by_box = {shard.box: shard for shard in new}
    for shard in new:
        for state in shard.states.values():
            state.zero_()
    operations: list[dist.P2POp] = []
    received: list[tuple[Tensor, Tensor, float]] = []
    for transfer in plan_transfers(sources, targets):
        share = transfer.box.columns / transfer.target.box.columns
        here = transfer.source.rank == rank
        if here and transfer.target.rank == rank:
            parts = _parts(old_by_box, transfer.source.box, transfer.box)
            into = _parts(new_by_box, transfer.target.box, transfer.box)
            _check_states(parts, into, transfer)
            for name, part in parts.items():
                _write(into[name], part, share)
        elif here:
            peer = dist.get_global_rank(group, transfer.target.rank)
            for part in _parts(old_by_box, transfer.source.box, transfer.box).values():
                operations.append(dist.P2POp(dist.isend, part.contiguous(), peer, group))
        elif transfer.target.rank == rank:
            peer = dist.get_global_rank(group, transfer.source.rank)
            for view in _parts(new_by_box, transfer.target.box, transfer.box).values():
                buffer = torch.empty(view.shape, dtype=view.dtype, device=view.device)
                operations.append(dist.P2POp(dist.irecv, buffer, peer, group))
                received.append((view, buffer, share))
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    for view, buffer, share in received:
        _write(view, buffer, share)


def _parts(shards: Mapping[Box, LocalShard], holder: Box, box: Box) -> dict[str, Tensor]:
    """Views of `box` in the shard's weight and states, in an order that all ranks share."""
    shard = shards[holder]
    tensors = {_WEIGHT: shard.weight, **dict(sorted(shard.states.items()))}
    return {name: _narrow(tensor, holder, box) for name, tensor in tensors.items()}


def _narrow(tensor: Tensor, holder: Box, box: Box) -> Tensor:
    rows = tensor.narrow(0, box.row - holder.row, box.rows)
    return rows if tensor.dim() == 1 else rows.narrow(1, box.column - holder.column, box.columns)


def _write(view: Tensor, value: Tensor, share: float) -> None:
    """Copies; of a state with one value a row, adds the share that the value's columns have."""
    if view.dim() == 1 and share < 1:
        view.add_(value, alpha=share)
    else:
        view.copy_(value)


def _check_states(old: Mapping[str, Tensor], new: Mapping[str, Tensor], transfer: Transfer) -> None:
    if old.keys() != new.keys():
        raise ValueError(
            f"{transfer.target} has the optimizer states {sorted(new)} where the old table has "
            f"{sorted(old)}: the fused optimizer must not change, and a table cannot move between "
            "data-parallel and other sharding types, whose optimizer is not fused"
        )
