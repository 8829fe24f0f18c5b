"""Finds tables whose pooled embeddings TorchRec computes differently under another plan.

The effect of `PoolingType.MEAN` depends on the plan (torchrec/distributed/embeddingbag.py,
`ShardedEmbeddingBagCollection.__init__` and `_create_mean_pooling_divisor`, 1.6 to 1.8):

- table-wise, column-wise and data-parallel tables are averaged in the lookup, over the bag's
  length, regardless of the weights;
- row-wise and table-row-wise tables are summed, then divided by the bag's length, or by the sum of
  the bag's weights if the collection is weighted;
- that division also applies to every other table of the collection that is not sharded by rows,
  SUM or MEAN, and divides it once more;
- under grid_shard, the rows of each shard are averaged separately.

So moving a table, or dropping another table of its collection, can change a model's output.
"""

from __future__ import annotations

from typing import cast

from torch import nn
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingPlan, ShardingType
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_fmp.planning.planner import PlannedModel

_BY_ROWS = (ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value)


class PoolingChangedError(ValueError):
    """A plan would change the model's output."""


def check_pooling(old: PlannedModel, new: PlannedModel) -> None:
    """Checks that every surviving table is pooled as before.

    Args:
        old: model and plan before the prune.
        new: model and plan after the prune.

    Raises:
        PoolingChangedError: if tables are pooled differently; names them.
    """
    before, after = pooling(*old), pooling(*new)
    changed = {table: (before[table], how) for table, how in after.items() if before[table] != how}
    if changed:
        told = "; ".join(
            f"{table} of {fqn or 'the model'} was {was}, would be {is_}"
            for (fqn, table), (was, is_) in changed.items()
        )
        raise PoolingChangedError(
            f"TorchRec pools these tables differently under the new plan: {told}. Constrain the "
            "planner to sharding types that keep their pooling, or use SUM pooling"
        )


def pooling(plan: ShardingPlan, model: nn.Module) -> dict[tuple[str, str], str]:
    """(fqn of a collection, table) -> how its embeddings are pooled, in words.

    Args:
        plan: plan for the model.
        model: unsharded model without gates.
    """
    found = {}
    for fqn, module in model.named_modules():
        if not isinstance(module, EmbeddingBagCollection):
            continue
        module_plan = cast(EmbeddingModuleShardingPlan, plan.plan[fqn])
        types = {table: sharding.sharding_type for table, sharding in module_plan.items()}
        configs = module.embedding_bag_configs()
        weighted = module.is_weighted()
        divided = any(
            config.pooling is PoolingType.MEAN and types[config.name] in _BY_ROWS
            for config in configs
        )
        for config in configs:
            is_mean = config.pooling is PoolingType.MEAN
            how = _how(types[config.name], is_mean, weighted, divided)
            found[fqn, config.name] = how
    return found


def _how(sharding_type: str, is_mean: bool, weighted: bool, divided: bool) -> str:
    divisor = "the sum of weights" if weighted else "length"
    if sharding_type in _BY_ROWS:
        return f"a sum divided by {divisor}" if is_mean else "a sum"
    if not is_mean:
        how = "a sum"
    elif sharding_type == ShardingType.GRID_SHARD.value:
        how = "a mean of each shard's rows"
    else:
        how = "a sum divided by length"
    return f"{how} divided by {divisor}" if divided else how
