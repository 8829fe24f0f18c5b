"""Chooses a prune's new plan: the planner's, the old one without dropped tables, or the better."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ModuleSharder,
    ShardingPlan,
)

from torchrec_fmp.embeddings.boxes import is_dense
from torchrec_fmp.embeddings.collections import features_by_collection
from torchrec_fmp.embeddings.seams import topology_of
from torchrec_fmp.planning.estimates import PlanEstimate, estimate_as
from torchrec_fmp.planning.planner import PlannedModel
from torchrec_fmp.planning.pooling import PoolingChangedError, check_pooling
from torchrec_fmp.planning.replan import (
    Comparison,
    PlanCost,
    Replan,
    compare,
    fits_side_by_side,
    narrowed_planner,
    sticky_plan,
)

_OPTIMIZERS = {True: "dense optimizer", False: "fused optimizer"}

LinkBytes = Callable[[ShardingPlan], NDArray[np.int64]]


class Planner(Protocol):
    """Planner interface that `prune` needs; TorchRec's `EmbeddingShardingPlanner` has it."""

    def plan(self, module: nn.Module, sharders: list[ModuleSharder[Any]]) -> ShardingPlan:
        """Returns a plan for the module; called on rank 0."""


@dataclass(frozen=True)
class Choice:
    """A plan and its expected cost.

    The estimates come from TorchRec's `EmbeddingShardingPlanner`; with another planner they are
    None.

    Args:
        plan: plan for the smaller model.
        before: estimated cost of the old plan on every rank.
        after: estimated cost of the new plan.
        comparison: comparison of staying and moving, where there was a choice.
        fits: whether the old and new tables fit side by side on every rank.
    """

    plan: ShardingPlan
    before: PlanEstimate | None = None
    after: PlanEstimate | None = None
    comparison: Comparison | None = None
    fits: bool = True


@dataclass(frozen=True)
class PlanRequest:
    """The model to plan, and the data for choosing its plan.

    Args:
        old: model before the prune, as its blueprint, and its plan.
        smaller: model after the prune, unsharded, on meta.
        sharders: sharders of the model.
        link_bytes: function from a plan to (W, W) int64 bytes from rank to rank.
        world_size: number of ranks W in the model's process group.
        steps_left: training steps remaining; None is treated as unlimited.
        chunk_bytes: bytes in transit on each rank.
    """

    old: PlannedModel
    smaller: nn.Module
    sharders: list[ModuleSharder[Any]]
    link_bytes: LinkBytes
    world_size: int
    steps_left: int | None
    chunk_bytes: int


def choose_plan(planner: Planner, replan: Replan, request: PlanRequest) -> Choice:
    """Plans the smaller model.

    Args:
        planner: user's planner; not changed. Its constraints for dropped tables are left out.
        replan: `planner` takes the planner's plan, `sticky` leaves surviving tables where they are,
            `auto` compares the two by TorchRec's estimates. If the planner makes no estimates,
            `auto` takes the planner's plan. If TorchRec's plan would move a table between the fused
            and the dense optimizer, as data_parallel does, `auto` stays, because the two may keep
            different states or rates; `planner` takes such a plan unchanged.
        request: model to plan.

    Raises:
        PlannerError: if the planner finds no plan, and the tables cannot stay where they are
            either: `replan` is `planner`, or `auto` cannot compare or may not stay.
        PoolingChangedError: if TorchRec would pool a surviving table differently.
        ValueError: if the planner is for another number of ranks, or its plan lacks a table or
            names a rank that does not exist.
    """
    if not isinstance(planner, EmbeddingShardingPlanner):
        if replan == "sticky":
            plan = sticky_plan(request.old.plan, request.smaller)
        else:
            plan = planner.plan(request.smaller, request.sharders)
        _check_plan(plan, request)
        return Choice(plan)
    plans = _Plans(planner, request)
    if replan == "planner":
        return plans.moving()
    if replan == "sticky":
        return plans.staying()
    staying, moving = _tried(plans.staying), _tried(plans.moving)
    if isinstance(staying, Exception):
        if isinstance(moving, Exception):
            raise moving from staying
        return moving
    return plans.better(staying, moving)


