"""Estimates of a plan equal the estimates that TorchRec's planner made it with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torchrec
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.perf_models import NoopPerfModel, NoopStorageModel
from torchrec.distributed.planner.shard_estimators import EmbeddingStorageEstimator
from torchrec.distributed.planner.types import ShardingOption
from torchrec.distributed.types import ShardingPlan

from tests.support.planned_models import (
    BAGS,
    BATCH_SIZE,
    Model,
    constraints,
    planner,
    sharders,
    topology,
)
from torchrec_fmp.gates.attach import attach_gates
from torchrec_fmp.gates.feature_gates import GateConfig
from torchrec_fmp.gates.sharded import sharders as fmp_sharders
from torchrec_fmp.planning.estimates import PlanEstimate, estimate, estimate_as
from torchrec_fmp.planning.shardable import ShardableTable, shardable_tables

MIXED = {"t_a": "row_wise", "t_bc": "table_wise", "t_d": "column_wise", "t_e": "table_row_wise"}
TYPES = ["table_wise", "row_wise", "column_wise", "table_row_wise", "data_parallel"]


# TorchRec's sharders offer no table_row_wise on CPU.
@pytest.mark.parametrize(
    ("device", "types"),
    [("cuda", types) for types in (MIXED, *TYPES, None)]
    + [("cpu", types) for types in (*TYPES[:3], "data_parallel", None)],
    ids=str,
)
def test_the_estimate_of_a_plan_equals_the_planners_own(
    device: str, types: dict[str, str] | str | None
) -> None:
    if isinstance(types, str):
        types = dict.fromkeys(MIXED, types)
    where, model = topology(device=device), Model(sequences=True)
    given = constraints(types)
    by_torchrec = planner(where, given)
    plan = by_torchrec.plan(model, sharders())
    options = by_torchrec._best_plan
    assert options is not None

    estimated = estimate_as(by_torchrec, plan, model, sharders())

    assert estimated.step_ms == pytest.approx(NoopPerfModel(where).rate(options))
    assert estimated.hbm_bytes.max() == NoopStorageModel(where).rate(options)
    assert estimated.hbm_bytes.sum() == sum(option.total_storage.hbm for option in options)
    assert estimated.ddr_bytes.sum() == sum(option.total_storage.ddr for option in options)
    assert estimated.rank_ms.sum() == pytest.approx(sum(option.total_perf for option in options))


def test_gates_do_not_change_the_estimate() -> None:
    where, plain = topology(), Model()
    plan = planner(where).plan(plain, sharders())
    gated = attach_gates(Model(), GateConfig())
    first, second = (
        estimate_as(planner(where), plan, model, sharders()) for model in (plain, gated)
    )
    assert np.array_equal(first.hbm_bytes, second.hbm_bytes)
    assert np.array_equal(first.rank_ms, second.rank_ms)


def test_fused_optimizer_states_count_although_torchrec_ignores_them() -> None:
    where, model = topology(), Model()
    plan = planner(where, constraints(dict.fromkeys(MIXED, "row_wise"))).plan(model, sharders())

    def hbm_bytes(optimizer: EmbOptimType) -> int:
        given = fmp_sharders({"optimizer": optimizer})
        return int(_estimate(plan, model, where, given).hbm_bytes.sum())

    elements = sum(parameter.numel() for parameter in model.parameters())
    rows = sum(parameter.shape[0] for parameter in model.parameters())
    without = hbm_bytes(EmbOptimType.EXACT_SGD)
    assert hbm_bytes(EmbOptimType.ADAM) - without == 2 * 4 * elements
    # Bytes are rounded up for every shard.
    per_row = hbm_bytes(EmbOptimType.EXACT_ROWWISE_ADAGRAD) - without
    assert 4 * rows <= per_row <= 4 * rows + 16


def test_shards_of_equal_size_are_estimated_once_with_equal_results() -> None:
    where, model = topology(), Model()
    by_torchrec = planner(where, constraints(dict.fromkeys(MIXED, "row_wise")))
    plan = by_torchrec.plan(model, sharders())
    sizes: list[list[tuple[int, ...]]] = []

    class Watching(EmbeddingStorageEstimator):
        def estimate(self, options: list[ShardingOption], sharder_data_map: Any) -> None:
            sizes.extend([tuple(shard.size) for shard in option.shards] for option in options)
            super().estimate(options, sharder_data_map)

    estimators = by_torchrec._enumerator._estimators  # type: ignore[attr-defined]
    usual = estimate_as(by_torchrec, plan, model, sharders())
    estimators[1] = Watching(topology=where, constraints=constraints())
    watched = estimate_as(by_torchrec, plan, model, sharders())

    # The rows of every table divide evenly by 4 ranks.
    assert sizes == [[(rows // 4, columns)] for rows, columns, _ in BAGS.values()]
    assert np.array_equal(watched.rank_ms, usual.rank_ms)
    assert (watched.rank_ms > 0).all()


@pytest.mark.parametrize(
    ("optimizer", "of_elements", "of_rows"),
    [
        (torch.optim.SGD, 0, 0),
        (torch.optim.Adagrad, 4, 0),
        (torch.optim.Adam, 8, 0),
        (torchrec.optim.RowWiseAdagrad, 0, 4),
    ],
)
def test_states_of_torch_and_torchrec_optimizers_set_on_parameters_count(
    optimizer: type[torch.optim.Optimizer], of_elements: int, of_rows: int
) -> None:
    table = _table_with(optimizer)
    assert table.bytes_per_element == 4 + of_elements
    assert table.bytes_per_row == of_rows


def test_an_optimizer_with_unknown_states_is_refused_and_names_its_table() -> None:
    with pytest.raises(ValueError, match="table t_a of bags has the optimizer AdamW, whose states"):
        _ = _table_with(torch.optim.AdamW).bytes_per_row
    given = fmp_sharders({"optimizer": EmbOptimType.ENSEMBLE_ROWWISE_ADAGRAD})
    with pytest.raises(ValueError, match="table t_a of bags has the optimizer .*; use one of"):
        _ = shardable_tables(Model(), given)[0].bytes_per_row


def test_a_plan_for_more_ranks_than_the_topology_has_is_refused() -> None:
    model = Model()
    plan = planner(topology(4)).plan(model, sharders())
    with pytest.raises(ValueError, match="the topology has 1 ranks"):
        _estimate(plan, model, topology(1, local_world_size=1))


def test_a_plan_that_lacks_a_table_is_refused() -> None:
    where = topology()
    plan = planner(where).plan(Model(without=("d",)), sharders())
    with pytest.raises(ValueError, match="the plan has no table t_d of the module 'bags'"):
        _estimate(plan, Model(), where)


def _estimate(
    plan: ShardingPlan, model: Model, where: Topology, given: object = None
) -> PlanEstimate:
    return estimate(
        plan,
        model,
        where,
        sharders=given or sharders(),  # type: ignore[arg-type]
        batch_size=BATCH_SIZE,
        constraints=constraints(),
    )


def _table_with(optimizer: type[torch.optim.Optimizer]) -> ShardableTable:
    model = Model()
    for parameter in model.parameters():
        parameter._optimizer_classes = [optimizer]  # type: ignore[attr-defined]
    return shardable_tables(model, sharders())[0]
