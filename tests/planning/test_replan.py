"""Sticky plans, narrowed planners, and the decision between staying and moving."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.planner.estimator import EmbeddingPerfEstimatorFactory

from tests.support.planned_models import Model, constraints, planner, sharders, topology
from torchrec_fmp.gates.attach import attach_gates
from torchrec_fmp.gates.feature_gates import GateConfig
from torchrec_fmp.planning.estimates import PlanEstimate
from torchrec_fmp.planning.replan import (
    PlanCost,
    compare,
    fits_side_by_side,
    move_ms,
    moved_bytes,
    narrowed_constraints,
    narrowed_planner,
    sticky_plan,
)

MIXED = {"t_a": "row_wise", "t_bc": "table_wise", "t_d": "column_wise", "t_e": "data_parallel"}


def test_surviving_tables_stay_exactly_where_they_are() -> None:
    gated = attach_gates(Model(), GateConfig())
    old = planner(topology(), constraints(MIXED)).plan(gated, sharders())
    before = copy.deepcopy(old)

    new = sticky_plan(old, Model(without=("d", "c")))

    assert set(new.plan["bags"]) == {"t_a", "t_bc", "t_e"}  # type: ignore[call-overload]
    for table, sharding in new.plan["bags"].items():  # type: ignore[attr-defined]
        assert sharding == old.plan["bags"][table]  # type: ignore[index]
        assert sharding is not old.plan["bags"][table]  # type: ignore[index]
    mine = new.plan["bags"]["t_a"]  # type: ignore[index]
    mine.ranks.append(7)
    # TorchRec does the same to the plans that it shards by.
    for shard in mine.sharding_spec.shards:
        shard.placement = None
        shard.shard_sizes = [0, 0]
    mine.sharding_spec.shards.pop()
    assert old == before


def test_a_table_missing_from_the_old_plan_is_refused() -> None:
    old = planner(topology()).plan(Model(without=("a",)), sharders())
    with pytest.raises(ValueError, match=r"the old plan has no tables \['t_a'\]"):
        sticky_plan(old, Model())


def test_constraints_keep_the_values_of_the_remaining_tables_and_features() -> None:
    given = {
        "t_bc": ParameterConstraints(
            sharding_types=["row_wise"],
            pooling_factors=[2.0, 6.0],
            num_poolings=[1.0, 3.0],
            batch_sizes=[10, 20],
            feature_names=["b", "c"],
        ),
        "t_d": ParameterConstraints(),
        "t_of_another_model": ParameterConstraints(),
    }
    before = copy.deepcopy(given)
    old = {("bags", "t_bc"): ["b", "c"], ("bags", "t_d"): ["d"]}
    narrowed = narrowed_constraints(given, old, {("bags", "t_bc"): ["c"]})
    assert narrowed == {
        "t_bc": ParameterConstraints(
            sharding_types=["row_wise"],
            pooling_factors=[6.0],
            num_poolings=[3.0],
            batch_sizes=[20],
            feature_names=["c"],
        ),
        "t_of_another_model": ParameterConstraints(),
    }
    assert given == before


def test_a_single_pooling_factor_for_all_features_of_a_table_is_kept() -> None:
    given = {"t_bc": ParameterConstraints(pooling_factors=[4.0])}
    old, new = {("bags", "t_bc"): ["b", "c"]}, {("bags", "t_bc"): ["c"]}
    assert narrowed_constraints(given, old, new) == given


TWO_OF_ONE_NAME = {("first", "t"): ["a", "b"], ("second", "t"): ["c", "d"]}


@pytest.mark.parametrize(
    ("new", "left"),
    [
        pytest.param({("first", "t"): ["b"]}, [6.0], id="one of them"),
        pytest.param({("second", "t"): ["c"]}, [2.0], id="the other"),
        pytest.param({("first", "t"): ["b"], ("second", "t"): ["d"]}, [6.0], id="both alike"),
        pytest.param({("first", "t"): ["b"], ("second", "t"): ["c", "d"]}, [2.0, 6.0], id="one"),
        pytest.param({("first", "t"): ["a"], ("second", "t"): ["d"]}, [2.0, 6.0], id="differently"),
        pytest.param({}, None, id="none"),
    ],
)
def test_tables_of_the_same_name_are_narrowed_only_if_all_that_remain_agree(
    new: dict[tuple[str, str], list[str]], left: list[float] | None
) -> None:
    given = {"t": ParameterConstraints(pooling_factors=[2.0, 6.0])}
    narrowed = narrowed_constraints(given, TWO_OF_ONE_NAME, new)
    assert [constraint.pooling_factors for constraint in narrowed.values()] == (
        [] if left is None else [left]
    )


def test_narrowing_ignores_tables_of_the_same_name_with_another_feature_count() -> None:
    given = {"t": ParameterConstraints(pooling_factors=[2.0, 6.0])}
    old = {("first", "t"): ["a", "b"], ("second", "t"): ["c", "d", "e"]}
    new = {("first", "t"): ["b"], ("second", "t"): ["c"]}
    assert narrowed_constraints(given, old, new)["t"].pooling_factors == [6.0]


def test_a_planner_of_a_gated_model_is_narrowed_like_one_of_the_plain_model() -> None:
    gated, smaller = attach_gates(Model(), GateConfig()), Model(without=("c",))
    narrowed = narrowed_planner(planner(topology()), gated, smaller)
    assert narrowed._constraints is not None
    assert narrowed._constraints["t_bc"].pooling_factors == [2.0]


def test_narrowing_gives_a_planner_of_the_smaller_model_and_keeps_the_users_planner() -> None:
    old, smaller = Model(), Model(without=("d", "b"))
    mine = planner(topology())
    mine.plan(old, sharders())

    narrowed = narrowed_planner(mine, old, smaller)

    plan = narrowed.plan(smaller, sharders())
    assert set(plan.plan["bags"]) == {"t_a", "t_bc", "t_e"}  # type: ignore[call-overload]
    holders = [narrowed, narrowed._enumerator, *narrowed._enumerator._estimators]  # type: ignore[attr-defined]
    for holder in holders:
        assert holder._constraints is narrowed._constraints  # type: ignore[union-attr]
    assert narrowed._constraints is not None
    assert narrowed._constraints["t_bc"].pooling_factors == [6.0]
    assert set(narrowed._constraints) == {"t_a", "t_bc", "t_e"}
    assert mine._constraints == constraints()
    assert mine._enumerator._last_stored_module is old  # type: ignore[attr-defined]


def test_a_narrowed_planner_plans_like_one_made_for_the_smaller_model() -> None:
    old, smaller = Model(), Model(without=("b",))
    narrowed = narrowed_planner(planner(topology()), old, smaller)
    given = constraints()
    given["t_bc"].pooling_factors = [6.0]
    made = planner(topology(), given)
    assert narrowed.plan(smaller, sharders()) == made.plan(smaller, sharders())


def test_estimators_with_their_own_constraints_are_narrowed_too() -> None:
    old, smaller = Model(), Model(without=("c",))
    mine = planner(topology())
    own = EmbeddingPerfEstimatorFactory.create(
        "default_estimator", topology=topology(), constraints=constraints()
    )
    mine._enumerator._estimators[0] = own  # type: ignore[attr-defined]
    narrowed = narrowed_planner(mine, old, smaller)
    narrowed.plan(smaller, sharders())
    assert narrowed._enumerator._estimators[0]._constraints["t_bc"].pooling_factors == [2.0]  # type: ignore[attr-defined]


def test_a_planner_of_another_type_is_returned_unchanged() -> None:
    other = object()
    assert narrowed_planner(other, Model(), Model(without=("a",))) is other


def links(total: int, world_size: int = 4) -> np.ndarray:
    """Rank 0 sends `total` bytes to the last rank, on another host; 10**12 stay on each rank."""
    matrix = np.diag(np.full(world_size, 10**12))
    matrix[0, -1] = total
    return matrix


def test_bytes_that_stay_on_their_rank_do_not_count_as_moved() -> None:
    assert moved_bytes(links(5)) == 5
    assert move_ms(np.diag([10**12] * 4), topology()) == 0


def test_move_time_is_the_time_of_the_busiest_rank_on_its_slowest_link() -> None:
    where = topology()
    between = np.zeros((4, 4), dtype=np.int64)
    between[0, 2] = between[1, 2] = int(where.inter_host_bw)
    assert move_ms(between, where) == pytest.approx(2)
    within = np.zeros((4, 4), dtype=np.int64)
    within[0, 1] = int(3 * where.intra_host_bw)
    assert move_ms(within, where) == pytest.approx(3)
    assert move_ms(between + within, where) == pytest.approx(3)


@pytest.mark.parametrize(
    ("steps_left", "decision"), [(99, "sticky"), (101, "planner"), (None, "planner")]
)
def test_the_planners_plan_is_chosen_if_its_gain_outweighs_the_move(
    steps_left: int | None, decision: str
) -> None:
    where = topology()
    moving = PlanCost(8.0, links(int(200 * where.inter_host_bw)))
    compared = compare(PlanCost(10.0, links(0)), moving, where, steps_left)
    assert compared.break_even_steps == pytest.approx(100)
    assert compared.planner_move_ms == pytest.approx(200)
    assert compared.decision == decision
    assert json.loads(json.dumps(compared.describe()))["decision"] == decision


@pytest.mark.parametrize("planner_step_ms", [9.95, 10.0, 12.0])
def test_a_gain_below_the_resolution_of_estimates_moves_nothing(planner_step_ms: float) -> None:
    moving = PlanCost(planner_step_ms, links(0))
    compared = compare(PlanCost(10.0, links(0)), moving, topology())
    assert compared.decision == "sticky"


def test_tables_stay_if_the_planner_finds_no_plan() -> None:
    compared = compare(PlanCost(10.0, links(0)), None, topology())
    assert compared.decision == "sticky"
    assert compared.reason == "the planner found no plan that fits"


@pytest.mark.parametrize(("device", "memory"), [("cuda", "hbm"), ("cpu", "ddr")])
def test_old_and_new_tables_and_a_chunk_must_fit_on_every_rank(device: str, memory: str) -> None:
    where = topology(2, device, hbm=1000)
    capacity = getattr(where.devices[0].storage, memory)

    def estimate(*held: int) -> PlanEstimate:
        zero, some = np.zeros(2, np.int64), np.array(held, np.int64)
        return PlanEstimate(
            some if memory == "hbm" else zero, some if memory == "ddr" else zero, np.zeros(2)
        )

    old, new = estimate(500, 100), estimate(400, 100)
    full = capacity - 900
    assert fits_side_by_side(old, new, where, chunk_bytes=full)
    assert not fits_side_by_side(old, new, where, chunk_bytes=full + 1)
