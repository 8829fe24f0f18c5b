"""Pruning a sharded, gated DLRM: what it computes, what it keeps, and what a failure leaves."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from tests.distributed.dlrm_model import (
    DENSE,
    DIM,
    FEATURES,
    SHARDINGS,
    TABLES,
    Case,
    FixedPlanner,
    Piece,
    Tensors,
    adam,
    assemble,
    batch,
    build,
    dense_parameters,
    dense_state,
    kept_dense,
    logits,
    pieces,
    select,
    set_open,
    shard,
    train,
    trained,
)
from tests.distributed.process_group import ProcessGroup
from torchrec_fmp.gates.attach import attach_gates, feature_gates
from torchrec_fmp.gates.feature_gates import GateConfig
from torchrec_fmp.gates.sharded import sharders
from torchrec_fmp.planning import PlannerConfig, describe_plan, make_planner
from torchrec_fmp.policies.selection import FeatureDecision, Selection
from torchrec_fmp.pruning import Manifest, prune
from torchrec_fmp.surgery.blueprint import blueprint
from torchrec_fmp.surgery.cut import cut
from torchrec_fmp.surgery.cut_map import TensorCut
from torchrec_fmp.surgery.dlrm import cut_dlrm
from torchrec_fmp.surgery.rules import Cutter, cut_rule

TOLERANCE = 1e-6

# Every kind of change at once: a table goes, one feature of the shared table goes, gates fold into
# rows and into the dense layer, a dense column goes.
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
def test_the_pruned_model_computes_what_the_gated_one_does(
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


def a_step_after_pruning(gates: Mapping[str, float]) -> tuple[list[float], Tensors, Manifest]:
    dmp, optimizer = trained(Case())
    selection = select(gates)
    pruned = prune(dmp, optimizer, selection, planner=FixedPlanner(), batch=batch(7))
    losses = train(pruned.model, pruned.optimizer, range(3, 6), kept_dense(selection))
    return losses, dense_state(pruned.model, pruned.optimizer), pruned.manifest


def test_a_dense_layer_without_inputs_goes_on_training(ranks: ProcessGroup) -> None:
    for losses, state, manifest in ranks.run(a_step_after_pruning, dict.fromkeys(DENSE, 0.0)):
        assert len(losses) == 3
        assert all(tensor.isfinite().all() for tensor in state.values())
        assert state["model.dense_arch.model._mlp.0._linear.weight"].shape == (12, 0)
        assert state["model.dense_arch.model._mlp.0._linear.weight/exp_avg"].shape == (12, 0)
        assert manifest.dense_columns == {"model.dense_arch": ()}


def test_the_manifest_counts_what_is_left(ranks: ProcessGroup) -> None:
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


# What a run left behind: losses, tables, dense parameters and optimizer state, random numbers.
Run = tuple[list[float], list[tuple[str, Piece]], Tensors, Tensor]


def open_training(case: Case, prunes: bool) -> Run:
    """Six steps with open gates; in the middle there is a prune of nothing, or none."""
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


def assert_equal_runs(runs: list[Run], others: list[Run]) -> None:
    assert_equal_tables(assemble(run[1] for run in runs), assemble(run[1] for run in others))
    for (losses, _, state, rng), (other_losses, _, other_state, other_rng) in zip(
        runs, others, strict=True
    ):
        assert losses == other_losses
        assert state.keys() == other_state.keys()
        for name, tensor in state.items():
            assert torch.equal(tensor, other_state[name]), name
        assert torch.equal(rng, other_rng)


def assert_equal_tables(tables: Mapping[str, Tensors], others: Mapping[str, Tensors]) -> None:
    assert tables.keys() == others.keys()
    for table, tensors in tables.items():
        assert tensors.keys() == others[table].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, others[table][name]), f"{table}/{name}"


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


def test_torchrecs_planner_plans_again_and_as_before_where_nothing_goes(
    ranks: ProcessGroup,
) -> None:
    for before, after in ranks.run(replanned, {}):
        assert before == after
    first, *others = ranks.run(replanned, USUAL)
    assert first[1].keys() == TABLES.keys() - {"t_seven"}
    assert all(other == first for other in others)


def names_after_pruning() -> tuple[list[str], ...]:
    """Leftovers of the package, then names of the pruned and of a plain model."""
    dmp, optimizer = trained(Case())
    pruned = prune(dmp, optimizer, select(USUAL), planner=FixedPlanner(), batch=batch(7)).model
    plain = shard(Case(gated=False, features=("b", "d", "e"), dense=("y", "z")))
    # The first batch makes a buffer, which the pruned model has from the comparison.
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


def test_after_the_prune_the_model_is_a_plain_torchrec_model(ranks: ProcessGroup) -> None:
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


class MiscutDLRM(DLRM):
    """Has a rule that takes the wrong columns of the interaction."""


@cut_rule(MiscutDLRM)
def cut_wrongly(model: MiscutDLRM, fqn: str, cutter: Cutter) -> None:
    cut_dlrm(model, fqn, cutter)
    (name,) = (name for name in cutter.tensors if "over_arch" in name)
    right = cutter.tensors[name]
    assert right.columns is not None
    cutter.tensors[name] = TensorCut(name, right.source_shape, right.columns.flip(0), right.scale)


Failing = Callable[[DistributedModelParallel, Optimizer], str]
NOTHING = "nothing was raised"


def refused(*args: Any, **kwargs: Any) -> str:
    """Name and message of what `prune` raises."""
    try:
        prune(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return NOTHING


def train_around(case: Case, failing: Failing | None) -> tuple[str, Run]:
    """Training with an attempt to prune in the middle, or without one."""
    dmp, optimizer = trained(case)
    torch.manual_seed(5)
    error = failing(dmp, optimizer) if failing else ""
    assert all(module.training for module in dmp.modules())
    losses = train(dmp, optimizer, range(3, 6))
    return error, (losses, pieces(dmp), dense_state(dmp, optimizer), torch.get_rng_state())


def by_a_wrong_rule(dmp: DistributedModelParallel, optimizer: Optimizer) -> str:
    return refused(dmp, optimizer, select(USUAL), planner=FixedPlanner(), batch=batch(7))


def by_leaving_data_parallel(dmp: DistributedModelParallel, optimizer: Optimizer) -> str:
    planner = FixedPlanner("table_wise")
    return refused(dmp, optimizer, select(USUAL), planner=planner, batch=batch(7))


def by_different_selections(dmp: DistributedModelParallel, optimizer: Optimizer) -> str:
    gates = {"a": 0.0} if dist.get_rank() == 1 else {"b": 0.0}
    return refused(dmp, optimizer, select(gates), planner=FixedPlanner(), batch=batch(7))


def by_a_batch_not_finite_on_one_rank(dmp: DistributedModelParallel, optimizer: Optimizer) -> str:
    some = batch(7)
    if dist.get_rank() == dist.get_world_size() - 1:
        some.dense_features[0, 2] = torch.nan
    return refused(dmp, optimizer, select(USUAL), planner=FixedPlanner(), batch=some)


def by_an_unknown_feature(dmp: DistributedModelParallel, optimizer: Optimizer) -> str:
    decisions = {**select(USUAL).features, "nobody": FeatureDecision(0, 0, False, "test")}
    return refused(dmp, optimizer, Selection(decisions), planner=FixedPlanner())


def by_a_missing_decision(dmp: DistributedModelParallel, optimizer: Optimizer) -> str:
    decisions = dict(select(USUAL).features)
    del decisions["e"], decisions["y"]
    return refused(dmp, optimizer, Selection(decisions), planner=FixedPlanner())


def by_dropping_every_feature(dmp: DistributedModelParallel, optimizer: Optimizer) -> str:
    gates = dict.fromkeys(FEATURES, 0.0)
    return refused(dmp, optimizer, select(gates), planner=FixedPlanner(), batch=batch(7))


def by_a_foreign_parameter(dmp: DistributedModelParallel, optimizer: Optimizer) -> str:
    foreign = torch.optim.SGD([*dense_parameters(dmp).values(), nn.Parameter(torch.ones(3))])
    return refused(dmp, foreign, select(USUAL), planner=FixedPlanner(), batch=batch(7))


FAILURES = [
    (by_a_wrong_rule, MiscutDLRM, "ParityError: pruned and gated outputs differ .*a cut rule"),
    (
        by_a_batch_not_finite_on_one_rank,
        DLRM,
        "ValueError: the gated model's output is not finite",
    ),
    (by_an_unknown_feature, DLRM, r"ValueError: .*the model does not have: \['nobody'\]"),
    (by_a_missing_decision, DLRM, r"ValueError: .*no decision .*\['e', 'y'\]"),
    (by_dropping_every_feature, DLRM, "ValueError: every feature of .*collection is dropped"),
    (by_a_foreign_parameter, DLRM, r"ValueError: .*parameter of shape \(3,\) .*does not have"),
]


@pytest.mark.parametrize(
    ("failing", "model_type", "message"), FAILURES, ids=[f.__name__ for f, _, _ in FAILURES]
)
def test_a_prune_that_fails_leaves_the_old_model_and_optimizer_as_they_were(
    ranks: ProcessGroup, failing: Failing, model_type: type[DLRM], message: str
) -> None:
    check_failure(ranks, failing, Case(model_type=model_type), message)


def test_ranks_with_different_selections_all_refuse(ranks_2: ProcessGroup) -> None:
    message = r"RuntimeError: the selection differs between ranks: ranks \[1\] disagree"
    check_failure(ranks_2, by_different_selections, Case(), message)


def test_a_data_parallel_table_that_would_get_a_fused_optimizer_is_refused(
    ranks: ProcessGroup,
) -> None:
    message = "ValueError: .*a table cannot move between data-parallel and other sharding types"
    check_failure(ranks, by_leaving_data_parallel, Case("data_parallel"), message)


def check_failure(group: ProcessGroup, failing: Failing, case: Case, message: str) -> None:
    results = group.run(train_around, case, failing)
    for error, _ in results:
        assert re.search(message, error), error
    untouched = group.run(train_around, case, None)
    assert_equal_runs([run for _, run in results], [run for _, run in untouched])


class TwoTower(nn.Module):
    """Reads pooled embeddings itself, and has no cut rule."""

    def __init__(self) -> None:
        super().__init__()
        config = EmbeddingBagConfig(
            name="t_seven", embedding_dim=DIM, num_embeddings=7, feature_names=["a", "b"]
        )
        self.embeddings = EmbeddingBagCollection(tables=[config])
        self.over = nn.Linear(2 * DIM, 1)

    def forward(self, some: Batch) -> Tensor:
        return self.over(self.embeddings(some.sparse_features).values())


def tower_pruned(gates: Mapping[str, float]) -> str:
    dmp = shard(Case(), attach_gates(TwoTower(), GateConfig()))
    selection = select(gates, Case(features=("a", "b"), dense_gates=False))
    return refused(dmp, adam(dmp), selection, planner=FixedPlanner(), batch=batch(0))


def test_a_module_without_a_rule_must_not_read_what_changes(ranks: ProcessGroup) -> None:
    for error in ranks.run(tower_pruned, {"a": 0.0}):
        assert "TypeError: the model is a TwoTower that reads the features ['a']" in error
        assert "@torchrec_fmp.cut_rule(TwoTower)" in error
    for error in ranks.run(tower_pruned, {"a": 0.5}):
        assert "TypeError: the model is a TwoTower that reads ['a'], whose gates" in error
    # Gates that agree fold into the rows, which needs no rule.
    assert set(ranks.run(tower_pruned, {"a": 0.5, "b": 0.5})) == {NOTHING}


def ungated_pruned() -> list[str]:
    case = Case(gated=False)
    dmp, optimizer = trained(case)
    selection = select({"a": 0.0}, case)
    return [
        refused(dmp, optimizer, selection, planner=FixedPlanner(), batch=batch(0)),
        refused(dmp, optimizer, selection, planner=FixedPlanner()),
    ]


def test_a_model_without_gates_is_pruned_without_comparison_only(ranks: ProcessGroup) -> None:
    for with_batch, without in ranks.run(ungated_pruned):
        assert re.search(r"ValueError: the features \['a'\] .*have no gate", with_batch)
        assert without == NOTHING


def cut_digest(gates: Mapping[str, float]) -> str:
    return cut(blueprint(shard(Case())), select(gates)).cut_map.digest()


def test_every_rank_makes_the_same_cut(ranks_2: ProcessGroup) -> None:
    digests = ranks_2.run(cut_digest, USUAL)
    assert len(set(digests)) == 1
    assert set(ranks_2.run(cut_digest, {**USUAL, "e": 0.31})).isdisjoint(digests)


def training_after_fixed_gates() -> Tensor:
    """The gates' values after a prune that is abandoned, in a model whose gates were fixed."""
    dmp = shard(Case(model_type=MiscutDLRM))
    ((_, gates), _) = feature_gates(dmp)
    gates.fix(dict.fromkeys(FEATURES, 0.25))
    error = by_a_wrong_rule(dmp, adam(dmp))
    assert "ParityError" in error
    return gates.values()


def test_gates_that_were_fixed_stay_fixed_when_a_prune_fails(ranks_1: ProcessGroup) -> None:
    assert ranks_1.run(training_after_fixed_gates)[0].tolist() == [0.25] * len(FEATURES)
