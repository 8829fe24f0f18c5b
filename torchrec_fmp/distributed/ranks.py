"""The process group of a run: torchrun's, or a single process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from torchrec_fmp.distributed.versions import installed_versions


@dataclass(frozen=True)
class Ranks:
    """This process's place in the group.

    Args:
        rank: index of this process, from 0.
        world_size: number of ranks.
        device: device that this rank trains on.
        group: process group of all ranks.
    """

    rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup

    @property
    def speaks(self) -> bool:
        """Whether this rank reports to the user."""
        return self.rank == 0

    def __str__(self) -> str:
        """Text for the user, such as `2 ranks on cpu over gloo: tables model-parallel, ...`."""
        where = f"{self.device.type} over {dist.get_backend(self.group)}"
        if self.world_size == 1:
            return f"1 rank on {where}"
        return f"{self.world_size} ranks on {where}: tables model-parallel, the rest data-parallel"


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Joins the group that torchrun's environment names, or creates a group of one rank.

    Uses CUDA and NCCL if there are a GPU and fbgemm's CUDA build, otherwise CPU and gloo.
    """
    cuda = torch.cuda.is_available() and installed_versions().get("fbgemm-gpu-cpu") is None
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if cuda else 0)
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group(backend)
    else:
        device = torch.device("cuda", 0)
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    try:
        yield Ranks(
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            device=device if cuda else torch.device("cpu"),
            group=group,
        )
    finally:
        dist.destroy_process_group()
