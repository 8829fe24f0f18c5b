"""Tables that become data-parallel or sharded, with the state of their optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor
from torch.optim import Optimizer
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import ParameterShardingGenerator
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.optim.warmup import WarmupOptimizer, WarmupPolicy, WarmupStage

from tests.support.dlrm_model import (
    DIM,
    SHARDINGS,
    Case,
    FixedPlanner,
    assemble,
    dense_parameters,
    pieces,
    select,
    set_open,
    shard,
    train,
)
from tests.support.process_group import ProcessGroup
from torchrec_fmp.embeddings.local_shards import local_shards, sharded_collections
from torchrec_fmp.pruning.prune import prune

# Drops one table, and one feature of the shared table.
GATES = {"e": 0.0, "c": 0.0}
SURVIVORS = {"t_seven", "t_one", "t_shared"}
FUSED = [EmbOptimType.EXACT_ADAGRAD, EmbOptimType.EXACT_ROWWISE_ADAGRAD]
BOTH_WAYS = [("data_parallel", "row_wise"), ("row_wise", "data_parallel")]
Make = Callable[[DistributedModelParallel], Optimizer]


def adagrad(dmp: DistributedModelParallel) -> Optimizer:
    return torch.optim.Adagrad(dense_parameters(dmp).values(), lr=0.1)


def row_wise_adagrad(dmp: DistributedModelParallel) -> Optimizer:
    """Row-wise for the tables and for layers that are not cut, element-wise for the others."""
    by_row, by_element = {}, {}
    for name, parameter in dense_parameters(dmp).items():
        whole = parameter.dim() == 2 and "over_arch" not in name
        (by_row if whole else by_element)[name] = parameter
    kept = [
        KeyedOptimizerWrapper(by_row, lambda some: RowWiseAdagrad(some, lr=0.1)),
        KeyedOptimizerWrapper(by_element, lambda some: torch.optim.Adagrad(some, lr=0.1)),
    ]
    return CombinedOptimizer([dmp.fused_optimizer, *kept])


DENSE_OPTIMIZERS = [adagrad, row_wise_adagrad]


def table_states(dmp: DistributedModelParallel, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """Data-parallel table -> its dense optimizer state, and the groups that hold it."""
    found = {}
    for name, parameter in dmp.named_parameters():
        if "embedding_bags" not in name or hasattr(parameter, "_in_backward_optimizers"):
            continue
        state = {
            key: value.clone() if torch.is_tensor(value) else value
            for key, value in optimizer.state.get(parameter, {}).items()
        }
        places = [
            index
            for index, group in enumerate(optimizer.param_groups)
            if any(held is parameter for held in group["params"])
        ]
        found[name.split(".")[-2]] = {**state, "places": places, "weight": parameter.clone()}
    return found


def before_and_after(case: Case, make: Make, to: list[str]) -> list[Any]:
    """Pieces, the dense optimizer's states and fused steps before and after prunes to `to`."""
    found = []
    for sharding in to:
        dmp = shard(case)
        optimizer = make(dmp)
        train(dmp, optimizer, range(3))
        before = pieces(dmp), table_states(dmp, optimizer)
        pruned = prune(dmp, optimizer, select(GATES), planner=FixedPlanner(sharding))
        after = pieces(pruned.model), table_states(pruned.model, pruned.optimizer)
        found.append((before, after, steps(pruned.model)))
        train(pruned.model, pruned.optimizer, [3])
    return found


def steps(dmp: DistributedModelParallel) -> set[int]:
    kernels: list[Any] = [
        local.kernel
        for collection in sharded_collections(dmp).values()
        for local in local_shards(collection)
    ]
    return {int(k.emb_module.iter.item()) for k in kernels if hasattr(k.emb_module, "iter")}


