"""Prunes with TorchRec's own planner: staying, moving, and their costs."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch.distributed as dist
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology

from tests.support.dlrm_model import (
    FEATURES,
    TABLES,
    Case,
    FixedPlanner,
    adam,
    batch,
    pieces,
    select,
    shard,
    train,
    trained,
)
from tests.support.process_group import ProcessGroup
from torchrec_fmp import MoveConfig, Selection, costs, dry_run, prune
from torchrec_fmp.planning.replan import Replan
from torchrec_fmp.pruning.manifest import Manifest

CASE = Case("row_wise", rows=64)
# Drops one table, and one feature of the shared table.
GATES = {"e": 0.0, "c": 0.0}


def topology() -> Topology:
    ranks = dist.get_world_size()
    return Topology(world_size=ranks, local_world_size=ranks, compute_device="cpu")


def planner() -> EmbeddingShardingPlanner:
    """Allows table-wise only, so that its plan differs from the current, row-wise one."""
    constraints = {
        table: ParameterConstraints(
            sharding_types=["table_wise"], pooling_factors=[1.0 + i for i in range(len(features))]
        )
        for table, (_, features) in TABLES.items()
    }
    return EmbeddingShardingPlanner(
        topology=topology(), batch_size=8, constraints=constraints, debug=False
    )


def replanned(replan: Replan, steps_left: int | None) -> tuple[Manifest, Manifest, bool]:
    """Manifests of the dry run and of the prune, and whether the planner is unchanged."""
    dmp, optimizer = trained(CASE)
    ours = planner()
    constraints = copy.deepcopy(ours._constraints)
    before = pieces(dmp)
    arguments: Any = {"planner": ours, "replan": replan, "steps_left": steps_left}
    preview = dry_run(dmp, select(GATES), **arguments)
    for (table, (_, name, value)), (_, (_, _, untouched)) in zip(before, pieces(dmp), strict=True):
        assert value.equal(untouched), (table, name)
    pruned = prune(dmp, optimizer, select(GATES), batch=batch(7), **arguments)
    train(pruned.model, pruned.optimizer, range(3, 5))
    return preview, pruned.manifest, ours._constraints == constraints


def types(manifest: Manifest) -> set[str]:
    return {
        sharding.sharding_type
        for module_plan in manifest.plans[1].plan.values()
        for sharding in module_plan.values()
    }


@pytest.mark.parametrize(
    ("replan", "steps_left", "expected"),
    [
        ("sticky", None, "row_wise"),
        ("planner", None, "table_wise"),
        # With a single step left, no move pays off.
        ("auto", 1, "row_wise"),
    ],
)
def test_the_plan_follows_the_replan_option(
    ranks_2: ProcessGroup, replan: Replan, steps_left: int | None, expected: str
) -> None:
    for preview, manifest, planner_is_as_it_was in ranks_2.run(replanned, replan, steps_left):
        assert planner_is_as_it_was
        assert types(manifest) == {expected}
        assert (manifest.moved_bytes == 0) == (expected == "row_wise")
        assert manifest.parity_max_abs is not None and manifest.parity_max_abs <= 1e-6
        assert manifest.estimates is not None
        assert manifest.estimates[0].step_ms > manifest.estimates[1].step_ms > 0
        assert (manifest.comparison is None) == (replan != "auto")
        if manifest.comparison is not None:
            assert manifest.comparison.steps_left == steps_left
            assert manifest.comparison.decision == "sticky"
        done = dataclasses.replace(manifest, parity_max_abs=None)
        assert preview.describe() == done.describe()


def priced() -> list[dict[str, float]]:
    """Costs of the sharded model by its own plan, gated and after the prune."""
    dmp, optimizer = trained(CASE)
    found = [
        costs(dmp, topology(), unit=unit, batch_size=8) for unit in ("bytes", "hbm", "step_ms")
    ]
    pruned = prune(dmp, optimizer, select(GATES), planner=FixedPlanner("row_wise")).model
    found.append(costs(pruned, topology(), unit="bytes", batch_size=8))
    return found


def test_a_sharded_models_features_are_priced_by_its_plan(ranks_2: ProcessGroup) -> None:
    for of_bytes, of_memory, of_time, of_the_pruned in ranks_2.run(priced):
        assert of_bytes.keys() == of_memory.keys() == of_time.keys() == set(FEATURES)
        table_bytes = 64 * 16 * 4
        assert of_bytes == {f: table_bytes / (2 if f in "cd" else 1) for f in FEATURES}
        assert all(of_memory[feature] > of_bytes[feature] for feature in FEATURES)
        assert all(milliseconds > 0 for milliseconds in of_time.values())
        # The only remaining feature of the shared table has its whole cost.
        assert of_the_pruned == dict.fromkeys("abd", table_bytes)


def test_an_ungated_model_is_pruned_exactly_with_torchrecs_planner(ranks_2: ProcessGroup) -> None:
    for differences in ranks_2.run(ungated):
        assert all(difference <= 1e-6 for difference in differences)


def ungated() -> list[float]:
    case = dataclasses.replace(CASE, gated=False)
    found = []
    for replan in ("auto", "planner", "sticky"):
        dmp = shard(case)
        optimizer = adam(dmp)
        train(dmp, optimizer, range(2))
        # Unnamed features stay; the shared table stays for its other feature.
        pruned = prune(
            dmp,
            optimizer,
            Selection.dropping(["e", "c"]),
            planner=planner(),
            replan=replan,  # type: ignore[arg-type]
            batch=batch(7),
        )
        assert set(pruned.manifest.plans[1].plan["model.sparse_arch.embedding_bag_collection"]) == {
            *("t_seven", "t_one", "t_shared")
        }
        assert pruned.manifest.parity_max_abs is not None
        found.append(pruned.manifest.parity_max_abs)
    return found


def staging_of(share_of_memory: float) -> tuple[str, float | None]:
    """Staging of the old tables, on ranks with this share of the memory of old and new tables."""
    dmp, optimizer = trained(CASE)
    arguments: Any = {"replan": "sticky", "batch": batch(7), "move": MoveConfig(chunk_bytes=2**10)}
    roomy = dry_run(dmp, select(GATES), planner=planner(), replan="sticky")
    assert roomy.estimates is not None
    before, after = (int(estimate.ddr_bytes.max()) for estimate in roomy.estimates)
    ranks = dist.get_world_size()
    small = Topology(
        world_size=ranks,
        local_world_size=ranks,
        compute_device="cpu",
        ddr_cap=int(share_of_memory * (before + after)),
    )
    tight = EmbeddingShardingPlanner(
        topology=small, batch_size=8, constraints=planner()._constraints, debug=False
    )
    manifest = prune(dmp, optimizer, select(GATES), planner=tight, **arguments).manifest
    return manifest.staging, manifest.parity_max_abs


@pytest.mark.parametrize(("share", "expected"), [(0.9, "host"), (1.5, "none")])
def test_old_tables_are_staged_if_the_planners_estimates_leave_no_room_for_both(
    ranks_2: ProcessGroup, share: float, expected: str
) -> None:
    for staging, parity_max_abs in ranks_2.run(staging_of, share):
        assert staging == expected
        assert parity_max_abs is not None and parity_max_abs <= 1e-6
