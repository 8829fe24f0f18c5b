"""Unusual prunes: nothing or nearly all is dropped, several in a row, ranks that hold nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.datasets.utils import Batch
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from tests.support.dlrm_model import (
    DENSE,
    DIM,
    FEATURES,
    SHARDINGS,
    Case,
    FixedPlanner,
    Piece,
    adam,
    assemble,
    batch,
    dense_state,
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
from torchrec_fmp.embeddings.fqns import join_fqn
from torchrec_fmp.gates.attach import feature_gates
from torchrec_fmp.pruning.prune import prune
from torchrec_fmp.reshard.reshard import MoveConfig
from torchrec_fmp.reshard.tables import tables
from torchrec_fmp.selection.selection import FeatureDecision, Selection
from torchrec_fmp.surgery.cut_tables import cut_tables
from torchrec_fmp.surgery.linear import cut_linear
from torchrec_fmp.surgery.rules import Cutter, cut_rule

TOLERANCE = 1e-6
UNGATED = Case("row_wise", gated=False)

Pieces = list[tuple[str, Piece]]


@pytest.fixture(params=[2, 4], ids=["2 ranks", "4 ranks"])
def some_ranks(request: pytest.FixtureRequest) -> ProcessGroup:
    return request.getfixturevalue(f"ranks_{request.param}")


class Stage(NamedTuple):
    """One of several prunes: its gates, and the new sharding of the remaining tables."""

    gates: Mapping[str, float]
    to: str


class Outcome(NamedTuple):
    """Result of several prunes on one rank.

    Args:
        before: pieces that the rank held before the prunes.
        after: pieces that it holds after them.
        expected: logits of the old model with closed gates, if it has gates.
        actual: logits of the new model.
        losses: losses of the steps afterwards.
        parities: parity of each prune.
    """

    before: Pieces
    after: Pieces
    expected: Tensor | None
    actual: Tensor
    losses: list[float]
    parities: list[float | None]


def pruned(case: Case, stages: Sequence[Stage]) -> Outcome:
    dmp, optimizer = trained(case)
    before = pieces(dmp)
    everything = {name: gate for stage in stages for name, gate in stage.gates.items()}
    selection = select(everything, case)
    expected = logits(dmp, 8, selection, DENSE) if case.gated else None
    gone: set[str] = set()
    dense = DENSE
    parities = []
    for i, stage in enumerate(stages):
        # The first prune decides on all gates, the others on the remaining features.
        decisions = select(stage.gates, case).features if i == 0 else decided(stage.gates)
        chosen = Selection(decisions)
        dmp, optimizer, manifest = prune(
            dmp,
            optimizer,
            chosen,
            planner=FixedPlanner(stage.to, first_rank=1 + i, kernel=case.kernel),
            batch=batch(7, dense),
        )
        parities.append(manifest.parity_max_abs)
        gone.update(chosen.dropped)
        dense = tuple(name for name in DENSE if name not in gone)
    actual = logits(dmp, 8, None, dense)
    after = pieces(dmp)
    losses = train(dmp, optimizer, range(3, 6), dense)
    return Outcome(before, after, expected, actual, losses, parities)


def decided(gates: Mapping[str, float]) -> dict[str, FeatureDecision]:
    return {name: FeatureDecision(0.0, gate, gate > 0, "test") for name, gate in gates.items()}


def check(outcomes: list[Outcome], survivors: set[str]) -> None:
    """Surviving tables and states are bit-equal, and the model computes the same as before."""
    before = assemble(outcome.before for outcome in outcomes)
    after = assemble(outcome.after for outcome in outcomes)
    assert after.keys() == survivors
    for table, tensors in after.items():
        assert tensors.keys() == before[table].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, before[table][name]), f"{table}/{name}"
    for outcome in outcomes:
        if outcome.expected is not None:
            assert (outcome.expected - outcome.actual).abs().max() <= TOLERANCE
        assert all(parity is not None and parity <= TOLERANCE for parity in outcome.parities)
        assert len(outcome.losses) == 3
        assert torch.tensor(outcome.losses).isfinite().all()


# The one-row table is row-wise only in front of another table: on CPU, FBGEMM's lookup fails in any
# model where its last shard is empty.
@pytest.mark.parametrize(
    ("stay", "to"),
    [("b", "table_wise"), ("b", "column_wise"), ("a", "row_wise"), ("be", "row_wise")],
    ids=["one row by table", "one row by column", "seven rows by row", "one and thirteen by row"],
)
def test_few_tables_may_remain_and_some_ranks_may_hold_nothing(
    some_ranks: ProcessGroup, stay: str, to: str
) -> None:
    gates = {name: 0.0 for name in FEATURES if name not in stay}
    outcomes = some_ranks.run(pruned, Case("mixed"), [Stage(gates, to)])
    tables_left = {{"a": "t_seven", "b": "t_one", "e": "t_last"}[name] for name in stay}
    check(outcomes, tables_left)
    rows = {
        table: [[held[0][2] for t, held in o.after if t == table] for o in outcomes]
        for table in tables_left
    }
    if to == "table_wise":
        assert [bool(held) for held in rows["t_one"]].count(True) == 1
    if to == "row_wise":
        (uneven,) = tables_left - {"t_one"}
        assert len({height for held in rows[uneven] for height in held}) == 2
    if stay == "be":
        assert [bool(max(held)) for held in rows["t_one"]].count(True) == 1


THREE = [
    Stage({"c": 0.0, "x": 0.0}, "column_wise"),
    Stage({"e": 0.0}, "table_wise"),
    Stage({"a": 0.0}, "row_wise"),
]


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("old", ["row_wise", "table_wise"])
def test_tables_that_survive_several_prunes_are_bit_equal(
    some_ranks: ProcessGroup, old: str, count: int
) -> None:
    survivors = {"t_one", "t_shared", "t_seven"} - ({"t_seven"} if count == 3 else set())
    check(some_ranks.run(pruned, Case(old), THREE[:count]), survivors)


def training(case: Case, prunes: int) -> Run:
    """Six steps with open gates, and in the middle `prunes` prunes that drop nothing."""
    dmp = shard(case)
    set_open(dmp)
    optimizer = adam(dmp)
    torch.manual_seed(5)
    losses = train(dmp, optimizer, range(3))
    for _ in range(prunes):
        planner = FixedPlanner(case.sharding, kernel=case.kernel)
        chosen = select({}, case if any(feature_gates(dmp)) else UNGATED)
        dmp, optimizer, _ = prune(dmp, optimizer, chosen, planner=planner, batch=batch(7))
    losses += train(dmp, optimizer, range(3, 6))
    return losses, pieces(dmp), dense_state(dmp, optimizer), torch.get_rng_state()


@pytest.mark.parametrize("sharding", ["mixed", *SHARDINGS])
def test_prunes_that_drop_nothing_leave_later_steps_bit_equal(
    ranks_2: ProcessGroup, sharding: str
) -> None:
    without = ranks_2.run(training, Case(sharding), 0)
    for prunes in (1, 2):
        assert_equal_runs(ranks_2.run(training, Case(sharding), prunes), without)


def test_a_model_may_lose_every_sparse_feature(some_ranks: ProcessGroup) -> None:
    gates = dict.fromkeys(FEATURES, 0.0)
    for case in (Case("mixed", gated=False), Case("mixed")):
        check(some_ranks.run(pruned, case, [Stage(gates, "row_wise")]), set())


@pytest.mark.parametrize("to", ["table_wise", "column_wise"])
def test_fp16_tables_stay_bit_equal(some_ranks: ProcessGroup, to: str) -> None:
    case = Case("row_wise", gated=False, data_type=DataType.FP16)
    outcomes = some_ranks.run(pruned, case, [Stage({"a": 0.0, "c": 0.0}, to)])
    check(outcomes, {"t_one", "t_shared", "t_last"})
    weights = [value for o in outcomes for _, (_, name, value) in o.after if name == "weight"]
    assert {value.dtype for value in weights} == {torch.float16}


def test_dense_kernel_tables_stay_bit_equal(some_ranks: ProcessGroup) -> None:
    case = Case("table_wise", gated=False, kernel=EmbeddingComputeKernel.DENSE.value)
    check(
        some_ranks.run(pruned, case, [Stage({"a": 0.0}, "table_wise")]),
        {"t_one", "t_shared", "t_last"},
    )


# Both collections read `e`.
Parts = dict[str, tuple[int, list[str]]]
USERS: Parts = {"t_seven": (7, ["a"]), "t_shared": (20, ["c"]), "t_last": (13, ["e"])}
ITEMS: Parts = {"t_seven": (1, ["b"]), "t_shared": (24, ["d"]), "t_last": (13, ["e"])}
PARTS = {"users": USERS, "items": ITEMS}


def features_of(part: Parts) -> list[str]:
    return [feature for _, features in part.values() for feature in features]


class TwoCollections(nn.Module):
    """Collections of users and of items with tables of the same names, and a layer that reads both.

    A collection without features is None.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.users: EmbeddingBagCollection | None = collection_of(USERS)
        self.items: EmbeddingBagCollection | None = collection_of(ITEMS)
        # The order of a collection's output depends on the placement of its tables.
        self.features = {name: features_of(part) for name, part in PARTS.items()}
        count = sum(len(features) for features in self.features.values())
        self.over = nn.Linear(count * DIM, 1)

    def forward(self, some: Batch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Loss, and loss, logits (B,) and labels, as DLRMTrain returns them."""
        pooled = []
        for name, features in self.features.items():
            if features:
                values = getattr(self, name)(some.sparse_features)
                pooled += [values[feature] for feature in features]
        logits = self.over(torch.cat(pooled, 1)).squeeze(-1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, some.labels.float())
        return loss, (loss.detach(), logits.detach(), some.labels)


def collection_of(part: Parts) -> EmbeddingBagCollection:
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=name, embedding_dim=DIM, num_embeddings=rows, feature_names=features
            )
            for name, (rows, features) in part.items()
        ]
    )


@cut_rule(TwoCollections)
def cut_two(model: TwoCollections, fqn: str, cutter: Cutter) -> None:
    columns, scale = [], []
    start = 0
    for name, features in model.features.items():
        collection = getattr(model, name)
        smaller, gates = cut_tables(collection, join_fqn(fqn, name), cutter)
        setattr(model, name, smaller)
        for i, feature in enumerate(features, start):
            if feature in gates:
                columns += range(i * DIM, (i + 1) * DIM)
                scale += [gates[feature]] * DIM
        start += len(features)
        model.features[name] = [feature for feature in features if feature in gates]
    cut_linear(
        model.over, join_fqn(fqn, "over"), cutter, torch.tensor(columns), torch.tensor(scale)
    )


def named_pieces(dmp: DistributedModelParallel) -> Pieces:
    """Like `pieces`, with the tables' fqns."""
    assert dist.group.WORLD is not None
    found: Pieces = []
    for fqn, held in tables(dmp, dist.group.WORLD, MoveConfig().timeout).local.items():
        for some in held:
            for name, tensor in some.tensors.items():
                value = tensor.clone()
                wide = value if value.dim() > 1 else value[:, None].repeat(1, some.box.columns)
                found.append((fqn, (tuple(some.box), name, wide)))
    return found


def two_pruned(old: str, gates: Mapping[str, float], to: str) -> Outcome:
    dmp = shard(Case(old), TwoCollections())
    optimizer = adam(dmp)
    train(dmp, optimizer, range(3))
    before = named_pieces(dmp)
    pruned = prune(
        dmp, optimizer, Selection(decided(gates)), planner=FixedPlanner(to, 1), batch=batch(7)
    )
    after = named_pieces(pruned.model)
    losses = train(pruned.model, pruned.optimizer, range(3, 6))
    parity = pruned.manifest.parity_max_abs
    return Outcome(before, after, None, logits(pruned.model, 8, None, DENSE), losses, [parity])


@pytest.mark.parametrize("to", ["mixed", "table_wise"])
@pytest.mark.parametrize(
    ("gates", "survivors"),
    [
        ({"a": 0.0}, {"users": {"t_shared", "t_last"}, "items": set(ITEMS)}),
        ({"b": 0.0, "c": 0.0, "e": 0.0}, {"users": {"t_seven"}, "items": {"t_shared"}}),
        ({"b": 0.0, "d": 0.0, "e": 0.0}, {"users": {"t_seven", "t_shared"}}),
    ],
    ids=["a table of one", "tables of both", "all of one"],
)
def test_collections_with_tables_of_the_same_names_are_not_confused(
    some_ranks: ProcessGroup, gates: dict[str, float], survivors: dict[str, set[str]], to: str
) -> None:
    names = {f"{part}.embedding_bags.{t}.weight" for part, some in survivors.items() for t in some}
    check(some_ranks.run(two_pruned, "row_wise", gates, to), names)
