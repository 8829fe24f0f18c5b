"""`reshard_tables`: fills the new model's tables from the old model's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist

from torchrec_fmp.distributed.agreement import Lease, all_or_none, watched
from torchrec_fmp.reshard.itinerary import Itinerary, copy_local, itinerary
from torchrec_fmp.reshard.mover import exchange
from torchrec_fmp.reshard.tables import Tables
from torchrec_fmp.surgery.cut_map import CutMap


@dataclass(frozen=True)
class MoveConfig:
    """How tables move from rank to rank.

    Args:
        staging: place of the old tables during the move. `none` leaves them where they are until
            the new ones are complete. `host` moves them to host memory (a CPU's into a
            memory-mapped file) and frees device memory before the new ones are built. `auto` stages
            only where old and new tables do not fit side by side by the planner's figures.
        chunk_bytes: memory that messages between ranks may take on each rank, in bytes.
        checksums: whether to compare a CRC-32 of each message, to find a network or a memory that
            corrupts data; costs about a second per GB.
        timeout_seconds: timeout of a message, and of the wait for the slowest rank.

    Raises:
        ValueError: if a number is not positive.
    """

    staging: Literal["auto", "none", "host"] = "auto"
    chunk_bytes: int = 64 * 2**20
    checksums: bool = False
    timeout_seconds: float = 600.0

    def __post_init__(self) -> None:
        if self.chunk_bytes <= 0 or not self.timeout_seconds > 0:
            raise ValueError(
                f"chunk_bytes is {self.chunk_bytes} and timeout_seconds {self.timeout_seconds}; "
                "both must be positive"
            )

    @property
    def timeout(self) -> timedelta:
        """`timeout_seconds` as a timedelta."""
        return timedelta(seconds=self.timeout_seconds)


def check_layouts(old: Tables, new: Tables, cut_map: CutMap) -> None:
    """Checks that old and new tables keep the same states; the outcome is the same on every rank.

    Raises:
        ValueError: if a table's dtype or optimizer states would change.
    """
    for fqn, layout in new.layouts.items():
        before = old.layouts[cut_map.tensors[fqn].source]
        if layout.dtype != before.dtype or layout.states != before.states:
            raise ValueError(
                f"{fqn} has a weight of {layout.dtype} with the optimizer states "
                f"{dict(layout.states)}, but the old table has {before.dtype} with "
                f"{dict(before.states)}: dtype and fused optimizer must not change"
            )


@torch.no_grad()
def reshard_tables(
    old: Tables,
    new: Tables,
    cut_map: CutMap,
    group: dist.ProcessGroup,
    device: torch.device,
    config: MoveConfig,
    lease: Lease | None = None,
) -> None:
    """Moves every surviving table and its optimizer state; sets step counters and hyperparameters.

    Collective. The ranks exchange through a separate process group, so that a failure leaves
    `group` unchanged.

    Args:
        old: tables before; not changed.
        new: tables after; overwritten.
        cut_map: map that gives each new table's source and folded gate.
        group: process group of the models.
        device: device that the group communicates on.
        config: options of the move.
        lease: lease on the new tables, to be ended before they are freed after a failure.

    Raises:
        RuntimeError: on every rank, if a rank fails or does not answer in time.
        CorruptionError: on the rank that received a corrupted message.
    """
    moved = [(cut_map.tensors[fqn].source, fqn) for fqn in new.shards]
    # The ranks agree before any of them leaves the group: a rank with nothing to exchange would
    # close connections that others are still making.
    with (
        _own_group(group, config.timeout) as own,
        all_or_none("moving the tables", group, config.timeout) as check,
    ):
        todo = itinerary(old, new, moved, dist.get_rank(group))
        copy_local(todo)
        if own is not None:
            watched(partial(_exchange, todo, own, device, config, lease), check)
        for fqn, shards in new.local.items():
            scale = cut_map.tensors[fqn].scale
            for shard in shards:
                if scale is not None:
                    shard.weight.mul_(scale.to(shard.weight))
        _carry_progress(old, new, cut_map)


def _exchange(
    todo: Itinerary,
    group: dist.ProcessGroup,
    device: torch.device,
    config: MoveConfig,
    lease: Lease | None,
    proceed: Callable[[], None],
) -> None:
    """The exchange, in a thread: each thread has its own current GPU and gradient mode."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # Work that other threads have put on the GPU's streams comes first.
        torch.cuda.synchronize(device)
    with torch.no_grad():
        exchange(todo, group, device, config.chunk_bytes, config.checksums, proceed, lease)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _own_group(group: dist.ProcessGroup, timeout: timedelta) -> Iterator[dist.ProcessGroup | None]:
    """A second group of the same ranks, abandoned if anything fails; None for a single rank."""
    if group.size() == 1:
        yield None
        return
    ranks = dist.get_process_group_ranks(group)
    # A subset of the ranks can create a group alone only under a name made of its ranks. The name
    # must not be used again, because its addresses stay in the store: keep the group until exit.
    of_all = len(ranks) == dist.get_world_size()
    own = dist.new_group(ranks, timeout=timeout, use_local_synchronization=not of_all)
    try:
        yield own
    except BaseException:
        # Ends NCCL's transfers; gloo's transfers end by the timeout.
        own.abort()
        raise
    if of_all:
        dist.destroy_process_group(own)


def _carry_progress(old: Tables, new: Tables, cut_map: CutMap) -> None:
    """Gives each new kernel the step counter and hyperparameters of its tables."""
    steps: dict[int, int] = {}
    for fqn, shards in new.local.items():
        layout = old.layouts[cut_map.tensors[fqn].source]
        for shard in shards:
            if not shard.is_fused:
                continue
            kernel = shard.kernel
            # The tables of a kernel share a counter; tables that now share it were trained alike.
            steps[id(kernel)] = max(steps.get(id(kernel), 0), layout.step)
            kernel.emb_module.set_optimizer_step(steps[id(kernel)])
            if layout.hyperparameters:
                kernel.emb_module.set_learning_rate(layout.learning_rate)
                for param_group in kernel.fused_optimizer.param_groups:
                    param_group.update(layout.hyperparameters)
