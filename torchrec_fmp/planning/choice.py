"""The new plan of a prune: the planner's, the old one without what is gone, or the better."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import ModuleSharder, ShardingPlan

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
    steps_left: int | None,
    chunk_bytes: int,
) -> Choice:
    """Plans the smaller model.

    Args:
        planner: of the user; not changed. Its constraints of tables that are gone are left out.
        replan: `planner` takes its plan, `sticky` leaves the tables that survive where they are,
            `auto` compares the two by TorchRec's estimates; with a planner that makes none, it
            takes the planner's plan.
        old: plan and blueprint of the model before.
        smaller: not sharded, on meta.
        sharders: of the model.
        links: plan -> bytes from rank to rank, (W, W) int64.
        steps_left: of the training; None if unknown, which counts as many.
        chunk_bytes: in transit on each rank.

    Raises:
        PlannerError: if the planner is asked and finds no plan, and `replan` is not `auto`.
        PoolingChangedError: if TorchRec would pool a table that survives in another way.
    """
    if not isinstance(planner, EmbeddingShardingPlanner):
        stays = replan == "sticky"
        plan = sticky_plan(old[0], smaller) if stays else planner.plan(smaller, sharders)
        check_pooling(old, (plan, smaller))
        return Choice(plan)
    topology = planner._topology
    narrowed = narrowed_planner(planner, old[1], smaller)
    before = estimate_as(planner, old[0], old[1], sharders)

    def choice(plan: ShardingPlan) -> Choice:
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
    chosen = moving if comparison.decision == "planner" else staying
    return dataclasses.replace(chosen, comparison=comparison)


def _tried(choose: Callable[[], Choice]) -> Choice | PlannerError | PoolingChangedError:
    """A choice, or why there is none."""
    try:
        return choose()
    except (PlannerError, PoolingChangedError) as error:
        return error
