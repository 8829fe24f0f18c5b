"""Sharded tables on the dense kernel: the dense optimizer keeps their states, shard by shard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import StepLR
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import ParameterShardingGenerator, column_wise
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from tests.support.dlrm_model import (
    SHARDINGS,
    Case,
    FixedPlanner,
    Piece,
    assemble,
    dense_parameters,
    pieces,
    select,
    set_open,
    shard,
    train,
)
from tests.support.process_group import ProcessGroup
from torchrec_fmp.embeddings.local_shards import LocalShard, local_shards, sharded_collections
from torchrec_fmp.pruning.prune import prune
from torchrec_fmp.reshard.reshard import MoveConfig
from torchrec_fmp.selection.selection import Selection

# Drops one table, and one feature of the shared table.
GATES = {"e": 0.0, "c": 0.0}
SURVIVORS = {"t_seven", "t_one", "t_shared"}
FUSED = EmbOptimType.EXACT_ADAGRAD
DENSE_ROWS = Case("row_wise", kernel="dense", optimizer=FUSED)
Make = Callable[[DistributedModelParallel], Optimizer]


@dataclass(frozen=True)
class StackedPlanner(FixedPlanner):
    """Every rank holds two column shards of each table."""

    def _sharding(self, table: str, world_size: int) -> ParameterShardingGenerator:
        ranks = [rank for rank in range(world_size) for _ in range(2)]
        return column_wise(ranks=ranks, compute_kernel=self.kernel)


def dense(sharding: str, first_rank: int = 0) -> FixedPlanner:
    return FixedPlanner(sharding, first_rank, kernel="dense")


STACKED = StackedPlanner("stacked", kernel="dense")
REPLICATED = FixedPlanner("data_parallel")


def adagrad(dmp: DistributedModelParallel) -> Optimizer:
    return torch.optim.Adagrad(dense_parameters(dmp).values(), lr=0.1)


def adam(dmp: DistributedModelParallel) -> Optimizer:
    return torch.optim.Adam(dense_parameters(dmp).values(), lr=0.05, amsgrad=True)


def momentum(dmp: DistributedModelParallel) -> Optimizer:
    return torch.optim.SGD(dense_parameters(dmp).values(), lr=0.05, momentum=0.9)


def nadam(dmp: DistributedModelParallel) -> Optimizer:
    """Keeps a running product in addition to the step."""
    return torch.optim.NAdam(dense_parameters(dmp).values(), lr=0.05)


def holdings(dmp: DistributedModelParallel, optimizer: Optimizer) -> list[tuple[str, Piece]]:
    """Weights and states of this rank's shards, whichever optimizer holds them."""
    found = pieces(dmp)
    parameters = {
        name.split(".")[-2]: parameter
        for name, parameter in dense_parameters(dmp).items()
        if "embedding_bags" in name
    }
    rows: Counter[str] = Counter()
    for local in shards_of_rank(dmp):
        if local.is_fused:
            continue
        # A rank's column shards are stacked in one parameter.
        start = rows[local.table]
        rows[local.table] += local.box.rows
        box = (local.box.row, local.box.column, local.box.rows, local.box.columns)
        for name, value in optimizer.state.get(parameters[local.table], {}).items():
            if isinstance(value, Tensor) and value.dim():
                assert value.shape[0] == parameters[local.table].shape[0]
                part = value[start : start + local.box.rows].clone()
                found.append((local.table, (box, name, part.expand(box[2:]))))
            else:
                number = torch.full(box[2:], float(value))
                found.append((local.table, (box, name, number)))
    return found


def moved(
    case: Case, make: Make, planners: Sequence[FixedPlanner], move: MoveConfig | None = None
) -> list[Any]:
    """This rank's holdings before and after each of several prunes in a row."""
    dmp = shard(case)
    optimizer = make(dmp)
    train(dmp, optimizer, range(3))
    found = [holdings(dmp, optimizer)]
    for i, planner in enumerate(planners):
        # The first prune removes the gates.
        selection = select(GATES) if i == 0 else Selection({})
        dmp, optimizer, _ = prune(dmp, optimizer, selection, planner=planner, move=move)
        found.append(holdings(dmp, optimizer))
    train(dmp, optimizer, range(3, 5))
    return found


def check_equal_states(results: list[list[Any]], names: set[str]) -> None:
    """Weights and states are bit-equal in all stages."""
    first, *others = [assemble(stage) for stage in zip(*results, strict=True)]
    for state in others:
        assert state.keys() == SURVIVORS
        for table, tensors in state.items():
            assert tensors.keys() == names
            for name, value in tensors.items():
                assert torch.equal(value, first[table][name]), (table, name)
                assert value.any()


