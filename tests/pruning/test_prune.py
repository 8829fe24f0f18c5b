"""Pruning a sharded, gated DLRM: what it computes and what it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from tests.support.dlrm_model import (
    DENSE,
    DIM,
    FEATURES,
    SHARDINGS,
    TABLES,
    Case,
    FixedPlanner,
    Tensors,
    adam,
    batch,
    build,
    dense_state,
    forward,
    kept_dense,
    logits,
    pieces,
    select,
    set_open,
    shard,
    train,
    trained,
)
from tests.support.process_group import ProcessGroup
from tests.support.runs import Run, assert_equal_runs
from torchrec_fmp.embeddings.local_shards import sharded_collections
from torchrec_fmp.embeddings.seams import kernels
from torchrec_fmp.gates.attach import feature_gates
from torchrec_fmp.gates.sharded import sharders
from torchrec_fmp.planning.planner import PlannerConfig, describe_plan, make_planner
from torchrec_fmp.pruning.manifest import Manifest
from torchrec_fmp.pruning.prune import prune
from torchrec_fmp.selection.selection import Selection
from torchrec_fmp.surgery.blueprint import blueprint
from torchrec_fmp.surgery.cut import cut

TOLERANCE = 1e-6

# Every kind of change at once: drops a table, one feature of the shared table and a dense column,
# and folds gates into rows and into the dense layer.
USUAL = {"a": 0.0, "c": 0.0, "d": 0.5, "e": 0.3, "x": 0.0, "y": 0.7}
SELECTIONS: dict[str, dict[str, float]] = {
    "a table": {"a": 0.0},
    "one feature of a shared table": {"c": 0.0},
    "fractional gates that disagree within a shared table": {"c": 0.25, "d": 0.75},
    "fractional gates that agree within a shared table": {"c": 0.4, "d": 0.4, "a": 0.9},
    "all but one table": {"a": 0.0, "c": 0.0, "d": 0.0, "e": 0.0},
    "all but one feature of a shared table": {"a": 0.0, "b": 0.0, "d": 0.0, "e": 0.0, "c": 0.6},
    "dense columns": {"x": 0.0, "z": 0.1},
    "every dense column": dict.fromkeys(DENSE, 0.0),
    "the usual mixture": USUAL,
}


def compared(case: Case, gates: Mapping[str, float], to: list[str]) -> list[tuple[Any, ...]]:
    """(open, gated, pruned) logits and the parity for each new sharding."""
    dmp, _ = trained(case)
    selection = select(gates, case)
    dense = kept_dense(selection)
    everything = select({}, case)
    results = []
    for sharding in to:
        given = None if case.root else batch(7)
        pruned = prune(
            dmp, adam(dmp), selection, planner=FixedPlanner(sharding, first_rank=1), batch=given
        )
        results.append(
            (
                logits(dmp, 8, everything, DENSE),
                logits(dmp, 8, selection, DENSE),
                logits(pruned.model, 8, None, dense),
                pruned.manifest.parity_max_abs,
            )
        )
    return results


def check_parity(results: list[list[tuple[Any, ...]]], has_batch: bool = True) -> None:
    for of_rank in results:
        for opened, gated, pruned, parity in of_rank:
            assert (opened - gated).abs().max() > 1e-3, "the selection changes nothing to speak of"
            assert gated.shape == pruned.shape
            assert (gated - pruned).abs().max() <= TOLERANCE
            assert (parity is not None and parity <= TOLERANCE) == has_batch


@pytest.mark.parametrize("gates", SELECTIONS.values(), ids=SELECTIONS.keys())
def test_the_pruned_model_computes_the_same_as_the_gated_one(
    ranks: ProcessGroup, gates: dict[str, float]
) -> None:
    check_parity(ranks.run(compared, Case(), gates, ["mixed"]))


@pytest.mark.parametrize("old", SHARDINGS)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_pruned_model_computes_the_same_under_any_new_sharding(
    request: pytest.FixtureRequest, world_size: int, old: str
) -> None:
    group: ProcessGroup = request.getfixturevalue(f"ranks_{world_size}")
    check_parity(group.run(compared, Case(old), USUAL, list(SHARDINGS)))


def test_dlrm_as_the_root_module_computes_the_same(ranks: ProcessGroup) -> None:
    check_parity(ranks.run(compared, Case(root=True), USUAL, ["mixed"]), has_batch=False)


def test_without_gates_on_dense_columns_the_pruned_model_computes_the_same(
    ranks: ProcessGroup,
) -> None:
    gates = {name: gate for name, gate in USUAL.items() if name in FEATURES}
    check_parity(ranks.run(compared, Case(dense_gates=False), gates, ["mixed"]))


def computed_from_kept_keys() -> tuple[Tensor, Tensor]:
    """Logits of the gated model, and of the pruned model for a batch without the dropped keys."""
    dmp, optimizer = trained(Case())
    selection = select(USUAL)
    expected = logits(dmp, 8, selection, DENSE)
    pruned = prune(dmp, optimizer, selection, planner=FixedPlanner(), batch=batch(7)).model
    some = batch(8, kept_dense(selection))
    kept = [FEATURES.index(name) for name in ("e", "b", "d")]
    some.sparse_features = some.sparse_features.permute(kept)
    return expected, forward(pruned.eval(), some)[1].detach()


def test_the_pruned_model_accepts_batches_without_the_dropped_keys(ranks: ProcessGroup) -> None:
    for expected, actual in ranks.run(computed_from_kept_keys):
        assert (expected - actual).abs().max() <= TOLERANCE


def a_step_after_pruning(gates: Mapping[str, float]) -> tuple[list[float], Tensors, Manifest]:
    dmp, optimizer = trained(Case())
    selection = select(gates)
    pruned = prune(dmp, optimizer, selection, planner=FixedPlanner(), batch=batch(7))
    losses = train(pruned.model, pruned.optimizer, range(3, 6), kept_dense(selection))
    return losses, dense_state(pruned.model, pruned.optimizer), pruned.manifest


def test_a_dense_layer_without_inputs_continues_training(ranks: ProcessGroup) -> None:
    for losses, state, manifest in ranks.run(a_step_after_pruning, dict.fromkeys(DENSE, 0.0)):
        assert len(losses) == 3
        assert all(tensor.isfinite().all() for tensor in state.values())
        assert state["model.dense_arch.model._mlp.0._linear.weight"].shape == (12, 0)
        assert state["model.dense_arch.model._mlp.0._linear.weight/exp_avg"].shape == (12, 0)
        assert manifest.dense_columns == {"model.dense_arch": ()}


def test_the_manifest_counts_bytes_and_parameters_before_and_after(ranks: ProcessGroup) -> None:
    rows = {table: rows for table, (rows, _) in TABLES.items()}
    before, after = sum(rows.values()) * DIM, (sum(rows.values()) - rows["t_seven"]) * DIM

    def dense(columns: int, features: int) -> int:
        bottom = columns * 12 + 12 + 12 * DIM + DIM
        interaction = DIM + (features + 1) * features // 2
        return bottom + interaction * 10 + 10 + 10 + 1

    for _, _, manifest in ranks.run(a_step_after_pruning, USUAL):
        assert manifest.table_bytes == (4 * before, 4 * after)
        assert manifest.parameters == (before + dense(3, 5), after + dense(2, 3))
        assert manifest.dense_columns == {"model.dense_arch": ("y", "z")}
        assert manifest.selection == select(USUAL)
        old, new = (describe_plan(plan) for plan in manifest.plans)
        assert old.keys() - new.keys() == {"t_seven"}


def open_training(case: Case, prunes: bool) -> Run:
    """Six steps with open gates; in the middle, if `prunes`, a prune that drops nothing."""
    dmp = shard(case)
    set_open(dmp)
    optimizer = adam(dmp)
    torch.manual_seed(5)
    losses = train(dmp, optimizer, range(3))
    if prunes:
        dmp, optimizer, manifest = prune(
            dmp, optimizer, select({}, case), planner=FixedPlanner(case.sharding), batch=batch(7)
        )
        before, after = (describe_plan(plan) for plan in manifest.plans)
        assert before == after
        assert not any(feature_gates(dmp))
    losses += train(dmp, optimizer, range(3, 6))
    return losses, pieces(dmp), dense_state(dmp, optimizer), torch.get_rng_state()


@pytest.mark.parametrize("sharding", ["mixed", *SHARDINGS])
def test_a_prune_that_drops_nothing_changes_nothing(ranks: ProcessGroup, sharding: str) -> None:
    case = Case(sharding)
    assert_equal_runs(ranks.run(open_training, case, True), ranks.run(open_training, case, False))


def replanned(gates: Mapping[str, float]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The plans before and after, by TorchRec's planner."""
    planner = make_planner(PlannerConfig(), TABLES, 8, "cpu")
    model = build(Case())
    assert dist.group.WORLD is not None
    plan = planner.collective_plan(model, sharders(), dist.group.WORLD)
    dmp = DistributedModelParallel(model, plan=plan, sharders=sharders())
    planner = make_planner(PlannerConfig(), TABLES, 8, "cpu")
    manifest = prune(dmp, adam(dmp), select(gates), planner=planner, batch=batch(0)).manifest
    before, after = (describe_plan(plan) for plan in manifest.plans)
    return before, after


