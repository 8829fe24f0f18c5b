"""Costs of features: they add up to the tables' costs, and a shared table's cost is divided."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator

from tests.support.planned_models import (
    BAGS,
    BATCH_SIZE,
    Model,
    constraints,
    planner,
    sharders,
    topology,
)
from torchrec_fmp import TableCost, costs, table_costs
from torchrec_fmp.gates.attach import attach_gates
from torchrec_fmp.gates.feature_gates import GateConfig
from torchrec_fmp.planning.estimates import estimate
from torchrec_fmp.selection.costs import Unit

ROW_WISE = dict.fromkeys(BAGS, "row_wise")


def of(model: nn.Module, unit: Unit, given: dict[str, ParameterConstraints]) -> dict[str, float]:
    return costs(
        model, topology(), unit, batch_size=BATCH_SIZE, constraints=given, sharders=sharders()
    )


def test_bytes_are_weight_bytes_divided_equally_within_shared_tables() -> None:
    found = of(Model(sequences=True), "bytes", constraints())
    assert found == {
        "a": 4 * 100_000 * 64,
        "b": 4 * 50_000 * 32 / 2,
        "c": 4 * 50_000 * 32 / 2,
        "d": 4 * 8_000 * 64,
        "e": 4 * 400_000 * 128,
        "s": 4 * 1000 * 16,
    }


def test_table_costs_list_bytes_per_table_and_milliseconds_per_feature() -> None:
    model, where = Model(), topology()
    shared = table_costs(model, where, "bytes", sharders=sharders())
    assert TableCost(("b", "c"), 4 * 50_000 * 32) in shared
    assert len(shared) == len(BAGS)
    alone = table_costs(model, where, "step_ms", batch_size=BATCH_SIZE, sharders=sharders())
    assert [cost.features for cost in alone] == [("a",), ("b",), ("c",), ("d",), ("e",)]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_costs_of_a_plan_add_up_to_its_estimate(device: str) -> None:
    where, model, given = topology(device=device), Model(sequences=True), constraints()
    plan = planner(where, given).plan(model, sharders())
    whole = estimate(
        plan, model, where, sharders=sharders(), batch_size=BATCH_SIZE, constraints=given
    )
    for unit, expected in (
        ("hbm", float(whole.device_bytes(where).sum())),
        ("step_ms", float(whole.rank_ms.mean())),
    ):
        found = costs(
            model,
            where,
            unit,  # type: ignore[arg-type]
            batch_size=BATCH_SIZE,
            constraints=given,
            sharders=sharders(),
            plan=plan,
        )
        assert set(found) == set("abcdes")
        assert sum(found.values()) == pytest.approx(expected)


def test_milliseconds_of_a_shared_table_are_divided_by_lookups() -> None:
    found = of(Model(), "step_ms", constraints(ROW_WISE))
    assert found["c"] == pytest.approx(3 * found["b"])


def test_a_feature_of_two_tables_pays_for_both() -> None:
    one, both = Model(), Model()
    both.more = Model(without=("a", "b", "c", "e")).bags  # type: ignore[assignment]
    first, second = (of(model, "bytes", {}) for model in (one, both))
    assert second == {**first, "d": 2 * first["d"]}


@pytest.mark.parametrize("unit", ["bytes", "hbm", "step_ms"])
def test_gates_do_not_change_the_costs(unit: Unit) -> None:
    gated = attach_gates(Model(), GateConfig())
    assert of(gated, unit, constraints()) == of(Model(), unit, constraints())


def test_costs_without_a_plan_use_the_sharding_with_the_fastest_slowest_shard() -> None:
    where = topology()
    options: dict[str, list[tuple[float, float]]] = {}
    enumerator = EmbeddingEnumerator(where, BATCH_SIZE, constraints())
    for option in enumerator.enumerate(Model(), list(sharders())):
        slowest = max(shard.perf.total for shard in option.shards if shard.perf is not None)
        options.setdefault(option.name, []).append((slowest, option.total_perf))
    found = of(Model(), "step_ms", constraints())
    for table, feature in (("t_a", "a"), ("t_d", "d"), ("t_e", "e")):
        assert len(options[table]) > 3
        slowest = min(first for first, _ in options[table])
        totals = [total / where.world_size for first, total in options[table] if first == slowest]
        assert found[feature] in totals


def test_an_unknown_unit_is_refused_and_named() -> None:
    with pytest.raises(ValueError, match="unit is 'ms'"):
        costs(Model(), topology(), "ms")  # type: ignore[arg-type]


def test_a_model_without_tables_is_refused() -> None:
    with pytest.raises(ValueError, match="no module of the types that the sharders shard"):
        costs(torch.nn.Linear(2, 2), topology())
