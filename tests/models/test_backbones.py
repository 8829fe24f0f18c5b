"""The backbones' architectures on ranks: all prunes are exact, and training continues."""

from __future__ import annotations

from typing import Literal, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torchrec.models.deepfm import SimpleDeepFMNN
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.support.dlrm_model import (
    DENSE,
    DIM,
    Case,
    FixedPlanner,
    Tensors,
    adam,
    batch,
    build,
    dense_parameters,
    dense_state,
    kept_dense,
    logits,
    select,
    set_open,
    shard,
    train,
)
from tests.support.process_group import ProcessGroup
from torchrec_fmp.gates.attach import attach_gates
from torchrec_fmp.models.mlp import Mlp
from torchrec_fmp.pruning.prune import prune
from torchrec_fmp.selection.selection import Selection

Architecture = Literal["dlrm", "deepfm", "mlp"]
ARCHITECTURES: tuple[Architecture, ...] = ("dlrm", "deepfm", "mlp")
# Drops a whole table, one feature of the shared table, and a dense column.
CLOSED = {"b": 0.0, "c": 0.0, "y": 0.0}
PLANS = "mixed_and_replicated"


def model_of(architecture: Architecture, dense: tuple[str, ...], gated: bool) -> nn.Module:
    """The architecture over the tables of `dlrm_model`."""
    collection = build(Case(gated=False, root=True)).get_submodule(
        "sparse_arch.embedding_bag_collection"
    )
    torch.manual_seed(1)
    reader = "model.dense_arch"
    if architecture == "dlrm":
        model = DLRM(collection, len(dense), [12, DIM], [10, 1])
    elif architecture == "deepfm":
        model = SimpleDeepFMNN(len(dense), collection, 12, 10)
        model.over_arch.model[1] = nn.Identity()
    else:
        model = Mlp(collection, len(dense), [10, 6], 0.2, True, torch.device("cpu"))
        reader = "model.dense_layer"
    training = DLRMTrain(model)
    return attach_gates(training, dense={reader: dense} if dense else None) if gated else training


class Outcome(NamedTuple):
    """Result of a prune after training on one rank."""

    parity: float | None
    before: Tensor
    after: Tensor
    losses: list[float]
    dense: Tensors


def pruned(architecture: Architecture) -> Outcome:
    dmp = shard(Case(PLANS), model_of(architecture, DENSE, gated=True))
    optimizer = adam(dmp)
    train(dmp, optimizer, range(3))
    selection = select(CLOSED)
    before = logits(dmp, 8, selection, DENSE)
    new, optimizer, manifest = prune(
        dmp, optimizer, selection, planner=FixedPlanner(PLANS, first_rank=1), batch=batch(7)
    )
    kept = kept_dense(selection)
    after = logits(new, 8, None, kept)
    losses = train(new, optimizer, range(3, 7), kept)
    # The table that every rank has a copy of is a dense parameter too.
    dense = {name: value.detach().clone() for name, value in dense_parameters(new).items()}
    return Outcome(manifest.parity_max_abs, before, after, losses, dense)


def check_pruned(group: ProcessGroup, architecture: Architecture) -> None:
    first, *others = group.run(pruned, architecture)
    for outcome in (first, *others):
        assert outcome.parity is not None and outcome.parity <= 1e-6
        torch.testing.assert_close(outcome.after, outcome.before, rtol=0, atol=1e-6)
        assert outcome.after.std() > 1e-3
        assert len(set(outcome.losses)) == 4
        assert torch.tensor(outcome.losses).isfinite().all()
    assert any("t_last" in name for name in first.dense)
    for other in others:
        assert other.dense.keys() == first.dense.keys()
        for name, value in first.dense.items():
            assert torch.equal(other.dense[name], value), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_closed_gates_are_pruned_exactly_and_training_continues_alike_on_all_ranks(
    run_ranks: ProcessGroup, architecture: Architecture
) -> None:
    check_pruned(run_ranks, architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES[1:])