def test_torchrecs_planner_replans_and_repeats_the_plan_if_nothing_is_dropped(
    ranks: ProcessGroup,
) -> None:
    for before, after in ranks.run(replanned, {}):
        assert before == after
    first, *others = ranks.run(replanned, USUAL)
    assert first[1].keys() == TABLES.keys() - {"t_seven"}
    assert all(other == first for other in others)


def names_after_pruning() -> tuple[list[str], ...]:
    """Leftovers of the package, then names in the pruned model and in a plain one."""
    dmp, optimizer = trained(Case())
    pruned = prune(dmp, optimizer, select(USUAL), planner=FixedPlanner(), batch=batch(7)).model
    plain = shard(Case(gated=False, features=("b", "d", "e"), dense=("y", "z")))
    # The first batch creates a buffer; the pruned model has it from the comparison.
    logits(plain, 0, None, ("y", "z"))
    leftovers = [fqn for fqn, module in pruned.named_modules() if "fmp" in type(module).__module__]
    leftovers += [name for name, _ in pruned.named_parameters() if "gate" in name]
    return leftovers, *(
        [
            names
            for model in (pruned, plain)
            for names in (
                [f"{name} {type(module)}" for name, module in model.named_modules()],
                [f"{name} {tuple(p.shape)}" for name, p in model.named_parameters()],
                [f"{name} {tuple(b.shape)}" for name, b in model.named_buffers()],
                list(model.state_dict()),
            )
        ]
    )


