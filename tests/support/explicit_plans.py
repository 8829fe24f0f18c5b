"""Plans of explicit shards: every sharding type, on one host or on several."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec, ShardMetadata
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ParameterSharding
from torchrec.modules.embedding_configs import EmbeddingBagConfig

FLAT = ("data_parallel", "table_wise", "row_wise", "column_wise", "table_column_wise")
# These have a group of ranks within each host and one across hosts.
HIERARCHICAL = ("table_row_wise", "grid_shard")


class Placement(NamedTuple):
    """How every table is sharded."""

    sharding: str
    kernel: str

    def __str__(self) -> str:
        return f"{self.sharding}-{self.kernel}"


def collection_plan(
    model: nn.Module, name: str, placement: Placement
) -> EmbeddingModuleShardingPlan:
    configs = model.get_submodule(name).embedding_bag_configs()  # type: ignore[operator]
    plan = EmbeddingModuleShardingPlan()
    for index, config in enumerate(configs):
        boxes = shard_boxes(placement.sharding, index, config)
        shards = [ShardMetadata(offset, size, f"rank:{rank}/cpu") for rank, offset, size in boxes]
        is_sharded = placement.sharding != "data_parallel"
        plan[config.name] = ParameterSharding(
            sharding_type=placement.sharding,
            compute_kernel=placement.kernel,
            ranks=[rank for rank, _, _ in boxes],
            sharding_spec=EnumerableShardingSpec(shards) if is_sharded else None,
        )
    return plan


Box = tuple[int, list[int], list[int]]


def shard_boxes(sharding: str, index: int, config: EmbeddingBagConfig) -> list[Box]:
    """(rank, offset, size) of the shards of the index-th table of a collection."""
    ranks = list(range(dist.get_world_size()))
    local_size = int(os.environ["LOCAL_WORLD_SIZE"])
    hosts = [ranks[first : first + local_size] for first in ranks[::local_size]]
    host = hosts[index % len(hosts)]
    rows, dim = config.num_embeddings, config.embedding_dim
    if sharding == "grid_shard":
        width = dim // len(hosts)
        return [
            box
            for i, members in enumerate(hosts)
            for box in row_blocks(members, rows, i * width, width)
        ]
    return {
        "data_parallel": [(rank, [0, 0], [rows, dim]) for rank in ranks],
        "table_wise": [(index % len(ranks), [0, 0], [rows, dim])],
        "row_wise": row_blocks(ranks, rows, 0, dim),
        "column_wise": column_blocks(ranks, rows, dim),
        "table_column_wise": column_blocks(host, rows, dim),
        "table_row_wise": row_blocks(host, rows, 0, dim),
    }[sharding]


def row_blocks(ranks: list[int], rows: int, column: int, width: int) -> list[Box]:
    block = math.ceil(rows / len(ranks))
    starts = [min(i * block, rows) for i in range(len(ranks) + 1)]
    return [
        (rank, [start, column], [end - start, width])
        for rank, start, end in zip(ranks, starts[:-1], starts[1:], strict=True)
    ]


def column_blocks(ranks: list[int], rows: int, dim: int) -> list[Box]:
    width = dim // len(ranks)
    return [(rank, [0, i * width], [rows, width]) for i, rank in enumerate(ranks)]


@contextmanager
def hosts_of(local_size: int) -> Iterator[None]:
    """Makes TorchRec see that many ranks on each host."""
    before = os.environ["LOCAL_WORLD_SIZE"]
    os.environ["LOCAL_WORLD_SIZE"] = str(local_size)
    try:
        yield
    finally:
        os.environ["LOCAL_WORLD_SIZE"] = before