KEPT: list[tuple[Make, set[str]]] = [
    (adagrad, {"sum", "step"}),
    (adam, {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"}),
    (momentum, {"momentum_buffer"}),
    (nadam, {"exp_avg", "exp_avg_sq", "mu_product", "step"}),
]


@pytest.mark.parametrize(("make", "names"), KEPT, ids=lambda value: getattr(value, "__name__", ""))
def test_states_move_with_their_shards_between_all_shardings(
    ranks: ProcessGroup, make: Make, names: set[str]
) -> None:
    # Each sharding comes once before and once after each of the others.
    ways = [
        dense("row_wise"),
        dense("column_wise"),
        dense("row_wise"),
        dense("table_wise"),
        REPLICATED,
        dense("column_wise"),
        STACKED,
        dense("table_wise", first_rank=1),
        dense("table_wise"),
        STACKED,
        REPLICATED,
        dense("row_wise"),
        REPLICATED,
        dense("table_wise"),
    ]
    results = ranks.run(moved, Case("table_wise", kernel="dense"), make, ways)
    check_equal_states(results, {"weight", *names})


def test_states_move_with_their_shards_on_four_ranks(ranks_4: ProcessGroup) -> None:
    ways = [dense("column_wise"), dense("table_wise", first_rank=3), REPLICATED, dense("row_wise")]
    results = ranks_4.run(moved, Case("row_wise", kernel="dense"), adam, ways)
    check_equal_states(results, {"weight", *dict(KEPT)[adam]})


def row_wise_adagrad(dmp: DistributedModelParallel) -> Optimizer:
    """Row-wise Adagrad of the tables and of the layers that are not cut."""
    named = dense_parameters(dmp)
    whole = [p for name, p in named.items() if p.dim() == 2 and "over_arch" not in name]
    return RowWiseAdagrad(whole, lr=0.1)


@pytest.mark.parametrize("staging", ["none", "host"])
def test_dense_kernel_states_survive_a_move_to_the_fused_kernel_and_back(
    ranks_2: ProcessGroup, staging: Literal["none", "host"]
) -> None:
    fused = [FixedPlanner(sharding) for sharding in SHARDINGS]
    there_and_back = [
        fused[0],
        dense("column_wise"),
        fused[1],
        STACKED,
        fused[2],
        dense("row_wise"),
        REPLICATED,
        fused[0],
        dense("table_wise", first_rank=1),
    ]
    results = ranks_2.run(moved, DENSE_ROWS, adagrad, there_and_back, MoveConfig(staging=staging))
    without_step = [
        [[item for item in stage if item[1][1] != "step"] for stage in rank] for rank in results
    ]
    check_equal_states(without_step, {"weight", "sum"})


@pytest.mark.parametrize("old", [dense("table_wise"), STACKED], ids=lambda old: old.sharding)
def test_one_value_per_element_becomes_one_per_row_of_each_fused_shard(
    ranks_2: ProcessGroup, old: FixedPlanner
) -> None:
    results = ranks_2.run(
        moved, Case("row_wise", kernel="dense"), adagrad, [old, FixedPlanner("column_wise")]
    )
    before = assemble(rank[1] for rank in results)
    placed = [piece for rank in results for piece in rank[2]]
    assert len(placed) == 2 * 2 * len(SURVIVORS)
    for table, ((row, column, rows, columns), name, value) in placed:
        expected = before[table][name][row : row + rows, column : column + columns]
        if name == "sum":
            expected = expected.mean(1, keepdim=True).expand(-1, columns)
        assert torch.equal(value, expected)


def test_one_value_per_row_survives_moves_between_dense_and_fused_kernels(
    ranks_2: ProcessGroup,
) -> None:
    planners = [dense("column_wise"), FixedPlanner("row_wise"), STACKED, FixedPlanner("table_wise")]
    results = ranks_2.run(moved, Case("row_wise", kernel="dense"), row_wise_adagrad, planners)
    names = {"weight", "sum"}
    kept = [[[i for i in stage if i[1][1] in names] for stage in rank] for rank in results]
    check_equal_states(kept, names)


def continued(case: Case, make: Make, planner: FixedPlanner | None) -> list[float]:
    """Losses of eight steps with open gates; after three of them, tables may move."""
    dmp = shard(case)
    set_open(dmp)
    optimizer = make(dmp)
    losses = train(dmp, optimizer, range(3))
    if planner is not None:
        dmp, optimizer, _ = prune(dmp, optimizer, select({}), planner=planner)
    return losses + train(dmp, optimizer, range(3, 8))


@pytest.mark.parametrize(
    ("case", "make", "planner"),
    [
        (DENSE_ROWS, adam, dense("table_wise", first_rank=1)),
        (DENSE_ROWS, momentum, STACKED),
        (DENSE_ROWS, adam, REPLICATED),
        (DENSE_ROWS, adagrad, FixedPlanner("column_wise")),
        (Case("column_wise", optimizer=FUSED), adagrad, dense("row_wise")),
        (Case("data_parallel"), nadam, dense("column_wise")),
    ],
)
def test_training_continues_as_if_the_tables_had_not_moved(
    ranks_2: ProcessGroup, case: Case, make: Make, planner: FixedPlanner
) -> None:
    went = ranks_2.run(continued, case, make, planner)
    stayed = ranks_2.run(continued, case, make, None)
    for losses, others in zip(went, stayed, strict=True):
        # Shardings and kernels sum in different orders.
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(others), rtol=1e-4, atol=1e-5)


def before_the_first_step(planner: FixedPlanner) -> list[float]:
    dmp = shard(Case("row_wise", kernel="dense", gated=False))
    optimizer = adam(dmp)
    dmp, optimizer, _ = prune(dmp, optimizer, Selection({}), planner=planner)
    return train(dmp, optimizer, range(3))


def test_an_optimizer_without_steps_starts_after_the_prune(ranks_2: ProcessGroup) -> None:
    ways = [dense("row_wise"), dense("column_wise"), REPLICATED]
    for stayed, *others in zip(
        *(ranks_2.run(before_the_first_step, way) for way in ways), strict=True
    ):
        for losses in others:
            torch.testing.assert_close(losses, stayed, rtol=1e-4, atol=1e-5)


def adafactor(dmp: DistributedModelParallel) -> Optimizer:
    tables = [p for name, p in dense_parameters(dmp).items() if "embedding_bags" in name]
    return torch.optim.Adafactor(tables, lr=0.05)


def refused(make: Make, planner: FixedPlanner) -> tuple[str, bool]:
    """The error, and whether the old model still trains."""
    dmp = shard(Case("table_wise", kernel="dense", gated=False))
    optimizer = make(dmp)
    train(dmp, optimizer, range(2))
    with pytest.raises((ValueError, RuntimeError)) as error:
        prune(dmp, optimizer, Selection({}), planner=planner)
    before = [p.clone() for p in dense_parameters(dmp).values()]
    train(dmp, optimizer, [2])
    after = dense_parameters(dmp).values()
    return str(error.value), any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("make", "planner", "message"),
    [
        (momentum, FixedPlanner("row_wise"), "SGD keeps the states ['momentum_buffer']"),
        (adam, FixedPlanner("table_wise"), "the fused optimizer ['sum']"),
        (momentum, FixedPlanner("table_wise"), 'replan="sticky"'),
        (adafactor, dense("column_wise"), "have no value for each row"),
    ],
)
def test_a_state_that_cannot_move_is_refused_on_all_ranks_and_the_old_model_still_trains(
    ranks_2: ProcessGroup, make: Make, planner: FixedPlanner, message: str
) -> None:
    for error, trains in ranks_2.run(refused, make, planner):
        assert message in error
        assert trains