def test_closed_gates_are_pruned_exactly_on_four_ranks(
    ranks_4: ProcessGroup, architecture: Architecture
) -> None:
    check_pruned(ranks_4, architecture)


def continued(architecture: Architecture, prunes: bool) -> tuple[list[float], Tensors]:
    """Losses and dense state of steps, with or without a prune in between that drops nothing."""
    dmp = shard(Case(PLANS), model_of(architecture, DENSE, gated=True))
    set_open(dmp)
    optimizer = adam(dmp)
    torch.manual_seed(2)
    losses = train(dmp, optimizer, range(2))
    if prunes:
        dmp, optimizer, _ = prune(dmp, optimizer, select({}), planner=FixedPlanner(PLANS))
    losses += train(dmp, optimizer, range(2, 4))
    return losses, dense_state(dmp, optimizer)


@pytest.mark.parametrize("architecture", ARCHITECTURES[1:])
def test_a_prune_that_drops_nothing_leaves_later_steps_bit_equal(
    run_ranks: ProcessGroup, architecture: Architecture
) -> None:
    for (losses, state), (others, other_state) in zip(
        run_ranks.run(continued, architecture, True),
        run_ranks.run(continued, architecture, False),
        strict=True,
    ):
        assert losses == others
        assert state.keys() == other_state.keys()
        for name, value in state.items():
            assert torch.equal(value, other_state[name]), name


def pruned_twice(architecture: Architecture, dense: tuple[str, ...]) -> tuple[float, list[float]]:
    """Largest difference that the second prune makes, and the losses after it."""
    case = Case(PLANS, dense=dense, dense_gates=bool(dense))
    dmp = shard(case, model_of(architecture, dense, gated=True))
    optimizer = adam(dmp)
    train(dmp, optimizer, range(2), dense)
    planner = FixedPlanner(PLANS)
    dmp, optimizer, _ = prune(
        dmp, optimizer, select({"b": 0.0}, case), planner=planner, batch=batch(7, dense)
    )
    train(dmp, optimizer, range(2, 4), dense)
    decisions = select({"c": 0.0}, Case(gated=False)).features
    # Without its gates, the model no longer names its dense columns.
    second = Selection({name: it for name, it in decisions.items() if name != "b"})
    closed = without_ids(dmp, second, dense)
    dmp, optimizer, _ = prune(dmp, optimizer, second, planner=planner)
    difference = (logits(dmp, 8, None, dense) - closed).abs().max().item()
    return difference, train(dmp, optimizer, range(4, 6), dense)


def without_ids(dmp: nn.Module, selection: Selection, dense: tuple[str, ...]) -> Tensor:
    """Logits of the ungated model without the ids of the dropped features."""
    some = batch(8, dense)
    features = some.sparse_features
    lengths = features.lengths().view(len(features.keys()), -1)
    parts = features.split([1] * len(features.keys()))
    empty = [key in selection.dropped for key in features.keys()]
    pairs = zip(parts, empty, strict=True)
    some.sparse_features = KeyedJaggedTensor(
        keys=features.keys(),
        values=torch.cat([p.values()[:0] if e else p.values() for p, e in pairs]),
        lengths=(lengths * ~torch.tensor(empty).unsqueeze(1)).flatten(),
    )
    was_training = dmp.training
    dmp.eval()
    with torch.no_grad():
        _, (_, output, _) = dmp(some)
    dmp.train(was_training)
    return output.clone()


@pytest.mark.parametrize("dense", [DENSE, ()], ids=["dense", "no dense"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_second_prune_is_exact_with_and_without_dense_columns(
    ranks_2: ProcessGroup, architecture: Architecture, dense: tuple[str, ...]
) -> None:
    for difference, losses in ranks_2.run(pruned_twice, architecture, dense):
        assert difference <= 1e-6
        assert torch.tensor(losses).isfinite().all()
