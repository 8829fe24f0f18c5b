"""TorchRec's planner, set up for the tables of a model."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.types import ShardingPlan, ShardingType


class PlannedModel(NamedTuple):
    """An unsharded model, without gates, and a plan for it."""

    plan: ShardingPlan
    model: nn.Module


@dataclass(frozen=True)
class PlannerConfig:
    """The sharding types that the planner may choose from.

    Args:
        sharding_types: TorchRec's names of the types, such as table_wise, row_wise and column_wise.
        tables: table -> sharding types of this table, if they differ.
    """

    sharding_types: Sequence[str] = (ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value)
    tables: dict[str, list[str]] | None = None

    def __post_init__(self) -> None:
        known = [sharding_type.value for sharding_type in ShardingType]
        unknown = [name for name in self._asked if name not in known]
        if unknown:
            raise ValueError(f"unknown sharding types {unknown}; TorchRec has {known}")

    @property
    def _asked(self) -> list[str]:
        return [*self.sharding_types, *(t for ts in (self.tables or {}).values() for t in ts)]

    @property
    def replicates(self) -> bool:
        """Whether a table may be data-parallel, and so trained by the dense optimizer."""
        return ShardingType.DATA_PARALLEL.value in self._asked


def make_planner(
    config: PlannerConfig, tables: Iterable[str], batch_size: int, device_type: str
) -> EmbeddingShardingPlanner:
    """TorchRec's `EmbeddingShardingPlanner` for the ranks of the default process group.

    Args:
        config: sharding types to choose from.
        tables: names of all tables; names of tables that are pruned later are ignored then.
        batch_size: batch size on one rank, for the estimates.
        device_type: `cpu` or `cuda`.
    """
    return planner_for(config, tables, batch_size, run_topology(device_type))


def run_topology(device_type: str) -> Topology:
    """The topology of the default process group's ranks, for `cpu` or `cuda`."""
    world_size = dist.get_world_size()
    hbm_cap = torch.cuda.get_device_properties(0).total_memory if device_type == "cuda" else None
    return Topology(
        world_size=world_size,
        hbm_cap=hbm_cap,
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
        compute_device=device_type,
    )


def planner_for(
    config: PlannerConfig, tables: Iterable[str], batch_size: int, topology: Topology
) -> EmbeddingShardingPlanner:
    """Like `make_planner`, but for any topology; needs no process group."""
    own = config.tables or {}
    constraints = {
        table: ParameterConstraints(sharding_types=list(own.get(table, config.sharding_types)))
        for table in tables
    }
    return EmbeddingShardingPlanner(
        topology=topology, batch_size=batch_size, constraints=constraints, debug=False
    )


def describe_plan(plan: ShardingPlan) -> dict[str, dict[str, object]]:
    """Table -> sharding type, compute kernel and ranks; plain data for reports.

    A table name that occurs in several collections becomes `fqn.table`.
    """
    count = Counter(table for module_plan in plan.plan.values() for table in module_plan)
    described: dict[str, dict[str, object]] = {}
    for fqn, module_plan in plan.plan.items():
        for table, sharding in module_plan.items():
            described[table if count[table] == 1 else f"{fqn}.{table}"] = {
                "sharding_type": sharding.sharding_type,
                "compute_kernel": sharding.compute_kernel,
                "ranks": list(sharding.ranks or []),
            }
    return described