def adafactor_stays() -> tuple[list[float], list[float]]:
    losses = []
    for prunes in (True, False):
        dmp = shard(Case("table_wise", kernel="dense", gated=False))
        optimizer = adafactor(dmp)
        some = train(dmp, optimizer, range(2))
        if prunes:
            dmp, optimizer, _ = prune(dmp, optimizer, Selection({}), planner=dense("table_wise"))
        losses.append(some + train(dmp, optimizer, range(2, 5)))
    return losses[0], losses[1]


def test_a_table_that_does_not_move_keeps_states_of_any_shape(ranks_2: ProcessGroup) -> None:
    for pruned, unpruned in ranks_2.run(adafactor_stays):
        assert pruned == unpruned


@dataclass(frozen=True)
class OneApart(FixedPlanner):
    """One table has a separate sharding and so a separate kernel; the others are row-wise."""

    def _sharding(self, table: str, world_size: int) -> ParameterShardingGenerator:
        sharding = self.sharding if table == "t_one" else "row_wise"
        return FixedPlanner(sharding)._sharding(table, world_size)


def scheduled() -> list[tuple[float, float, float]]:
    """Per kernel: the learning rate of its param group, the initial rate, and the rate in use."""
    dmp = shard(Case("row_wise", gated=False, optimizer=FUSED))
    optimizer: Optimizer = CombinedOptimizer([dmp.fused_optimizer, layers(dmp)])
    scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
    for to in ("data_parallel", "table_wise"):
        train(dmp, optimizer, [0])
        scheduler.step()
        dmp, optimizer, _ = prune(dmp, optimizer, Selection({}), planner=OneApart(to))
    train(dmp, optimizer, [0])
    scheduler.step()
    train(dmp, optimizer, [0])
    return [
        (group["lr"], group["initial_lr"], kernel.emb_module.get_learning_rate())
        for kernel in {local.kernel for local in shards_of_rank(dmp)}
        for group in kernel.fused_optimizer.param_groups
    ]


def layers(dmp: DistributedModelParallel) -> Optimizer:
    return KeyedOptimizerWrapper(
        dense_parameters(dmp), lambda some: torch.optim.Adagrad(some, lr=0.1)
    )


def shards_of_rank(dmp: DistributedModelParallel) -> list[LocalShard]:
    collections = sharded_collections(dmp).values()
    return [local for collection in collections for local in local_shards(collection)]


def test_a_fused_kernel_of_former_dense_tables_follows_the_schedule_of_the_others(
    ranks: ProcessGroup,
) -> None:
    results = ranks.run(scheduled)
    # A rank may hold nothing of the table.
    assert max(len(rates) for rates in results) == 2
    for rates in results:
        for rate in rates:
            assert rate == pytest.approx((0.1 / 8, 0.1, 0.1 / 8))
