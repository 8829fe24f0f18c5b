"""TorchRec's own test models: gates, prune and continued training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torchrec.distributed.test_utils.test_model import (
    TestOverArchLarge,
    TestOverArchRegroupModule,
    TestSparseNN,
)

import torchrec_fmp as fmp
from tests.support.process_group import ProcessGroup, RankError
from tests.support.torchrec_models import (
    OVERS,
    Case,
    Planner,
    batch,
    over_output,
    predictions,
    select,
    shard,
    train,
)

Gates = Mapping[str, float]
# Includes gates between 0 and 1: of an unshared table, and of a table shared with another feature.
SOME = {"b": 0.0, "c": 0.0, "d": 0.5}
SPARSE_NN: dict[str, Gates] = {
    "some features and tables": {**SOME, "e": 0.0, "f": 0.25},
    "every weighted table": {**SOME, "e": 0.0, "f": 0.0, "g": 0.0},
}
SEQUENCES: dict[str, Gates] = {
    "some features and tables": {**SOME, "r": 0.0, "u": 0.5},
    "every sequence": {**SOME, "r": 0.0, "s": 0.0, "u": 0.0},
    "every bag": {"a": 0.0, "b": 0.0, "c": 0.0, "d": 0.0, "s": 0.5},
}


class Outcome(NamedTuple):
    """Result of a prune on one rank.

    Args:
        parity: parity in the manifest.
        before: output of the old model, whose gates have the selection's values, on a batch that
            the prune has not seen.
        after: output of the pruned model on the same batch.
        losses: losses of the next steps.
        parameters: fqns in the pruned model.
    """

    parity: float | None
    before: Tensor
    after: Tensor
    losses: list[float]
    parameters: list[str]


def pruned(case: Case, gates: Gates) -> Outcome:
    """Trains with sampled gates, prunes, and continues training."""
    dmp, optimizer = shard(case)
    train(dmp, optimizer, range(3), case)
    selection = select(case, gates)
    new, new_optimizer, manifest = fmp.prune(
        dmp,
        optimizer,
        selection,
        planner=Planner(case.after),
        replan="planner",
        batch=batch(7, case),
        forward=over_output,
    )
    for _, module in fmp.feature_gates(dmp):
        module.fix(selection.gates)
    before, after = predictions(dmp, 8, case), predictions(new, 8, case)
    losses = train(new, new_optimizer, range(3, 8), case)
    names = [name for name, _ in new.named_parameters()]
    return Outcome(manifest.parity_max_abs, before, after, losses, names)


def check(group: ProcessGroup, case: Case, gates: Gates, tables: set[str]) -> None:
    for outcome in group.run(pruned, case, gates):
        assert outcome.parity is not None and outcome.parity <= 1e-6
        torch.testing.assert_close(outcome.after, outcome.before, rtol=1e-6, atol=1e-6)
        assert outcome.after.std() > 0.01
        found = {name.split(".")[-2] for name in outcome.parameters if "embedding" in name}
        assert found == tables
        assert not any("gates" in name for name in outcome.parameters)
        assert len(outcome.losses) == 5 and all(loss == loss for loss in outcome.losses)


@pytest.mark.parametrize("gates", SPARSE_NN.values(), ids=SPARSE_NN.keys())
@pytest.mark.parametrize("over", OVERS)
def test_torchrecs_sparse_nn_is_pruned_exactly_and_continues_training(
    ranks: ProcessGroup, over: type[nn.Module], gates: Gates
) -> None:
    check(ranks, Case(over), gates, {"t0", "t2", "w1"} if gates["f"] else {"t0", "t2"})


def test_a_sparse_nn_without_weighted_tables_is_pruned_exactly(ranks: ProcessGroup) -> None:
    check(ranks, Case(weighted=False), SOME, {"t0", "t2"})


# TestMixedEmbeddingSparseArch reads the pooled embeddings in the plan's order, which is the tables'
# order if all are row-wise.
@pytest.mark.parametrize(
    ("gates", "tables"),
    zip(SEQUENCES.values(), [{"t0", "t2", "s1"}, {"t0", "t2"}, {"s0", "s1"}], strict=True),
    ids=SEQUENCES.keys(),
)
def test_torchrecs_model_of_bags_and_sequences_is_pruned_exactly_and_continues_training(
    ranks: ProcessGroup, gates: Gates, tables: set[str]
) -> None:
    check(ranks, Case(over=None, before="row_wise", after="row_wise"), gates, tables)


@pytest.mark.parametrize(
    "case",
    [
        Case(over=None, before="row_wise", after="table_wise"),
        Case(
            TestOverArchLarge,
            before="row_wise",
            after="table_wise",
            over_options=(("skip_regroup", True),),
        ),
    ],
    ids=["bags and sequences", "sparse nn"],
)
def test_a_plan_that_reorders_values_read_by_position_is_refused(
    ranks_2: ProcessGroup, case: Case
) -> None:
    """TorchRec orders a collection's `values()` by its shards; only reading by key is safe."""
    with pytest.raises(RankError, match="ParityError: pruned and old outputs differ"):
        ranks_2.run(pruned, case, {"b": 0.0})


class NoRule(TestSparseNN):
    """A model without a cut rule, so a prune that drops nothing leaves its modules unchanged."""


def replanned(case: Case) -> Outcome:
    return pruned(replace(case, model_type=NoRule), {})


def test_a_modules_cached_key_order_of_the_old_plan_is_discarded(
    ranks_2: ProcessGroup,
) -> None:
    case = Case(TestOverArchRegroupModule, before="row_wise", after="table_wise")
    for outcome in ranks_2.run(replanned, case):
        assert outcome.parity is not None and outcome.parity <= 1e-6
        torch.testing.assert_close(outcome.after, outcome.before, rtol=1e-6, atol=1e-6)


def dropping_every_bag() -> None:
    case = Case()
    pruned(case, {"a": 0.0, "b": 0.0, "c": 0.0, "d": 0.0})


def test_an_error_in_a_rule_aborts_the_prune(ranks_2: ProcessGroup) -> None:
    with pytest.raises(RankError, match="needs an unweighted feature"):
        ranks_2.run(dropping_every_bag)
