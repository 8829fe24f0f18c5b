"""The cost of a plan by TorchRec's own estimators: bytes and milliseconds of every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.constants import DEFAULT_PERF_ESTIMATOR, POOLING_FACTOR
from torchrec.distributed.planner.enumerators import get_partition_by_type
from torchrec.distributed.planner.estimator import EmbeddingPerfEstimatorFactory
from torchrec.distributed.planner.shard_estimators import EmbeddingStorageEstimator
from torchrec.distributed.planner.types import Shard, ShardEstimator, ShardingOption
from torchrec.distributed.planner.utils import build_sharder_data_map, sharder_name
from torchrec.distributed.types import ParameterSharding, ShardingPlan, ShardingType

from torchrec_fmp.embeddings.seams import (
    batch_size_of,
    constraints_of,
    estimators_of,
    topology_of,
)
from torchrec_fmp.planning.shardable import ShardableTable, Sharders, shardable_tables

Constraints = Mapping[str, ParameterConstraints]
Memory = Literal["hbm", "ddr"]


@dataclass(frozen=True)
class PlanEstimate:
    """The estimated cost of a plan on each of W ranks.

    Args:
        hbm_bytes: HBM bytes, (W,) int64: tables, optimizer state, inputs and outputs, as TorchRec's
            `EmbeddingStorageEstimator` counts them.
        ddr_bytes: DDR bytes, (W,) int64: the same.
        rank_ms: time of lookups and communication in one step, forward and backward, (W,) float64.
    """

    hbm_bytes: NDArray[np.int64]
    ddr_bytes: NDArray[np.int64]
    rank_ms: NDArray[np.float64]

    @property
    def step_ms(self) -> float:
        """Time of the slowest rank, as TorchRec's `NoopPerfModel` rates a plan."""
        return float(self.rank_ms.max())

    def describe(self) -> dict[str, Any]:
        """Plain data for reports."""
        return {
            "hbm_bytes": self.hbm_bytes.tolist(),
            "ddr_bytes": self.ddr_bytes.tolist(),
            "rank_ms": self.rank_ms.tolist(),
            "step_ms": self.step_ms,
        }

    def device_bytes(self, topology: Topology) -> NDArray[np.int64]:
        """Bytes in the memory of the topology's compute device, (W,) int64: DDR for CPUs."""
        return self.hbm_bytes if device_memory(topology) == "hbm" else self.ddr_bytes


def estimate(
    plan: ShardingPlan,
    model: nn.Module,
    topology: Topology,
    *,
    sharders: Sharders,
    batch_size: int,
    constraints: Constraints | None = None,
    estimators: Sequence[ShardEstimator] | None = None,
) -> PlanEstimate:
    """Estimates a plan, which need not come from the planner.

    Args:
        plan: plan for the model.
        model: model, sharded or not, gated or not.
        topology: topology of the ranks.
        sharders: sharders, as for `DistributedModelParallel`. The states of a fused optimizer count
            whether it is set on the parameters or in the sharders' `fused_params`.
        batch_size: batch size on one rank.
        constraints: constraints, as the planner takes them: pooling factors, number of poolings,
            batch sizes.
        estimators: estimators to use in place of TorchRec's.

    Raises:
        ValueError: if the plan lacks a table of the model, or names a rank that does not exist.
    """
    tables = shardable_tables(model, sharders)
    options = plan_options(plan, tables, topology, batch_size, constraints)
    populate(options, topology, sharders, constraints, estimators)
    return total(options, topology)


def estimate_as(
    planner: EmbeddingShardingPlanner, plan: ShardingPlan, model: nn.Module, sharders: Sharders
) -> PlanEstimate:
    """Estimates a plan with a planner's topology, batch size, constraints and estimators."""
    return estimate(
        plan,
        model,
        topology_of(planner),
        sharders=sharders,
        batch_size=batch_size_of(planner),
        constraints=constraints_of(planner),
        estimators=estimators_of(planner),
    )


def device_memory(topology: Topology) -> Memory:
    """The memory of the topology's compute device: HBM, or DDR for CPUs."""
    return "ddr" if topology.compute_device == "cpu" else "hbm"


def plan_options(
    plan: ShardingPlan,
    tables: Sequence[ShardableTable],
    topology: Topology,
    batch_size: int,
    constraints: Constraints | None,
) -> list[ShardingOption]:
    """The options that TorchRec's enumerator would make for the plan's shardings, with ranks.

    Raises:
        ValueError: if the plan lacks a table, or names a rank that does not exist.
    """
    return [
        _option(table, sharding_of(plan, table), topology, batch_size, constraints)
        for table in tables
    ]


