"""This rank's shards, as views into FBGEMM's table batched embeddings (TBE)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torchrec.distributed.batched_embedding_kernel import (
    BatchedDenseEmbedding,
    BatchedDenseEmbeddingBag,
    BatchedFusedEmbedding,
    BatchedFusedEmbeddingBag,
)
from torchrec.distributed.embedding_types import ShardedEmbeddingModule
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_fmp.embeddings.boxes import Box
from torchrec_fmp.embeddings.fqns import join_fqn, own_fqn, own_modules
from torchrec_fmp.embeddings.seams import ShardedCollection, kernel_tables, kernels

_FUSED = (BatchedFusedEmbeddingBag, BatchedFusedEmbedding)
_DENSE = (BatchedDenseEmbeddingBag, BatchedDenseEmbedding)


@dataclass(frozen=True)
class LocalShard:
    """One local shard of one table. Its tensors are views: writing to them changes the table.

    Args:
        table: name of the table.
        box: part of the table that the shard holds.
        weight: weight of the shard, (rows, columns).
        states: optimizer states by the names that FBGEMM and `torch.optim` share, such as `sum`;
            each (rows,) or (rows, columns). Empty at first on the dense kernel, whose states lie in
            the dense optimizer.
        kernel: module that runs the lookup.
    """

    table: str
    box: Box
    weight: Tensor
    states: Mapping[str, Tensor]
    kernel: Any

    @property
    def is_fused(self) -> bool:
        """Whether the optimizer is part of the lookup's backward pass."""
        return isinstance(self.kernel, _FUSED)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Weight and states, in an order that all ranks share."""
        return {"weight": self.weight, **dict(sorted(self.states.items()))}

    @property
    def parameter(self) -> nn.Parameter:
        """The table's parameter in the dense optimizer, if the kernel is dense.

        It holds all column shards of the table on this rank, one below the other.
        """
        return dict(self.kernel.named_parameters_by_table())[self.table]

    def part_of(self, state: Tensor) -> Tensor:
        """This shard's part of a state that the dense optimizer keeps of `parameter`; a view.

        Args:
            state: state of `parameter`, which has P rows: (P, columns), (P, 1) or (P,).

        Returns:
            (rows, columns) or (rows,).

        Raises:
            ValueError: if the shard does not lie in the parameter, which happens in TorchRec with
                column shards of different widths on one rank.
        """
        parameter, columns = self.parameter, self.box.columns
        start = (self.weight.storage_offset() - parameter.storage_offset()) // columns
        if parameter.shape[1] != columns or start + self.box.rows > len(parameter):
            raise ValueError(
                f"table {self.table} has column shards of different widths on one rank; with the "
                "dense kernel, TorchRec gives the optimizer only a part of them. Pass a plan with "
                "equal widths, or with the fused kernel"
            )
        part = state.narrow(0, start, self.box.rows)
        return part if state.shape == parameter.shape else part.view(self.box.rows)


def sharded_collections(model: nn.Module) -> dict[str, ShardedCollection]:
    """Every sharded collection by its own fqn, gated or not."""
    collections: dict[str, ShardedCollection] = {}
    for fqn, module in own_modules(model):
        if isinstance(module, ShardedCollection):
            collections[fqn] = module
    return collections


def table_fqn(fqn: str, collection: ShardedCollection, table: str) -> str:
    """Own fqn of a table's weight, in a collection whose own fqn is `fqn`."""
    bags = isinstance(collection, ShardedEmbeddingBagCollection)
    return join_fqn(fqn, f"{'embedding_bags' if bags else 'embeddings'}.{table}.weight")


def local_shards(collection: ShardedCollection) -> Iterator[LocalShard]:
    """The local shards of a collection.

    Raises:
        TypeError: for a compute kernel other than fused (with or without UVM) and dense.
    """
    for kernel in kernels(collection):
        yield from _shards_of_kernel(kernel)


def is_fused(kernel: Any) -> bool:
    """Whether a kernel is FBGEMM's fused one; its subclasses keep their weights elsewhere."""
    return type(kernel) in _FUSED


def dense_tensors(model: DistributedModelParallel) -> dict[str, Tensor]:
    """Parameters and buffers outside sharded collections, by own fqn."""
    sharded = tuple(
        f"{fqn}."
        for fqn, module in model.module.named_modules()
        if isinstance(module, ShardedEmbeddingModule)
    )
    tensors = [
        *model.module.named_parameters(remove_duplicate=False),
        *model.module.named_buffers(remove_duplicate=False),
    ]
    return {own_fqn(model, fqn): tensor for fqn, tensor in tensors if not fqn.startswith(sharded)}


def _shards_of_kernel(kernel: Any) -> Iterator[LocalShard]:
    if not is_fused(kernel) and type(kernel) not in _DENSE:
        raise TypeError(
            f"tables {[table.name for table in kernel_tables(kernel)]} run on "
            f"{type(kernel).__name__}, which cannot be resharded. Use the kernel fused, fused_uvm, "
            "fused_uvm_caching or dense"
        )
    # A cached kernel has to write its changes back to the table first.
    kernel.flush()
    tables = kernel_tables(kernel)
    weights = kernel.split_embedding_weights()
    states: list[dict[str, Tensor]] = [{} for _ in tables]
    if is_fused(kernel) and kernel.emb_module.split_optimizer_states():
        states = kernel.emb_module.get_optimizer_state()
    for table, weight, state in zip(tables, weights, states, strict=True):
        metadata = table.local_metadata
        row, column = metadata.shard_offsets if metadata is not None else (0, 0)
        # SGD's kernel reports an empty placeholder; other kernels report the step counter, which
        # all tables of a kernel share.
        kept = {name: t for name, t in state.items() if t.numel() > 0 and name != "iter"}
        box = Box(row, column, *weight.shape)
        yield LocalShard(table.name, box, weight.detach(), kept, kernel)