@pytest.mark.parametrize("fused", FUSED, ids=lambda fused: fused.name)
@pytest.mark.parametrize("make", DENSE_OPTIMIZERS, ids=lambda make: make.__name__)
def test_a_data_parallel_tables_state_moves_into_the_fused_optimizer_of_any_sharding(
    ranks_2: ProcessGroup, make: Make, fused: EmbOptimType
) -> None:
    results = ranks_2.run(before_and_after, Case("data_parallel", optimizer=fused), make, SHARDINGS)
    by_row = fused is EmbOptimType.EXACT_ROWWISE_ADAGRAD
    for new, _ in enumerate(SHARDINGS):
        _, states = results[0][new][0]
        placed = [piece for rank in results for piece in rank[new][1][0]]
        assert assemble([placed]).keys() == SURVIVORS
        for table, ((row, column, rows, columns), name, value) in placed:
            expected = states[table][name][row : row + rows]
            if expected.shape[1] == DIM:
                expected = expected[:, column : column + columns]
            if name == "sum" and by_row:
                expected = expected.mean(1, keepdim=True)
            assert torch.equal(value, expected.expand_as(value)), (table, name)
            assert name == "weight" or value.any()
        assert {step for rank in results for step in rank[new][2]} == {3}
        for rank in results:
            assert rank[new][1][1] == {}


@pytest.mark.parametrize("fused", FUSED, ids=lambda fused: fused.name)
@pytest.mark.parametrize("make", DENSE_OPTIMIZERS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("old", SHARDINGS)
def test_a_sharded_tables_state_moves_into_the_dense_optimizer(
    ranks_2: ProcessGroup, old: str, make: Make, fused: EmbOptimType
) -> None:
    results = ranks_2.run(before_and_after, Case(old, optimizer=fused), make, ["data_parallel"])
    whole = assemble(rank[0][0][0] for rank in results)
    for rank in results:
        ((_, (_, states), _),) = rank
        assert states.keys() == SURVIVORS
        for table, state in states.items():
            assert torch.equal(state["weight"], whole[table]["weight"])
            # FBGEMM does not count the steps of an Adagrad that keeps one value per element.
            assert state["step"] == (0 if fused is EmbOptimType.EXACT_ADAGRAD else 3)
            assert isinstance(state["step"], Tensor)
            assert len(state["places"]) == 1
            total = whole[table]["sum"]
            mean = total.mean(1, keepdim=True)
            if make is row_wise_adagrad:
                assert state["sum"].shape == mean.shape
                torch.testing.assert_close(state["sum"], mean)
            elif (total != total[:, :1]).any() and fused is not EmbOptimType.EXACT_ADAGRAD:
                # Several column shards, each with its own value per row.
                torch.testing.assert_close(state["sum"], mean.expand_as(total))
            else:
                assert torch.equal(state["sum"], total)


def continued(old: str, to: str | None, fused: EmbOptimType, make: Make) -> list[float]:
    """Losses of eight steps with open gates; after three, tables may change their optimizer."""
    dmp = shard(Case(old, optimizer=fused))
    set_open(dmp)
    optimizer = make(dmp)
    losses = train(dmp, optimizer, range(3))
    if to is not None:
        dmp, optimizer, _ = prune(dmp, optimizer, select({}), planner=FixedPlanner(to))
    return losses + train(dmp, optimizer, range(3, 8))


@pytest.mark.parametrize(
    ("old", "to"), [("data_parallel", "row_wise"), ("row_wise", "data_parallel")]
)
def test_training_continues_as_if_the_tables_had_kept_their_optimizer(
    ranks_2: ProcessGroup, old: str, to: str
) -> None:
    fused = EmbOptimType.EXACT_ADAGRAD
    moved = ranks_2.run(continued, old, to, fused, adagrad)
    stayed = ranks_2.run(continued, old, None, fused, adagrad)
    for losses, others in zip(moved, stayed, strict=True):
        # The two optimizers round differently.
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(others), rtol=1e-4, atol=1e-5)


@dataclass(frozen=True)
class MixedPlanner(FixedPlanner):
    """The first tables data-parallel, the others row-wise."""

    data_parallel: tuple[str, ...] = ()

    def _sharding(self, table: str, world_size: int) -> ParameterShardingGenerator:
        kind = "data_parallel" if table in self.data_parallel else "row_wise"
        return FixedPlanner(kind)._sharding(table, world_size)


