"""`reshard_tables`: fills the new model's tables from the old model's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbeddingBag
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_fmp.reshard.boxes import Shard, shards_of
from torchrec_fmp.reshard.local_shards import LocalShard, local_shards, sharded_collections
from torchrec_fmp.reshard.mover import move_table
from torchrec_fmp.surgery.cut_map import CutMap
from torchrec_fmp.surgery.rules import join_fqn


@torch.no_grad()
def reshard_tables(
    old: DistributedModelParallel, new: DistributedModelParallel, cut_map: CutMap
) -> None:
    """Moves every surviving table, its fused optimizer state, step counter and learning rate.

    Collective: every rank of the models' process group calls it.

    Args:
        old: the model before; not changed.
        new: the model after, sharded by its own plan; its tables are overwritten.
        cut_map: gives each table's folded gate.

    Raises:
        ValueError: if a table's optimizer states differ between the two.
    """
    group = new._env.process_group
    assert group is not None
    old_collections = sharded_collections(old)
    for fqn, new_collection in sharded_collections(new).items():
        old_collection = old_collections[fqn]
        old_local = _by_table(old_collection)
        new_local = _by_table(new_collection)
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
        _carry_steps_and_rates(old_local, new_local, group)


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


def _carry_steps_and_rates(
    old: dict[str, list[LocalShard]], new: dict[str, list[LocalShard]], group: dist.ProcessGroup
) -> None:
    """Sets each new kernel's step counter and learning rate to those of its tables.

    A rank may hold none of the old shards of its new tables, so the two numbers a table, and
    nothing larger, are gathered.
    """
    mine = {
        shard.table: (_step(shard.kernel), shard.kernel.emb_module.get_learning_rate())
        for shards in old.values()
        for shard in shards
        if isinstance(shard.kernel, BatchedFusedEmbeddingBag)
    }
    gathered: list[dict[str, tuple[int, float]]] = [{}] * group.size()
    dist.all_gather_object(gathered, mine, group=group)
    by_table = {table: numbers for part in gathered for table, numbers in part.items()}
    for shards in new.values():
        for shard in shards:
            if isinstance(shard.kernel, BatchedFusedEmbeddingBag):
                step, rate = by_table[shard.table]
                shard.kernel.emb_module.set_optimizer_step(step)
                shard.kernel.emb_module.set_learning_rate(rate)
                for param_group in shard.kernel.fused_optimizer.param_groups:
                    param_group["lr"] = rate


def _step(kernel: BatchedFusedEmbeddingBag) -> int:
    return int(kernel.emb_module.iter.item())
