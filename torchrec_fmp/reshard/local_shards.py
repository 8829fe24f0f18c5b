"""The shards that this rank holds, as views into FBGEMM's table batched embeddings (TBE)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.batched_embedding_kernel import (
    BatchedDenseEmbeddingBag,
    BatchedFusedEmbeddingBag,
)
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import get_unwrapped_module

from torchrec_fmp.gates.sharded import ShardedGatedEmbeddingBagCollection
from torchrec_fmp.reshard.boxes import Box


@dataclass(frozen=True)
class LocalShard:
    """One local shard of one table; the tensors are views, writing to them changes the table.

    Args:
        table: name.
        box: the part of the table.
        weight: (rows, columns).
        states: of the fused optimizer, by FBGEMM's names; each (rows,) or (rows, columns). Empty
            for a data-parallel table, whose state lies in the dense optimizer.
        kernel: the module that runs the lookup.
    """

    table: str
    box: Box
    weight: Tensor
    states: dict[str, Tensor]
    kernel: BatchedFusedEmbeddingBag | BatchedDenseEmbeddingBag


def sharded_collections(model: nn.Module) -> dict[str, ShardedEmbeddingBagCollection]:
    """Every sharded collection by its fqn in the bare model, where no gates wrap it."""
    collections = {}
    gated: set[int] = set()
    for fqn, module in get_unwrapped_module(model).named_modules():
        if isinstance(module, ShardedGatedEmbeddingBagCollection):
            collections[fqn] = module._embedding_bag_collection
            gated.add(id(module._embedding_bag_collection))
        elif isinstance(module, ShardedEmbeddingBagCollection) and id(module) not in gated:
            collections[fqn] = module
    return collections


def local_shards(collection: ShardedEmbeddingBagCollection) -> Iterator[LocalShard]:
    """The local shards of a collection.

    Raises:
        TypeError: for a compute kernel other than fused and dense.
    """
    for lookup in collection._lookups:
        while isinstance(lookup, DistributedDataParallel):
            lookup = lookup.module
        for kernel in lookup._emb_modules:
            yield from _shards_of_kernel(kernel)


def _shards_of_kernel(kernel: Any) -> Iterator[LocalShard]:
    if not isinstance(kernel, (BatchedFusedEmbeddingBag, BatchedDenseEmbeddingBag)):
        raise TypeError(
            f"tables {[table.name for table in kernel._config.embedding_tables]} run on "
            f"{type(kernel).__name__}; the kernels that can be resharded are fused and dense"
        )
    # What a cached kernel has changed is written back to the table first.
    kernel.flush()
    tables = kernel._config.embedding_tables
    weights = kernel.split_embedding_weights()
    states: list[dict[str, Tensor]] = [{} for _ in tables]
    if isinstance(kernel, BatchedFusedEmbeddingBag) and kernel.emb_module.split_optimizer_states():
        states = kernel.emb_module.get_optimizer_state()
    for table, weight, state in zip(tables, weights, states, strict=True):
        metadata = table.local_metadata
        row, column = metadata.shard_offsets if metadata is not None else (0, 0)
        box = Box(row, column, *weight.shape)
        # SGD's kernel reports an empty placeholder.
        kept = {name: tensor for name, tensor in state.items() if tensor.numel() > 0}
        yield LocalShard(table.name, box, weight.detach(), kept, kernel)