def sharding_of(plan: ShardingPlan, table: ShardableTable) -> ParameterSharding:
    """A table's sharding.

    Raises:
        ValueError: if the plan lacks the table.
    """
    module_plan = plan.plan.get(table.path, {})
    if table.name not in module_plan:
        raise ValueError(f"the plan has no table {table.name} of the module {table.path!r}")
    return module_plan[table.name]


def _option(
    table: ShardableTable,
    sharding: ParameterSharding,
    topology: Topology,
    batch_size: int,
    constraints: Constraints | None,
) -> ShardingOption:
    constraint = (constraints or {}).get(table.name)
    return ShardingOption(
        name=table.name,
        tensor=table.priced_weight(),
        module=(table.path, table.module),
        input_lengths=list(constraint.pooling_factors) if constraint else [POOLING_FACTOR],
        batch_size=batch_size,
        sharding_type=sharding.sharding_type,
        partition_by=get_partition_by_type(sharding.sharding_type),
        compute_kernel=sharding.compute_kernel,
        shards=_shards(table, sharding, topology),
        cache_params=sharding.cache_params,
        is_pooled=table.is_pooled,
        feature_names=constraint.feature_names if constraint else None,
        output_dtype=sharding.output_dtype,
        key_value_params=sharding.key_value_params,
    )


def populate(
    options: list[ShardingOption],
    topology: Topology,
    sharders: Sharders,
    constraints: Constraints | None,
    estimators: Sequence[ShardEstimator] | None = None,
) -> None:
    """Sets `perf` and `storage` of every shard.

    Of a table's shards of equal size, only one is estimated, because TorchRec's estimators know
    nothing of a shard except its size; the others share its estimates.
    """
    # TorchRec 1.6 passes the sharders to its estimators; later versions pass only data about them.
    known: dict[str, Any] = {sharder_name(sharder.module_type): sharder for sharder in sharders}
    if "sharder_map" not in signature(ShardEstimator.estimate).parameters:
        known = build_sharder_data_map(known)
    given = dict(constraints or {})
    shards = [option.shards for option in options]
    by_size = [{tuple(shard.size): shard for shard in each} for each in shards]
    for option, distinct in zip(options, by_size, strict=True):
        option.shards = list(distinct.values())
    for estimator in estimators or (
        EmbeddingPerfEstimatorFactory.create(
            DEFAULT_PERF_ESTIMATOR, topology=topology, constraints=given
        ),
        EmbeddingStorageEstimator(topology=topology, constraints=given),
    ):
        estimator.estimate(options, known)
    for option, each, distinct in zip(options, shards, by_size, strict=True):
        option.shards = each
        copy_estimates(distinct, each)


def copy_estimates(by_size: Mapping[tuple[int, ...], Shard], shards: Sequence[Shard]) -> None:
    """Copies to each shard the estimates of the shard of its size, if there is one."""
    for shard in shards:
        like = by_size.get(tuple(shard.size))
        if like is not None:
            shard.perf, shard.storage = like.perf, like.storage


def total(options: Sequence[ShardingOption], topology: Topology) -> PlanEstimate:
    """Adds up the shards of each rank."""
    hbm_bytes = np.zeros(topology.world_size, dtype=np.int64)
    ddr_bytes = np.zeros(topology.world_size, dtype=np.int64)
    rank_ms = np.zeros(topology.world_size)
    for option in options:
        for shard in option.shards:
            assert shard.rank is not None and shard.storage is not None and shard.perf is not None
            hbm_bytes[shard.rank] += shard.storage.hbm
            ddr_bytes[shard.rank] += shard.storage.ddr
            rank_ms[shard.rank] += shard.perf.total
    return PlanEstimate(hbm_bytes, ddr_bytes, rank_ms)


def _shards(table: ShardableTable, sharding: ParameterSharding, topology: Topology) -> list[Shard]:
    if sharding.sharding_type == ShardingType.DATA_PARALLEL.value:
        size = list(table.weight.shape)
        return [Shard(size=size, offset=[0, 0], rank=rank) for rank in range(topology.world_size)]
    assert sharding.sharding_spec is not None
    shards = [
        Shard(
            size=list(shard.shard_sizes),
            offset=list(shard.shard_offsets),
            rank=shard.placement.rank(),
        )
        for shard in sharding.sharding_spec.shards
    ]
    beyond = [shard.rank for shard in shards if not 0 <= shard.rank < topology.world_size]
    if beyond:
        raise ValueError(
            f"the plan puts table {table.name} on rank {beyond[0]}, but the topology has "
            f"{topology.world_size} ranks: make the plan for this topology"
        )
    return shards