class _Plans:
    """The candidate plans of TorchRec's planner, with the estimates to compare them.

    Raises:
        ValueError: if the planner is for another number of ranks.
    """

    def __init__(self, planner: EmbeddingShardingPlanner, request: PlanRequest) -> None:
        self._request = request
        self._topology = topology_of(planner)
        if self._topology.world_size != request.world_size:
            raise ValueError(
                f"the planner's topology has {self._topology.world_size} ranks, and the model's "
                f"process group has {request.world_size}: pass a planner whose topology has "
                f"{request.world_size}"
            )
        old = request.old
        self._planner = narrowed_planner(planner, old.model, request.smaller)
        self._before = estimate_as(planner, old.plan, old.model, request.sharders)

    def staying(self) -> Choice:
        """The plan that leaves surviving tables where they are."""
        return self._choice(sticky_plan(self._request.old.plan, self._request.smaller))

    def moving(self) -> Choice:
        """The planner's own plan."""
        return self._choice(self._planner.plan(self._request.smaller, self._request.sharders))

    def better(self, staying: Choice, moving: Choice | Exception) -> Choice:
        """The plan that pays off, or the sticky one if there is no other."""
        planned = None if isinstance(moving, Exception) else self._cost(moving)
        comparison = compare(self._cost(staying), planned, self._topology, self._request.steps_left)
        if isinstance(moving, Exception):
            comparison = replace(comparison, reason=str(moving))
        elif comparison.decision == "planner":
            crossing = _changing_optimizer(self._request.old.plan, moving.plan)
            if not crossing:
                return replace(moving, comparison=comparison)
            reason = f"the planner's plan would move tables to another optimizer: {crossing}"
            comparison = replace(comparison, decision="sticky", reason=reason)
        return replace(staying, comparison=comparison)

    def _choice(self, plan: ShardingPlan) -> Choice:
        request = self._request
        _check_plan(plan, request)
        after = estimate_as(self._planner, plan, request.smaller, request.sharders)
        fits = fits_side_by_side(self._before, after, self._topology, request.chunk_bytes)
        return Choice(plan, self._before, after, fits=fits)

    def _cost(self, choice: Choice) -> PlanCost:
        assert choice.after is not None
        return PlanCost(choice.after.step_ms, self._request.link_bytes(choice.plan))


def _check_plan(plan: ShardingPlan, request: PlanRequest) -> None:
    """Checks that the plan fits this model and these ranks, and keeps the pooling."""
    _check_complete(plan, request.smaller, request.world_size)
    check_pooling(request.old, PlannedModel(plan, request.smaller))


def _check_complete(plan: ShardingPlan, smaller: nn.Module, world_size: int) -> None:
    """Checks a plan by a user's planner, which may lack tables or be for other ranks."""
    lacking: dict[str, list[str]] = defaultdict(list)
    for fqn, table in features_by_collection(smaller):
        module_plan = cast(EmbeddingModuleShardingPlan, plan.plan.get(fqn, {}))
        if table not in module_plan:
            lacking[fqn].append(table)
            continue
        spec = module_plan[table].sharding_spec
        shards = spec.shards if isinstance(spec, EnumerableShardingSpec) else ()
        beyond = [s.placement for s in shards if not 0 <= s.placement.rank() < world_size]
        if beyond:
            raise ValueError(
                f"the plan puts table {table} of {fqn or 'the model'} on {beyond[0]}, but the "
                f"model's process group has {world_size} ranks: make the plan for these ranks"
            )
    if lacking:
        told = "; ".join(f"{tables} of {fqn or 'the model'}" for fqn, tables in lacking.items())
        raise ValueError(
            f"the plan lacks the tables {told}: the planner must plan every table of its "
            "input model, under the fqn of the table's collection"
        )


def _changing_optimizer(old: ShardingPlan, new: ShardingPlan) -> str:
    """Tables that move between the fused and the dense optimizer, as text; "" if none."""
    told = []
    for fqn, module_plan in new.plan.items():
        before = cast(EmbeddingModuleShardingPlan, old.plan[fqn])
        for table, sharding in cast(EmbeddingModuleShardingPlan, module_plan).items():
            becomes_dense = is_dense(sharding)
            if becomes_dense != is_dense(before[table]):
                told.append(f"{table} of {fqn or 'the model'} to the {_OPTIMIZERS[becomes_dense]}")
    return ", ".join(told)


def _tried(choose: Callable[[], Choice]) -> Choice | PlannerError | PoolingChangedError:
    """A choice, or the error that prevented it."""
    try:
        return choose()
    except (PlannerError, PoolingChangedError) as error:
        return error
