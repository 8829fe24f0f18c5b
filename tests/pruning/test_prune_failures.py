"""Failed prunes: their errors, and that they leave everything unchanged."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Literal
from unittest import mock

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

from tests.support.dlrm_model import (
    DENSE,
    DIM,
    FEATURES,
    Case,
    FixedPlanner,
    adam,
    batch,
    dense_parameters,
    dense_state,
    logits,
    pieces,
    select,
    shard,
    train,
    trained,
)
from tests.support.process_group import ProcessGroup
from tests.support.runs import Run, assert_equal_runs
from torchrec_fmp.gates.attach import attach_gates, feature_gates
from torchrec_fmp.gates.feature_gates import GateConfig
from torchrec_fmp.pruning.prune import prune
from torchrec_fmp.reshard import staging as staging_module
from torchrec_fmp.reshard.reshard import MoveConfig
from torchrec_fmp.selection.selection import FeatureDecision, Selection
from torchrec_fmp.surgery.cut_map import TensorCut
from torchrec_fmp.surgery.families.dlrm import cut_dlrm
from torchrec_fmp.surgery.rules import Cutter, cut_rule

# Every kind of change at once: drops a table, one feature of the shared table and a dense column,
# and folds gates into rows and into the dense layer.
USUAL = {"a": 0.0, "c": 0.0, "d": 0.5, "e": 0.3, "x": 0.0, "y": 0.7}


class MiscutDLRM(DLRM):
    """Has a rule that takes the wrong columns of the interaction."""


@cut_rule(MiscutDLRM)
def cut_wrongly(model: MiscutDLRM, fqn: str, cutter: Cutter) -> None:
    cut_dlrm(model, fqn, cutter)
    (name,) = (name for name in cutter.tensors if "over_arch" in name)
    right = cutter.tensors[name]
    assert right.columns is not None
    cutter.tensors[name] = TensorCut(name, right.source_shape, right.columns.flip(0), right.scale)


Staging = Literal["none", "host"]
Failing = Callable[[DistributedModelParallel, Optimizer, MoveConfig], str]
NOTHING = "nothing was raised"


def refused(
    dmp: DistributedModelParallel,
    optimizer: Optimizer,
    selection: Selection,
    move: MoveConfig | None = None,
    some: Batch | None = None,
) -> str:
    """Type and message of the error that `prune` raises."""
    try:
        prune(dmp, optimizer, selection, planner=FixedPlanner(), batch=some, move=move)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return NOTHING


def train_around(case: Case, failing: Failing | None, staging: Staging) -> tuple[str, Run]:
    """Training with a failing prune in the middle, or without one."""
    dmp, optimizer = trained(case)
    torch.manual_seed(5)
    error = failing(dmp, optimizer, MoveConfig(staging)) if failing else ""
    assert all(module.training for module in dmp.modules())
    losses = train(dmp, optimizer, range(3, 6))
    return error, (losses, pieces(dmp), dense_state(dmp, optimizer), torch.get_rng_state())


def by_a_wrong_rule(dmp: DistributedModelParallel, optimizer: Optimizer, move: MoveConfig) -> str:
    return refused(dmp, optimizer, select(USUAL), move, batch(7))


def by_a_wrong_rule_without_gates(
    dmp: DistributedModelParallel, optimizer: Optimizer, move: MoveConfig
) -> str:
    case = Case(gated=False)
    return refused(dmp, optimizer, select({"a": 0.0, "d": 0.5}, case), move, batch(7))


def by_different_selections(
    dmp: DistributedModelParallel, optimizer: Optimizer, move: MoveConfig
) -> str:
    gates = {"a": 0.0} if dist.get_rank() == 1 else {"b": 0.0}
    return refused(dmp, optimizer, select(gates), move, batch(7))


def by_a_batch_not_finite_on_one_rank(
    dmp: DistributedModelParallel, optimizer: Optimizer, move: MoveConfig
) -> str:
    some = batch(7)
    if dist.get_rank() == dist.get_world_size() - 1:
        some.dense_features[0, 2] = torch.nan
    return refused(dmp, optimizer, select(USUAL), move, some)


def by_an_unknown_feature(
    dmp: DistributedModelParallel, optimizer: Optimizer, move: MoveConfig
) -> str:
    decisions = {**select(USUAL).features, "nobody": FeatureDecision(0, 0, False, "test")}
    return refused(dmp, optimizer, Selection(decisions), move)


def by_a_missing_decision(
    dmp: DistributedModelParallel, optimizer: Optimizer, move: MoveConfig
) -> str:
    decisions = dict(select(USUAL).features)
    del decisions["e"], decisions["y"]
    return refused(dmp, optimizer, Selection(decisions), move)


def by_a_foreign_parameter(
    dmp: DistributedModelParallel, optimizer: Optimizer, move: MoveConfig
) -> str:
    foreign = torch.optim.SGD([*dense_parameters(dmp).values(), nn.Parameter(torch.ones(3))])
    return refused(dmp, foreign, select(USUAL), move, batch(7))


def by_a_model_that_cannot_be_built(
    dmp: DistributedModelParallel, optimizer: Optimizer, move: MoveConfig
) -> str:
    error = RuntimeError("no memory for the new model")
    with mock.patch("torchrec_fmp.pruning.building.DistributedModelParallel", side_effect=error):
        return refused(dmp, optimizer, select(USUAL), move, batch(7))


def by_a_model_that_cannot_be_built_on_one_rank(
    dmp: DistributedModelParallel, optimizer: Optimizer, move: MoveConfig
) -> str:
    if dist.get_rank() == 1:
        return by_a_model_that_cannot_be_built(dmp, optimizer, move)
    return refused(dmp, optimizer, select(USUAL), move, batch(7))


def by_a_host_without_room_on_one_rank(
    dmp: DistributedModelParallel, optimizer: Optimizer, move: MoveConfig
) -> str:
    if dist.get_rank() == 1:
        error = OSError(28, "No space left on device")
        with mock.patch.object(staging_module, "_host_memory", side_effect=error):
            return refused(dmp, optimizer, select(USUAL), move, batch(7))
    return refused(dmp, optimizer, select(USUAL), move, batch(7))


FAILURES = [
    (by_a_wrong_rule, MiscutDLRM, "ParityError: pruned and old outputs differ .*a cut rule"),
    (
        by_a_batch_not_finite_on_one_rank,
        DLRM,
        "ValueError: the old model's output is not finite",
    ),
    (by_an_unknown_feature, DLRM, r"ValueError: .*the model does not have: \['nobody'\]"),
    (by_a_missing_decision, DLRM, r"ValueError: .*no decision .*\['e', 'y'\]"),
    (by_a_foreign_parameter, DLRM, r"ValueError: .*parameter of shape \(3,\) .*does not have"),
    (by_a_model_that_cannot_be_built, DLRM, "RuntimeError: no memory for the new model"),
]


@pytest.mark.parametrize("staging", ["none", "host"])
@pytest.mark.parametrize(
    ("failing", "model_type", "message"), FAILURES, ids=[f.__name__ for f, _, _ in FAILURES]
)
def test_a_failed_prune_leaves_the_old_model_and_optimizer_unchanged(
    ranks: ProcessGroup,
    failing: Failing,
    model_type: type[DLRM],
    message: str,
    staging: Staging,
) -> None:
    check_failure(ranks, failing, Case(model_type=model_type), message, staging)


@pytest.mark.parametrize("staging", ["none", "host"])
def test_a_wrong_rule_is_detected_without_gates_too(ranks: ProcessGroup, staging: Staging) -> None:
    case = Case(gated=False, model_type=MiscutDLRM)
    message = "ParityError: pruned and old outputs differ .*a cut rule"
    check_failure(ranks, by_a_wrong_rule_without_gates, case, message, staging)


@pytest.mark.parametrize("staging", ["none", "host"])
def test_selections_that_differ_between_ranks_are_refused_on_all(
    ranks_2: ProcessGroup, staging: Staging
) -> None:
    message = r"RuntimeError: the selection differs between ranks: ranks \[1\] disagree"
    check_failure(ranks_2, by_different_selections, Case(), message, staging)


@pytest.mark.parametrize("staging", ["none", "host"])
def test_a_model_that_one_rank_cannot_build_is_refused_on_all(
    ranks_2: ProcessGroup, staging: Staging
) -> None:
    message = "RuntimeError: (building .* failed on rank 1: .*)?no memory for the new model"
    failing = by_a_model_that_cannot_be_built_on_one_rank
    check_failure(ranks_2, failing, Case(), message, staging)


def test_tables_are_restored_on_all_ranks_if_one_cannot_stage_them(ranks_2: ProcessGroup) -> None:
    message = "OSError: .*No space left|RuntimeError: staging the tables .* failed on rank 1: OSErr"
    check_failure(ranks_2, by_a_host_without_room_on_one_rank, Case(), message, "host")


def check_failure(
    group: ProcessGroup, failing: Failing, case: Case, message: str, staging: Staging
) -> None:
    results = group.run(train_around, case, failing, staging)
    for error, _ in results:
        assert re.search(message, error), error
    untouched = group.run(train_around, case, None, staging)
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
    return refused(dmp, adam(dmp), selection, some=batch(0))


def test_a_module_without_a_rule_that_reads_changed_features_is_refused(
    ranks: ProcessGroup,
) -> None:
    for error in ranks.run(tower_pruned, {"a": 0.0}):
        assert "TypeError: the model is a TwoTower that reads the dropped features ['a']" in error
        assert "@torchrec_fmp.cut_rule(TwoTower)" in error
    for error in ranks.run(tower_pruned, {"a": 0.0, "b": 0.0}):
        assert (
            "TypeError: the model is a TwoTower that reads the dropped features ['a', 'b']" in error
        )
    for error in ranks.run(tower_pruned, {"a": 0.5}):
        assert "TypeError: the model is a TwoTower that reads ['a'], whose gates" in error
    # Gates that agree fold into the rows, which needs no rule.
    assert set(ranks.run(tower_pruned, {"a": 0.5, "b": 0.5})) == {NOTHING}


def ungated_pruned(gates: Mapping[str, float]) -> tuple[float | None, Tensor, Tensor]:
    """Parity of a prune of a model without gates, and its outputs before and after."""
    case = Case(gated=False)
    dmp, optimizer = trained(case)
    before = logits(dmp, 8, None, DENSE)
    pruned = prune(dmp, optimizer, select(gates, case), planner=FixedPlanner(), batch=batch(7))
    return pruned.manifest.parity_max_abs, before, logits(pruned.model, 8, None, DENSE)


@pytest.mark.parametrize(
    "gates",
    [{"a": 0.0}, {"c": 0.0, "e": 0.0}, {"a": 0.5, "c": 0.25, "d": 0.75}],
    ids=["a table", "a feature of a shared table", "fractions"],
)
def test_a_model_without_gates_is_compared_with_scaled_embeddings(
    ranks: ProcessGroup, gates: dict[str, float]
) -> None:
    for parity, before, after in ranks.run(ungated_pruned, gates):
        assert parity is not None and parity <= 1e-6
        assert (before - after).abs().max() > 1e-3, "the selection changes nothing to speak of"


def training_after_fixed_gates() -> Tensor:
    """The gates' values after a failed prune of a model whose gates were fixed."""
    dmp = shard(Case(model_type=MiscutDLRM))
    ((_, gates), _) = feature_gates(dmp)
    gates.fix(dict.fromkeys(FEATURES, 0.25))
    error = by_a_wrong_rule(dmp, adam(dmp), MoveConfig())
    assert "ParityError" in error
    return gates.values()


def test_fixed_gates_stay_fixed_when_a_prune_fails(ranks_1: ProcessGroup) -> None:
    assert ranks_1.run(training_after_fixed_gates)[0].tolist() == [0.25] * len(FEATURES)


def with_a_foreign_parameter_on_rank_1() -> str:
    dmp, optimizer = trained(Case())
    if dist.get_rank() == 1:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    return refused(dmp, optimizer, select(USUAL), some=batch(7))


def test_an_optimizer_that_does_not_fit_on_one_rank_is_refused_on_all(
    ranks_2: ProcessGroup,
) -> None:
    errors = ranks_2.run(with_a_foreign_parameter_on_rank_1)
    assert "RuntimeError: checking the optimizer failed on rank 1" in errors[0]
    assert "ValueError: the optimizer holds a parameter" in errors[1]
