"""`choose_plan`: plans it refuses, and when it keeps the plan although moving would be faster."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingPlan

from tests.support.planned_models import Model, constraints, planner, sharders, topology
from torchrec_fmp.planning.choice import Choice, Planner, PlanRequest, choose_plan
from torchrec_fmp.planning.planner import PlannedModel
from torchrec_fmp.planning.replan import Replan

TABLE_WISE = dict.fromkeys(("t_a", "t_bc", "t_d", "t_e"), "table_wise")


class Fixed:
    """A planner other than TorchRec's."""

    def __init__(self, plan: ShardingPlan) -> None:
        self._plan = plan

    def plan(self, module: Any, sharders: Any) -> ShardingPlan:
        return self._plan


def old_plan(types: dict[str, str] | None = None) -> ShardingPlan:
    return planner(topology(), constraints(types or TABLE_WISE)).plan(Model(), sharders())


def chosen(by: Planner, replan: Replan, old: ShardingPlan, world_size: int = 4) -> Choice:
    request = PlanRequest(
        old=PlannedModel(old, Model()),
        smaller=Model(without=("a",)),
        sharders=list(sharders()),
        link_bytes=lambda plan: np.zeros((world_size, world_size), dtype=np.int64),
        world_size=world_size,
        steps_left=None,
        chunk_bytes=2**20,
    )
    return choose_plan(by, replan, request)


@pytest.mark.parametrize("replan", ["auto", "planner", "sticky"])
def test_a_planner_for_another_number_of_ranks_is_refused(replan: Replan) -> None:
    with pytest.raises(ValueError, match="topology has 8 ranks, and the .* group has 4"):
        chosen(planner(topology(8)), replan, old_plan())


def test_a_plan_that_names_a_rank_beyond_the_group_is_refused() -> None:
    plan = planner(topology(8), constraints(dict.fromkeys(TABLE_WISE, "row_wise")))
    by = Fixed(plan.plan(Model(), sharders()))
    with pytest.raises(ValueError, match="the plan puts table t_bc of bags on rank:4/.* 4 ranks"):
        chosen(by, "planner", old_plan())


@pytest.mark.parametrize(
    ("left_out", "tables"),
    [(("t_d",), r"\['t_d'\]"), (tuple(TABLE_WISE), r"\['t_bc', 't_d', 't_e'\]")],
)
def test_a_plan_without_some_tables_is_refused_and_names_them(
    left_out: tuple[str, ...], tables: str
) -> None:
    module_plan = old_plan().plan["bags"]
    lacking = {name: one for name, one in module_plan.items() if name not in left_out}  # type: ignore[attr-defined]
    plan = ShardingPlan({"bags": EmbeddingModuleShardingPlan(lacking)})
    with pytest.raises(ValueError, match=f"the plan lacks the tables {tables} of bags"):
        chosen(Fixed(plan), "auto", old_plan())


def test_a_plan_without_a_collection_is_refused_and_names_it() -> None:
    with pytest.raises(ValueError, match="the plan lacks the tables .* of bags"):
        chosen(Fixed(ShardingPlan({})), "planner", old_plan())


DATA_PARALLEL = TABLE_WISE | {"t_d": "data_parallel"}


def test_auto_keeps_the_plan_if_moving_would_change_a_tables_optimizer() -> None:
    old, by = old_plan(DATA_PARALLEL), planner(topology(), constraints(TABLE_WISE))
    taken, stayed = (chosen(by, replan, old) for replan in ("planner", "auto"))  # type: ignore[arg-type]
    assert taken.plan.plan["bags"]["t_d"].sharding_type == "table_wise"  # type: ignore[index]
    assert stayed.plan.plan["bags"]["t_d"].sharding_type == "data_parallel"  # type: ignore[index]
    assert stayed.comparison is not None
    assert stayed.comparison.decision == "sticky"
    assert stayed.comparison.reason.endswith("t_d of bags to the fused optimizer")
    # The user can then ask for the planner's plan.
    assert taken.after is not None
    assert stayed.comparison.planner_step_ms == taken.after.step_ms
    assert taken.after.step_ms < stayed.comparison.sticky_step_ms


def test_auto_moves_if_dense_optimizer_tables_keep_their_optimizer() -> None:
    old = old_plan(DATA_PARALLEL | {"t_bc": "row_wise", "t_e": "row_wise"})
    moved = chosen(planner(topology(), constraints(DATA_PARALLEL)), "auto", old)
    assert moved.comparison is not None
    assert moved.comparison.decision == "planner"


def test_a_dense_kernel_belongs_to_the_dense_optimizer_for_any_sharding() -> None:
    old = old_plan({"t_d": "table_wise", "t_a": "row_wise", "t_bc": "row_wise", "t_e": "row_wise"})
    module_plan = old.plan["bags"]
    bc = module_plan["t_bc"]  # type: ignore[index]
    module_plan["t_bc"] = dataclasses.replace(bc, compute_kernel="dense")  # type: ignore[index]
    stayed = chosen(planner(topology(), constraints(TABLE_WISE)), "auto", old)
    assert stayed.comparison is not None
    assert stayed.comparison.reason.endswith("t_bc of bags to the fused optimizer")
