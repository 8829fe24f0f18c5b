"""Plans again after a prune: stay or move to the planner's new plan, and the cost of either."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ParameterSharding,
    ShardingPlan,
    ShardMetadata,
)

from torchrec_fmp.embeddings.collections import features_by_collection, features_by_table
from torchrec_fmp.embeddings.seams import planner_copy
from torchrec_fmp.planning.estimates import PlanEstimate, device_memory
from torchrec_fmp.planning.shardable import unsharded

Replan = Literal["auto", "planner", "sticky"]
Decision = Literal["planner", "sticky"]
_Planner = TypeVar("_Planner")

# Fraction of a step. TorchRec's estimates are no finer, so a smaller gain is no reason to move.
_LEAST_GAIN = 0.01


def sticky_plan(old_plan: ShardingPlan, smaller_model: nn.Module) -> ShardingPlan:
    """The old plan without dropped tables: surviving tables stay where they are.

    Args:
        old_plan: plan of the model before the prune, keyed by the fqns of its modules.
        smaller_model: unsharded model with its modules under the same fqns; gated modules of the
            old model may now be plain.

    Raises:
        ValueError: if a table of the smaller model is not in the old plan.
    """
    modules = dict(smaller_model.named_modules())
    plan = {}
    for fqn, module_plan in old_plan.plan.items():
        if fqn not in modules:
            continue
        tables = features_by_table(modules[fqn])
        unknown = [table for table in tables if table not in module_plan]
        if unknown:
            raise ValueError(f"the old plan has no tables {unknown} of the module {fqn!r}")
        plan[fqn] = EmbeddingModuleShardingPlan(
            {table: _copied(module_plan[table]) for table in tables}
        )
    return ShardingPlan(plan)


def narrowed_planner(planner: _Planner, old_model: nn.Module, smaller_model: nn.Module) -> _Planner:
    """A planner for the smaller model: a copy of `planner` with narrowed constraints.

    The copy has no constraints for dropped tables. For a table that lost features, its constraints
    keep only the values of the remaining features. A planner other than TorchRec's
    `EmbeddingShardingPlanner` is returned unchanged.

    Args:
        planner: planner for the old model; not changed.
        old_model: model before the prune, sharded or not.
        smaller_model: model after the prune.
    """
    if not isinstance(planner, EmbeddingShardingPlanner):
        return planner
    old, new = (features_by_collection(unsharded(model)) for model in (old_model, smaller_model))

    def narrowed(constraints: dict[str, ParameterConstraints]) -> dict[str, ParameterConstraints]:
        return narrowed_constraints(constraints, old, new)

    return cast(_Planner, planner_copy(planner, narrowed))


def narrowed_constraints(
    constraints: Mapping[str, ParameterConstraints],
    old: Mapping[tuple[str, str], list[str]],
    new: Mapping[tuple[str, str], list[str]],
) -> dict[str, ParameterConstraints]:
    """Constraints of the remaining tables, for their remaining features.

    TorchRec applies a constraint to all tables of its name, in any collection. If these tables
    lost features in different positions, no values are right for all of them, and the lists stay
    unchanged.

    Args:
        constraints: table -> its constraints.
        old: (fqn of a collection, table) -> features, before the prune.
        new: (fqn of a collection, table) -> features, after the prune.
    """
    before, after = ({table for _, table in model} for model in (old, new))
    kept: dict[str, list[tuple[list[str], list[str]]]] = defaultdict(list)
    for (fqn, table), features in new.items():
        if (fqn, table) in old:
            kept[table].append((old[fqn, table], features))
    return {
        table: _narrowed(copy.deepcopy(constraint), kept[table])
        for table, constraint in constraints.items()
        if table in after or table not in before
    }


@dataclass(frozen=True)
class Comparison:
    """Staying compared with moving to the planner's plan; plain data for a manifest.

    Args:
        sticky_step_ms: estimated step time if the tables stay.
        planner_step_ms: estimated step time of the planner's plan; None if the planner found none.
        sticky_bytes: bytes sent from one rank to another if the tables stay.
        planner_bytes: the same for the planner's plan; None if the planner found none.
        sticky_move_ms: estimated time to send `sticky_bytes`.
        planner_move_ms: the same for the planner's plan; None if the planner found none.
        steps_left: training steps remaining; None is treated as unlimited.
        break_even_steps: steps until the planner's plan has made up for its move; None if never.
        decision: `sticky` or `planner`.
        reason: reason for the decision, as text.
    """

    sticky_step_ms: float
    planner_step_ms: float | None
    sticky_bytes: int
    planner_bytes: int | None
    sticky_move_ms: float
    planner_move_ms: float | None
    steps_left: int | None
    break_even_steps: float | None
    decision: Decision
    reason: str

    def describe(self) -> dict[str, Any]:
        """Plain data for reports."""
        return asdict(self)


@dataclass(frozen=True)
class PlanCost:
    """The cost of a plan: the move to it, once, and then every step.

    Args:
        step_ms: estimated step time.
        link_bytes: bytes from rank to rank, (W, W), as `transfer_plan.link_bytes` returns them.
    """

    step_ms: float
    link_bytes: NDArray[np.int64]


def compare(
    sticky: PlanCost,
    planner: PlanCost | None,
    topology: Topology,
    steps_left: int | None = None,
) -> Comparison:
    """Decides between staying and moving. Pure: every rank decides the same.

    Args:
        sticky: cost if the surviving tables stay where they are.
        planner: cost of the planner's plan; None if the planner found none.
        topology: topology with the bandwidths within a host and between hosts.
        steps_left: training steps remaining; None is treated as unlimited.
    """
    sticky_move_ms = move_ms(sticky.link_bytes, topology)
    planner_move_ms = break_even_steps = None
    decision: Decision = "sticky"
    if planner is None:
        reason = "the planner found no plan that fits"
    else:
        planner_move_ms = move_ms(planner.link_bytes, topology)
        gain_ms = sticky.step_ms - planner.step_ms
        if gain_ms > 0:
            break_even_steps = max(0.0, planner_move_ms - sticky_move_ms) / gain_ms
        if break_even_steps is None or gain_ms <= _LEAST_GAIN * sticky.step_ms:
            reason = f"the planner's plan saves {gain_ms:.3g} ms a step, less than 1%"
        elif steps_left is not None and steps_left <= break_even_steps:
            reason = (
                f"the move pays off after {break_even_steps:.0f} steps, "
                f"but only {steps_left} remain"
            )
        else:
            decision = "planner"
            reason = (
                f"the planner's plan saves {gain_ms:.3g} ms a step, which makes up for the move "
                f"after {break_even_steps:.0f} steps"
            )
    return Comparison(
        sticky_step_ms=sticky.step_ms,
        planner_step_ms=planner.step_ms if planner else None,
        sticky_bytes=moved_bytes(sticky.link_bytes),
        planner_bytes=moved_bytes(planner.link_bytes) if planner else None,
        sticky_move_ms=sticky_move_ms,
        planner_move_ms=planner_move_ms,
        steps_left=steps_left,
        break_even_steps=break_even_steps,
        decision=decision,
        reason=reason,
    )


def moved_bytes(links: NDArray[np.int64]) -> int:
    """Bytes sent from one rank to another; bytes that stay on their rank do not count."""
    return int(links.sum() - np.trace(links))


def move_ms(links: NDArray[np.int64], topology: Topology) -> float:
    """Milliseconds until the busiest rank has sent and received its bytes.

    A rank sends and receives at the same time, and uses the link within its host and the link to
    other hosts at the same time. Each link has its bandwidth in TorchRec's topology.

    Args:
        links: bytes from rank to rank, (W, W).
        topology: topology of W ranks.
    """
    host = np.arange(len(links)) // topology.intra_group_size
    same_host = host[:, None] == host
    between_ranks = ~np.eye(len(links), dtype=bool)
    slowest = 0.0
    for mask, bytes_per_ms in (
        (same_host & between_ranks, topology.intra_host_bw),
        (~same_host, topology.inter_host_bw),
    ):
        moved = np.where(mask, links, 0)
        busiest = max(moved.sum(0).max(), moved.sum(1).max())
        slowest = max(slowest, float(busiest) / bytes_per_ms)
    return slowest


def fits_side_by_side(
    old: PlanEstimate, new: PlanEstimate, topology: Topology, chunk_bytes: int
) -> bool:
    """Whether every rank can hold the old tables, the new tables and one chunk in transit at once.

    Compares TorchRec's estimates, which include inputs and outputs of a step, with the topology's
    capacities. The chunk is in the memory of the compute device.
    """
    for memory in ("hbm", "ddr"):
        needed = getattr(old, f"{memory}_bytes") + getattr(new, f"{memory}_bytes")
        if memory == device_memory(topology):
            needed = needed + chunk_bytes
        capacity = np.array([getattr(device.storage, memory) for device in topology.devices])
        if (needed > capacity).any():
            return False
    return True


def _narrowed(
    constraint: ParameterConstraints, kept: list[tuple[list[str], list[str]]]
) -> ParameterConstraints:
    """Narrows a constraint for the tables of its name, from their features before and after."""
    lists: dict[str, Any] = {}
    for name in ("pooling_factors", "num_poolings", "batch_sizes"):
        values = getattr(constraint, name)
        # A list of another length does not have one value per feature.
        positions = {
            tuple(old.index(feature) for feature in new)
            for old, new in kept
            if values is not None and len(values) == len(old) and set(new) <= set(old)
        }
        if len(positions) == 1:
            lists[name] = [values[position] for position in positions.pop()]
    if kept and constraint.feature_names is not None:
        left = {feature for _, new in kept for feature in new}
        lists["feature_names"] = [name for name in constraint.feature_names if name in left]
    return replace(constraint, **lists)


def _copied(sharding: ParameterSharding) -> ParameterSharding:
    """A copy that shares nothing that TorchRec changes in the plan of a sharded model.

    TorchRec rebinds the placements of shards (`DMPCollection`), and the sizes and offsets of
    virtual tables (`embedding_kernel.py`). It changes placements themselves only when it shards
    onto the meta device. A deep copy of a table's 1,024 shards would take 25 ms.
    """
    copied = replace(sharding, ranks=None if sharding.ranks is None else list(sharding.ranks))
    if isinstance(sharding.sharding_spec, EnumerableShardingSpec):
        # The constructor would check for overlaps again.
        copied.sharding_spec = copy.copy(sharding.sharding_spec)
        copied.sharding_spec.shards = [
            ShardMetadata(shard.shard_offsets, shard.shard_sizes, shard.placement)
            for shard in sharding.sharding_spec.shards
        ]
    return copied
