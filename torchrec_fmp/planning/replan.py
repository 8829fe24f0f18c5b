"""Planning again after a prune: stay, or move to the planner's new plan, and what either costs."""

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

# Of a step. TorchRec's estimates do not resolve less, so a smaller gain is no reason to move.
_LEAST_GAIN = 0.01


def sticky_plan(old_plan: ShardingPlan, smaller_model: nn.Module) -> ShardingPlan:
    """The old plan without the tables that are gone: what survives stays where it is.

    Args:
        old_plan: of the model before the prune, keyed by the fqns of its modules.
        smaller_model: unsharded, its modules under the same fqns; gated modules of the old model
            may be plain ones now.

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
    """A planner for the smaller model; the given one is not changed.

    The copy's constraints lack the tables that are gone, and those of a table that lost features
    have only the values of the features that are left. A planner that is not TorchRec's
    `EmbeddingShardingPlanner` passes through.

    Args:
        planner: for the old model.
        old_model: before the prune, sharded or not.
        smaller_model: after it.
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
    """Constraints of the tables that are left, for the features that are left.

    TorchRec applies a constraint to all tables of its name, in whatever collections. Where they
    lost features in different places, no values are right for all of them, and the lists stay as
    they were.

    Args:
        constraints: by table.
        old: (fqn of a collection, table) -> features, before.
        new: the same, after.
    """
    before, after = ({table for _, table in model} for model in (old, new))
    kept: dict[str, list[tuple[list[str], list[str]]]] = defaultdict(list)
    for key, features in new.items():
        if key in old:
            kept[key[1]].append((old[key], features))
    return {
        table: _narrowed(copy.deepcopy(constraint), kept[table])
        for table, constraint in constraints.items()
        if table in after or table not in before
    }


@dataclass(frozen=True)
class Comparison:
    """Staying against moving to the planner's plan; plain data for a manifest.

    Args:
        sticky_step_ms: estimated step if the tables stay.
        planner_step_ms: estimated step of the planner's plan; None if the planner found none.
        sticky_bytes: that go from one rank to another if the tables stay.
        planner_bytes: the same for the planner's plan; None if it found none.
        sticky_move_ms: estimated time that this takes.
        planner_move_ms: the same for the planner's plan; None if it found none.
        steps_left: of the training; None if unknown, which counts as many.
        break_even_steps: after which the planner's plan has made up for its move; None if never.
        decision: sticky or planner.
        reason: in words.
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
    """What a plan costs: once to get there, and then in each step.

    Args:
        step_ms: estimated.
        link_bytes: (W, W) bytes from rank to rank, as `transfer_plan.link_bytes` gives them.
    """

    step_ms: float
    link_bytes: NDArray[np.int64]


def compare(
    sticky: PlanCost,
    planner: PlanCost | None,
    topology: Topology,
    steps_left: int | None = None,
) -> Comparison:
    """Decides between staying and moving. Pure: every rank comes to the same.

    Args:
        sticky: if the surviving tables stay where they are.
        planner: with the planner's plan; None if it found none.
        topology: for the bandwidths within a host and between hosts.
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
            reason = f"the move pays off after {break_even_steps:.0f} steps, {steps_left} are left"
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
    """Bytes that go from one rank to another; what stays on its rank does not count."""
    return int(links.sum() - np.trace(links))


def move_ms(links: NDArray[np.int64], topology: Topology) -> float:
    """Milliseconds until the busiest rank has sent and received its bytes.

    A rank sends and receives at the same time, over the link within its host and the one to other
    hosts at the same time, each at the bandwidth that TorchRec's topology gives it.

    Args:
        links: (W, W) bytes from rank to rank.
        topology: W ranks.
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
    """Whether every rank can hold the old tables, the new ones and one chunk in transit at once.

    Compares TorchRec's estimates, which include inputs and outputs of a step, with the topology's
    capacities; the chunk lies in the memory of the compute device.
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
    """For the tables of one name, each with its features before and after."""
    lists: dict[str, Any] = {}
    for name in ("pooling_factors", "num_poolings", "batch_sizes"):
        values = getattr(constraint, name)
        # A list of another length is not of a value a feature.
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
    """Shares nothing that TorchRec changes in a plan by which it has sharded a model.

    It rebinds the placements of shards (`DMPCollection`), and the sizes and offsets of virtual
    tables (`embedding_kernel.py`). Placements themselves it changes only when it shards onto
    the meta device. A deep copy of a table's 1,024 shards would take 25 ms.
    """
    copied = replace(sharding, ranks=None if sharding.ranks is None else list(sharding.ranks))
    if isinstance(sharding.sharding_spec, EnumerableShardingSpec):
        # Not its constructor, which looks for overlaps again.
        copied.sharding_spec = copy.copy(sharding.sharding_spec)
        copied.sharding_spec.shards = [
            ShardMetadata(shard.shard_offsets, shard.shard_sizes, shard.placement)
            for shard in sharding.sharding_spec.shards
        ]
    return copied
