"""`costs`: the cost of keeping each feature, in bytes or in planner milliseconds."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.constants import BATCH_SIZE
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import ShardingOption
from torchrec.distributed.types import ShardingPlan

from torchrec_fmp.embeddings.seams import set_priced_tensor
from torchrec_fmp.gates.sharded import sharders as default_sharders
from torchrec_fmp.planning.estimates import Constraints, device_memory, plan_options, populate
from torchrec_fmp.planning.shardable import ShardableTable, Sharders, shardable_tables, unsharded
from torchrec_fmp.selection.costs import TableCost, Unit, divided


def costs(
    model: nn.Module,
    topology: Topology,
    unit: Unit = "bytes",
    *,
    batch_size: int = BATCH_SIZE,
    constraints: Constraints | None = None,
    sharders: Sharders | None = None,
    plan: ShardingPlan | None = None,
) -> dict[str, float]:
    """Feature -> cost of keeping it; the sum is the cost of all tables.

    The units:

    - `bytes`: bytes of the tables' weights, like a manifest's `table_bytes`; no optimizer state, no
      copies.
    - `hbm`: bytes over all ranks in the memory of the compute device, which is DDR in a topology of
      CPUs: weights, optimizer state, inputs and outputs, by TorchRec's `EmbeddingStorageEstimator`.
    - `step_ms`: milliseconds of one step, forward and backward, by TorchRec's
      `EmbeddingPerfEstimator`: the total of all ranks divided by the number of ranks. The sum is
      therefore the step time of a perfectly balanced plan, a lower bound of the plan's step time.

    A table that serves several features divides its cost among them, because it is dropped only
    when all of them are: equally for `bytes` and `hbm`; by expected lookups (pooling factor x
    number of poolings x batch size, where the constraints have them for each feature) for
    `step_ms`. A feature that several tables serve pays its share of each. Dense columns have no
    table and are not in the result. `table_costs` returns the undivided costs.

    Args:
        model: model, gated or not. For a `DistributedModelParallel`, the shardings of its plan are
            priced.
        topology: topology of the ranks.
        unit: unit of the costs.
        batch_size: batch size on one rank.
        constraints: constraints, as the planner takes them.
        sharders: sharders, as for `DistributedModelParallel`; by default the model's own, if it is
            sharded, or `torchrec_fmp.sharders()`.
        plan: plan whose shardings are priced. Without a plan, each table has the sharding that
            TorchRec's `GreedyProposer` proposes first: the one with the fastest slowest shard.

    Raises:
        ValueError: for an unknown unit, or a plan that does not fit the model.
    """
    return divided(
        table_costs(
            model,
            topology,
            unit,
            batch_size=batch_size,
            constraints=constraints,
            sharders=sharders,
            plan=plan,
        )
    )


def table_costs(
    model: nn.Module,
    topology: Topology,
    unit: Unit = "bytes",
    *,
    batch_size: int = BATCH_SIZE,
    constraints: Constraints | None = None,
    sharders: Sharders | None = None,
    plan: ShardingPlan | None = None,
) -> list[TableCost]:
    """The costs saved by dropping features: undivided `costs`, with the features that share each.

    In `bytes` and `hbm` the features of a table share its whole cost, which remains until the last
    of them is dropped; in `step_ms` each feature has the cost of its own lookups.

    Args and Raises: as for `costs`.
    """
    if unit not in ("bytes", "hbm", "step_ms"):
        raise ValueError(f"unit is {unit!r}; it must be bytes, hbm or step_ms")
    if isinstance(model, DistributedModelParallel):
        sharders = sharders or model.sharders
        plan = plan or model.plan
    sharders = sharders or default_sharders()
    bare = unsharded(model)
    tables = shardable_tables(bare, sharders)
    if unit == "bytes":
        prices = [float(table.parameter_bytes) for table in tables]
    else:
        if plan is None:
            options = _fastest(bare, tables, topology, batch_size, constraints, sharders)
        else:
            options = plan_options(plan, tables, topology, batch_size, constraints)
        populate(options, topology, sharders, constraints)
        prices = [_price(option, topology, unit) for option in options]
    found = []
    for table, price in zip(tables, prices, strict=True):
        if unit == "step_ms":
            shares = zip(table.features, _lookup_shares(table, constraints), strict=True)
            found += [TableCost((feature,), price * share) for feature, share in shares]
        else:
            found.append(TableCost(table.features, price))
    return found


def _fastest(
    model: nn.Module,
    tables: Sequence[ShardableTable],
    topology: Topology,
    batch_size: int,
    constraints: Constraints | None,
    sharders: Sharders,
) -> list[ShardingOption]:
    """The sharding of each table with the fastest slowest shard."""
    enumerator = EmbeddingEnumerator(topology, batch_size, dict(constraints or {}))
    options: dict[tuple[str, str], ShardingOption] = {}
    for option in enumerator.enumerate(model, list(sharders)):
        key = (option.path, option.name)
        if key not in options or _slowest_ms(option) < _slowest_ms(options[key]):
            options[key] = option
    chosen = []
    for table in tables:
        option = options[table.path, table.name]
        set_priced_tensor(option, table.priced_weight())
        chosen.append(option)
    return chosen


def _slowest_ms(option: ShardingOption) -> float:
    return max(shard.perf.total for shard in option.shards if shard.perf is not None)


def _price(option: ShardingOption, topology: Topology, unit: Unit) -> float:
    if unit == "step_ms":
        return option.total_perf / topology.world_size
    return float(getattr(option.total_storage, device_memory(topology)))


def _lookup_shares(table: ShardableTable, constraints: Constraints | None) -> list[float]:
    """Each feature's share of a table's lookups, in the features' order; shares add up to 1."""
    count = len(table.features)
    constraint = (constraints or {}).get(table.name)
    if constraint is None or len(constraint.pooling_factors) != count:
        return [1 / count] * count
    poolings = constraint.num_poolings or [1.0] * count
    batch_sizes = constraint.batch_sizes or [1] * count
    lookups = [
        factor * pooling * batch_size
        for factor, pooling, batch_size in zip(
            constraint.pooling_factors, poolings, batch_sizes, strict=True
        )
    ]
    return [part / sum(lookups) for part in lookups] if sum(lookups) else [1 / count] * count