def test_the_pruned_model_is_a_plain_torchrec_model(ranks: ProcessGroup) -> None:
    for leftovers, *names in ranks.run(names_after_pruning):
        assert leftovers == []
        assert names[:4] == names[4:]


def pruned_twice() -> tuple[Tensor, Tensor, list[str]]:
    dmp, optimizer = trained(Case())
    both = select({"a": 0.0, "c": 0.0, "e": 0.5, "b": 0.8})
    expected = logits(dmp, 8, both, DENSE)
    first = prune(dmp, optimizer, select({"a": 0.0, "e": 0.5}), planner=FixedPlanner("row_wise"))
    rest = {name: decision for name, decision in both.features.items() if name in "bc"}
    second = prune(
        first.model, first.optimizer, Selection(rest), planner=FixedPlanner("table_wise", 1)
    )
    actual = logits(second.model, 8, None, DENSE)
    train(second.model, second.optimizer, range(3, 5))
    return expected, actual, list(dict(second.model.named_parameters()))


def test_a_pruned_model_can_be_pruned_again(ranks: ProcessGroup) -> None:
    for expected, actual, names in ranks.run(pruned_twice):
        assert (expected - actual).abs().max() <= TOLERANCE
        assert not any("t_seven" in name for name in names)
        assert any("t_shared" in name for name in names)


def fused_steps(dmp: DistributedModelParallel) -> set[int]:
    """Step counters of the fused optimizers of this rank's tables."""
    return {
        int(kernel.emb_module.iter.item())
        for collection in sharded_collections(dmp).values()
        for kernel in kernels(collection)
    }


def counted_steps() -> tuple[set[int], set[int]]:
    """Fused steps of the old and the pruned model after their comparison on a batch."""
    dmp, optimizer = trained(Case())
    pruned = prune(dmp, optimizer, select(USUAL), planner=FixedPlanner(), batch=batch(7)).model
    return fused_steps(dmp), fused_steps(pruned)


def test_the_comparison_does_not_step_the_fused_optimizers(ranks: ProcessGroup) -> None:
    for old, new in ranks.run(counted_steps):
        assert old == new == {3}


def cut_digest(gates: Mapping[str, float]) -> str:
    return cut(blueprint(shard(Case())), select(gates)).cut_map.digest()


def test_every_rank_makes_the_same_cut(ranks_2: ProcessGroup) -> None:
    digests = ranks_2.run(cut_digest, USUAL)
    assert len(set(digests)) == 1
    assert set(ranks_2.run(cut_digest, {**USUAL, "e": 0.31})).isdisjoint(digests)
