"""The new plan of a prune: the planner's, the old one without what is gone, or the better."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
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

from torchrec_fmp.planning.estimates import PlanEstimate, estimate_as
from torchrec_fmp.planning.pooling import PoolingChangedError, check_pooling
from torchrec_fmp.planning.replan import (
    Comparison,
    Replan,
    compare,
    fits_side_by_side,
    narrowed_planner,
    sticky_plan,
)
from torchrec_fmp.planning.tables import features_by_collection, is_dense

_OPTIMIZERS = {True: "dense one", False: "fused one"}

Links = Callable[[ShardingPlan], NDArray[np.int64]]


class Planner(Protocol):
    """What `prune` needs of a planner; TorchRec's `EmbeddingShardingPlanner` is one."""

    def plan(self, module: nn.Module, sharders: list[ModuleSharder[Any]]) -> ShardingPlan:
        """A plan for the module; called on rank 0."""


@dataclass(frozen=True)
class Choice:
    """A plan, and what it is expected to cost.

    The estimates are those of TorchRec's `EmbeddingShardingPlanner`, and None for another planner.

    Args:
        plan: for the smaller model.
        before: what the old plan takes of every rank.
        after: what the new one takes.
        comparison: of staying and moving, where there was a choice.
        fits: whether old and new tables fit on every rank side by side.
    """

    plan: ShardingPlan
    before: PlanEstimate | None = None
    after: PlanEstimate | None = None
    comparison: Comparison | None = None
    fits: bool = True


def choose_plan(
    planner: Planner,
    replan: Replan,
    old: tuple[ShardingPlan, nn.Module],
    smaller: nn.Module,
    sharders: list[ModuleSharder[Any]],
    links: Links,
    world_size: int,
    steps_left: int | None,
    chunk_bytes: int,
) -> Choice:
    """Plans the smaller model.

    Args:
        planner: of the user; not changed. Its constraints of tables that are gone are left out.
        replan: `planner` takes its plan, `sticky` leaves the tables that survive where they are,
            `auto` compares the two by TorchRec's estimates; with a planner that makes none, it
            takes the planner's plan. Where TorchRec's plan would bring a table from the fused to
            the dense optimizer or back, as data_parallel does, `auto` stays: the two may keep
            different states, or rates. `planner` takes such a plan as it is.
        old: plan and blueprint of the model before.
        smaller: not sharded, on meta.
        sharders: of the model.
        links: plan -> bytes from rank to rank, (W, W) int64.
        world_size: number of ranks of the model's process group, W.
        steps_left: of the training; None if unknown, which counts as many.
        chunk_bytes: in transit on each rank.

    Raises:
        PlannerError: if the planner is asked and finds no plan, and `replan` is not `auto`.
        PoolingChangedError: if TorchRec would pool a table that survives in another way.
        ValueError: if the planner is for another number of ranks, or its plan lacks a table or
            names a rank that is not there.
    """
    if not isinstance(planner, EmbeddingShardingPlanner):
        stays = replan == "sticky"
        plan = sticky_plan(old[0], smaller) if stays else planner.plan(smaller, sharders)
        _check_plan(plan, smaller, world_size)
        check_pooling(old, (plan, smaller))
        return Choice(plan)
    topology = planner._topology
    if topology.world_size != world_size:
        raise ValueError(
            f"the planner's topology has {topology.world_size} ranks, and the model's process "
            f"group has {world_size}: pass a planner whose topology has {world_size}"
        )
    narrowed = narrowed_planner(planner, old[1], smaller)
    before = estimate_as(planner, old[0], old[1], sharders)

    def choice(plan: ShardingPlan) -> Choice:
        _check_plan(plan, smaller, world_size)
        check_pooling(old, (plan, smaller))
        after = estimate_as(narrowed, plan, smaller, sharders)
        return Choice(
            plan, before, after, fits=fits_side_by_side(before, after, topology, chunk_bytes)
        )

    if replan == "planner":
        return choice(narrowed.plan(smaller, sharders))
    if replan == "sticky":
        return choice(sticky_plan(old[0], smaller))
    staying, moving = (
        _tried(lambda: choice(sticky_plan(old[0], smaller))),
        _tried(lambda: choice(narrowed.plan(smaller, sharders))),
    )
    if isinstance(staying, Exception):
        if isinstance(moving, Exception):
            raise moving from staying
        return moving
    if isinstance(moving, Exception):
        planned_ms, planned_links = None, None
    else:
        assert moving.after is not None
        planned_ms, planned_links = moving.after.step_ms, links(moving.plan)
    assert staying.after is not None
    comparison = compare(
        staying.after.step_ms, links(staying.plan), planned_ms, planned_links, topology, steps_left
    )
    if isinstance(moving, Exception):
        return dataclasses.replace(
            staying, comparison=dataclasses.replace(comparison, reason=str(moving))
        )
    if comparison.decision == "planner":
        crossing = _changing_optimizer(old[0], moving.plan)
        if not crossing:
            return dataclasses.replace(moving, comparison=comparison)
        comparison = dataclasses.replace(
            comparison,
            decision="sticky",
            reason=f"the planner's plan takes tables from one optimizer to another: {crossing}",
        )
    return dataclasses.replace(staying, comparison=comparison)


def _check_plan(plan: ShardingPlan, smaller: nn.Module, world_size: int) -> None:
    """A planner is the user's: its plan may lack tables, or be for other ranks."""
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
                f"model's process group has {world_size} ranks: plan for those"
            )
    if lacking:
        told = "; ".join(f"{tables} of {fqn or 'the model'}" for fqn, tables in lacking.items())
        raise ValueError(
            f"the plan lacks the tables {told}: the planner must plan every table of the model "
            "that it is given, under the fqn of its collection"
        )


def _changing_optimizer(old: ShardingPlan, new: ShardingPlan) -> str:
    """The tables that change between the fused and the dense optimizer, in words; "" if none."""
    told = []
    for fqn, module_plan in new.plan.items():
        before = cast(EmbeddingModuleShardingPlan, old.plan[fqn])
        for table, sharding in cast(EmbeddingModuleShardingPlan, module_plan).items():
            becomes_dense = is_dense(sharding)
            if becomes_dense != is_dense(before[table]):
                told.append(f"{table} of {fqn or 'the model'} to the {_OPTIMIZERS[becomes_dense]}")
    return ", ".join(told)


def _tried(choose: Callable[[], Choice]) -> Choice | PlannerError | PoolingChangedError:
    """A choice, or why there is none."""
    try:
        return choose()
    except (PlannerError, PoolingChangedError) as error:
        return error
