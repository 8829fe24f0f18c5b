"""Decisions that must be the same on every rank: made once and sent, or compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


def broadcast_text(text: str | None, group: dist.ProcessGroup, device: torch.device) -> str:
    """Rank 0's text, on every rank.

    Args:
        text: read on rank 0 only.
        group: process group.
        device: on which the group's backend communicates.
    """
    source = dist.get_global_rank(group, 0)
    data = torch.frombuffer(bytearray((text or "").encode() or b" "), dtype=torch.uint8).to(device)
    length = torch.tensor([data.numel()], device=device)
    dist.broadcast(length, source, group=group)
    if dist.get_rank(group) != 0:
        data = torch.empty(int(length), dtype=torch.uint8, device=device)
    dist.broadcast(data, source, group=group)
    return bytes(data.cpu().tolist()).decode()


def check_equal(digest: str, what: str, group: dist.ProcessGroup) -> None:
    """Compares a digest over the ranks.

    Raises:
        RuntimeError: if it differs; names the ranks that differ from rank 0.
    """
    digests: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(digests, digest, group=group)
    different = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if different:
        raise RuntimeError(
            f"{what} differs between ranks: ranks {different} disagree with rank 0. Every rank "
            "must be given the same selection, model and planner"
        )


@contextmanager
def all_or_none(what: str, group: dist.ProcessGroup) -> Iterator[None]:
    """Work that each rank does on its own, and that fails on all ranks if it fails on any.

    Raises:
        RuntimeError: on the ranks that succeeded, if another failed; names it and its error. A rank
            that failed raises its own error.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    errors: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(errors, None if error is None else repr(error), group=group)
    if error is not None:
        raise error
    for rank, message in enumerate(errors):
        if message is not None:
            raise RuntimeError(f"{what} failed on rank {rank}: {message}")


def largest(value: float, group: dist.ProcessGroup, device: torch.device) -> float:
    """The largest of the ranks' values, on every rank; NaN if any is."""
    values = torch.zeros(dist.get_world_size(group), dtype=torch.float64, device=device)
    values[dist.get_rank(group)] = value
    dist.all_reduce(values, group=group)
    return float(values.max())
