"""`reshard_tables`: fills the new model's tables from the old model's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbeddingBag
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingType

from torchrec_fmp.reshard.boxes import Shard, shards_of
from torchrec_fmp.reshard.local_shards import LocalShard, local_shards, sharded_collections
from torchrec_fmp.reshard.mover import move_table
from torchrec_fmp.surgery.cut_map import CutMap
from torchrec_fmp.surgery.rules import join_fqn


@torch.no_grad()
def reshard_tables(
    old: DistributedModelParallel, new: DistributedModelParallel, cut_map: CutMap
) -> None:
    """Moves every surviving table, its fused optimizer state, step counter and hyperparameters.

    Collective: every rank of the models' process group calls it.

    Args:
        old: the model before; not changed.
        new: the model after, sharded by its own plan; its tables are overwritten.
        cut_map: gives each table's folded gate.

    Raises:
        ValueError: if a table would move into or out of data-parallel.
    """
    group = new._env.process_group
    assert group is not None
    old_collections = sharded_collections(old)
    for fqn, new_collection in sharded_collections(new).items():
        old_collection = old_collections[fqn]
        old_local = _by_table(old_collection)
        new_local = _by_table(new_collection)
        # Before anything moves, so that every rank refuses alike.
        _check_kernels(old_collection, new_collection)
        for config in new_collection._embedding_bag_configs:
            table = config.name
            move_table(
                old_local[table],
                new_local[table],
                _shards(old_collection, table, group.size()),
                _shards(new_collection, table, group.size()),
                group,
            )
            scale = cut_map.tensors[join_fqn(fqn, f"embedding_bags.{table}.weight")].scale
            if scale is not None:
                for shard in new_local[table]:
                    shard.weight.mul_(scale.to(shard.weight))
        _carry_progress(old_local, new_local, group)


def _check_kernels(old: ShardedEmbeddingBagCollection, new: ShardedEmbeddingBagCollection) -> None:
    data_parallel = ShardingType.DATA_PARALLEL.value
    for table, sharding in new.module_sharding_plan.items():
        types = (old.module_sharding_plan[table].sharding_type, sharding.sharding_type)
        if (types[0] == data_parallel) != (types[1] == data_parallel):
            raise ValueError(
                f"table {table} would move from {types[0]} to {types[1]}: data-parallel tables "
                "have no fused optimizer, so the optimizer state would be lost. Constrain the "
                "planner to the sharding types that the table has"
            )


def _by_table(collection: ShardedEmbeddingBagCollection) -> dict[str, list[LocalShard]]:
    shards = defaultdict(list)
    for shard in local_shards(collection):
        shards[shard.table].append(shard)
    return shards


def _shards(
    collection: ShardedEmbeddingBagCollection, table: str, world_size: int
) -> Sequence[Shard]:
    config = collection._table_name_to_config[table]
    sharding = collection.module_sharding_plan[table]
    return shards_of(sharding, config.num_embeddings, config.embedding_dim, world_size)


def _carry_progress(
    old: dict[str, list[LocalShard]], new: dict[str, list[LocalShard]], group: dist.ProcessGroup
) -> None:
    """Gives each new kernel the step counter and the hyperparameters of its tables.

    A rank may hold none of the old shards of its new tables, so these few numbers a table, and
    nothing larger, are gathered.
    """
    mine = {
        shard.table: _progress(shard.kernel)
        for shards in old.values()
        for shard in shards
        if isinstance(shard.kernel, BatchedFusedEmbeddingBag)
    }
    gathered: list[dict[str, _Progress]] = [{}] * group.size()
    dist.all_gather_object(gathered, mine, group=group)
    by_table = {table: progress for part in gathered for table, progress in part.items()}
    for shards in new.values():
        for shard in shards:
            if isinstance(shard.kernel, BatchedFusedEmbeddingBag):
                progress = by_table[shard.table]
                shard.kernel.emb_module.set_optimizer_step(progress.step)
                shard.kernel.emb_module.set_learning_rate(progress.learning_rate)
                for param_group in shard.kernel.fused_optimizer.param_groups:
                    param_group.update(progress.hyperparameters)


class _Progress(NamedTuple):
    """How far a kernel's fused optimizer is.

    The parameter group may be ahead of the kernel, which takes over its learning rate in the next
    step: a scheduler steps last.
    """

    step: int
    learning_rate: float
    hyperparameters: dict[str, Any]


def _progress(kernel: BatchedFusedEmbeddingBag) -> _Progress:
    (param_group,) = kernel.fused_optimizer.param_groups
    hyperparameters = {name: value for name, value in param_group.items() if name != "params"}
    step = int(kernel.emb_module.iter.item())
    return _Progress(step, kernel.emb_module.get_learning_rate(), hyperparameters)