def grouped(dmp: DistributedModelParallel) -> Optimizer:
    """A group for the gates, one for the layers, and one for the tables, if there are any."""
    named = dense_parameters(dmp)
    tables = [p for name, p in named.items() if "embedding_bags" in name]
    gates = [p for name, p in named.items() if "log_alpha" in name]
    layers = [p for name, p in named.items() if "embedding_bags" not in name]
    layers = [p for p in layers if all(p is not gate for gate in gates)]
    groups = [{"params": gates, "lr": 0.3}, {"params": layers}, {"params": tables, "lr": 0.05}]
    return torch.optim.Adagrad([group for group in groups if group["params"]], lr=0.02)


def there_and_back() -> list[dict[str, Any]]:
    """States before and after two prunes that move tables to the fused optimizer and back."""
    dmp = shard(Case("data_parallel", optimizer=EmbOptimType.EXACT_ADAGRAD))
    set_open(dmp)
    optimizer = grouped(dmp)
    train(dmp, optimizer, range(3))
    found = [table_states(dmp, optimizer)]
    for tables in (("t_one", "t_last"), ("t_seven", "t_one", "t_shared", "t_last")):
        planner = MixedPlanner(data_parallel=tables)
        # The first prune removes the gates.
        selection = select({}, Case(dense_gates=not found[1:]))
        dmp, optimizer, _ = prune(dmp, optimizer, selection, planner=planner)
        found.append(table_states(dmp, optimizer))
    return found


def test_a_table_that_is_data_parallel_again_returns_to_its_group_with_its_state(
    ranks: ProcessGroup,
) -> None:
    for first, between, last in ranks.run(there_and_back):
        assert between.keys() == {"t_one", "t_last"}
        assert last.keys() == first.keys()
        for table, state in last.items():
            # Gates are gone, so the first group is empty; the third is the tables'.
            assert state["places"] == first[table]["places"] == [2]
            assert torch.equal(state["weight"], first[table]["weight"])
            assert torch.equal(state["sum"], first[table]["sum"])
            assert state["step"] == first[table]["step"]


def first_arrival() -> list[dict[str, Any]]:
    dmp = shard(Case("row_wise", optimizer=EmbOptimType.EXACT_ADAGRAD))
    optimizer = grouped(dmp)
    planner = FixedPlanner("data_parallel")
    dmp, optimizer, _ = prune(dmp, optimizer, select({}), planner=planner)
    return list(table_states(dmp, optimizer).values())


def test_the_first_data_parallel_table_joins_the_group_of_the_layers_not_of_the_gates(
    ranks_1: ProcessGroup,
) -> None:
    (states,) = ranks_1.run(first_arrival)
    assert [state["places"] for state in states] == [[1]] * 4


def wrapped(dmp: DistributedModelParallel) -> Optimizer:
    keyed = KeyedOptimizerWrapper(
        dense_parameters(dmp), lambda parameters: torch.optim.Adagrad(parameters, lr=0.1)
    )
    stages = [WarmupStage(WarmupPolicy.LINEAR, max_iters=4, value=0.5)]
    return CombinedOptimizer(
        [("fused", dmp.fused_optimizer), ("dense", WarmupOptimizer(keyed, stages, lr=0.1))]
    )


def keys(old: str, to: str) -> list[str]:
    dmp = shard(Case(old, optimizer=EmbOptimType.EXACT_ADAGRAD))
    optimizer = wrapped(dmp)
    train(dmp, optimizer, range(3))
    dmp, optimizer, _ = prune(dmp, optimizer, select({}), planner=FixedPlanner(to))
    train(dmp, optimizer, range(3, 5))
    return [key for key in optimizer.state_dict()["state"] if "embedding_bags" in key]


@pytest.mark.parametrize(
    ("old", "to"), [("data_parallel", "row_wise"), ("row_wise", "data_parallel")]
)
def test_torchrecs_wrappers_name_the_tables_of_either_optimizer(
    ranks_1: ProcessGroup, old: str, to: str
) -> None:
    (names,) = ranks_1.run(keys, old, to)
    prefix = "fused." if to == "row_wise" else "dense."
    fqn = "model.sparse_arch.embedding_bag_collection.embedding_bags"
    tables = ("t_seven", "t_one", "t_shared", "t_last")
    assert sorted(names) == sorted(f"{prefix}{fqn}.{table}.weight" for table in tables)


def sgd(dmp: DistributedModelParallel) -> Optimizer:
    return torch.optim.SGD(dense_parameters(dmp).values(), lr=0.1)


def momentum(dmp: DistributedModelParallel) -> Optimizer:
    return torch.optim.SGD(dense_parameters(dmp).values(), lr=0.1, momentum=0.9)


def adam(dmp: DistributedModelParallel) -> Optimizer:
    return torch.optim.Adam(dense_parameters(dmp).values(), lr=0.1)


def without_tables(dmp: DistributedModelParallel) -> Optimizer:
    named = dense_parameters(dmp)
    return torch.optim.Adagrad([p for n, p in named.items() if "embedding_bags" not in n], lr=0.1)


def fused_only(dmp: DistributedModelParallel) -> Optimizer:
    return dmp.fused_optimizer


class Odd(torch.optim.Adagrad):
    """Its constructor needs an argument that its param groups do not have."""

    def __init__(self, parameters: Any, purpose: str) -> None:
        super().__init__(parameters, lr=0.1)
        assert purpose


def odd(dmp: DistributedModelParallel) -> Optimizer:
    return Odd(dense_parameters(dmp).values(), "test")


def refused(case: Case, make: Make, to: str) -> tuple[str, bool]:
    """The error, and whether the old model still trains."""
    dmp = shard(case)
    optimizer = make(dmp)
    train(dmp, optimizer, range(2))
    with pytest.raises(ValueError) as error:
        prune(dmp, optimizer, select({}), planner=FixedPlanner(to))
    before = [p.clone() for p in dense_parameters(dmp).values()]
    train(dmp, optimizer, [2])
    after = dense_parameters(dmp).values()
    return str(error.value), any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("make", "old", "to", "message"),
    [
        (momentum, "data_parallel", "row_wise", "SGD keeps the states ['momentum_buffer']"),
        (momentum, "row_wise", "data_parallel", "SGD keeps the states ['momentum_buffer']"),
        (adam, "data_parallel", "row_wise", "Adam keeps the states ['exp_avg', 'exp_avg_sq']"),
        (adam, "row_wise", "data_parallel", "the fused optimizer ['sum']"),
        (sgd, "row_wise", "data_parallel", "SGD keeps the states []"),
        (without_tables, "data_parallel", "row_wise", "does not hold its parameter"),
        (fused_only, "row_wise", "data_parallel", "Pass the dense optimizer too"),
        (odd, "row_wise", "data_parallel", "to find its states failed"),
    ],
)
def test_a_state_without_a_counterpart_is_refused_and_the_old_model_still_trains(
    ranks_2: ProcessGroup, make: Make, old: str, to: str, message: str
) -> None:
    for error, trains in ranks_2.run(refused, Case(old), make, to):
        assert "embedding_bags.t_seven.weight" in error
        assert message in error
        assert trains or make is fused_only


@pytest.mark.parametrize(
    ("old", "to"), [("data_parallel", "row_wise"), ("row_wise", "data_parallel")]
)
def test_sgd_has_nothing_to_carry(ranks_2: ProcessGroup, old: str, to: str) -> None:
    moved = ranks_2.run(continued, old, to, EmbOptimType.EXACT_SGD, sgd)
    stayed = ranks_2.run(continued, old, None, EmbOptimType.EXACT_SGD, sgd)
    for losses, others in zip(moved, stayed, strict=True):
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(others), rtol=1e-4, atol=1e-5)
