"""The dense optimizer through a prune: states, step counters, groups, schedulers, wrappers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, StepLR
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import (
    CombinedOptimizer,
    KeyedOptimizer,
    KeyedOptimizerWrapper,
    OptimizerWrapper,
)
from torchrec.optim.warmup import WarmupOptimizer, WarmupPolicy, WarmupStage

from tests.support.dlrm_model import (
    DENSE,
    DIM,
    FEATURES,
    Case,
    FixedPlanner,
    Tensors,
    batch,
    dense_parameters,
    dense_state,
    kept_dense,
    plain_name,
    select,
    set_open,
    shard,
    train,
)
from tests.support.process_group import ProcessGroup
from torchrec_fmp.embeddings.local_shards import LocalShard, local_shards, sharded_collections
from torchrec_fmp.gates.attach import gate_optimizer
from torchrec_fmp.pruning.prune import prune

GATES = {"a": 0.0, "c": 0.0, "d": 0.5, "x": 0.0, "y": 0.7}
KEPT = ("b", "d", "e")
BOTTOM = "model.dense_arch.model._mlp.0._linear.weight"
OVER = "model.over_arch.model.0._mlp.0._linear.weight"
Make = Callable[[DistributedModelParallel], Optimizer]


def adam(dmp: DistributedModelParallel) -> Optimizer:
    return torch.optim.Adam(dense_parameters(dmp).values(), lr=0.02)


def fused_adam(dmp: DistributedModelParallel) -> Optimizer:
    return torch.optim.Adam(dense_parameters(dmp).values(), lr=0.02, fused=True)


def amsgrad(dmp: DistributedModelParallel) -> Optimizer:
    return torch.optim.AdamW(dense_parameters(dmp).values(), lr=0.02, amsgrad=True)


def momentum(dmp: DistributedModelParallel) -> Optimizer:
    return torch.optim.SGD(dense_parameters(dmp).values(), lr=0.02, momentum=0.9)


def adagrad(dmp: DistributedModelParallel) -> Optimizer:
    return torch.optim.Adagrad(dense_parameters(dmp).values(), lr=0.02)


def groups(dmp: DistributedModelParallel) -> Optimizer:
    """Three groups with different hyperparameters; the gates have a separate one.

    The names are those of a gated and of a plain model.
    """
    named = dense_parameters(dmp)
    bottom, gates, over = (
        [p for name, p in named.items() if part in plain_name(name)]
        for part in ("dense_arch.model", "log_alpha", "over_arch")
    )
    return torch.optim.AdamW(
        [
            {"params": gates, "lr": 0.2},
            {"params": bottom, "lr": 0.01},
            {"params": over, "betas": (0.8, 0.9), "weight_decay": 0.3},
        ],
        lr=0.02,
    )


PLAIN = [adam, fused_adam, amsgrad, momentum, adagrad, groups]
STATES = {
    "adam": {"step", "exp_avg", "exp_avg_sq"},
    "fused_adam": {"step", "exp_avg", "exp_avg_sq"},
    "amsgrad": {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
    "momentum": {"momentum_buffer"},
    "adagrad": {"step", "sum"},
    "groups": {"step", "exp_avg", "exp_avg_sq"},
}


def without_params(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]


def carried(make: Make) -> tuple[Tensors, Tensors, list[Any], list[Any], list[str]]:
    """States and groups before and after, and the names of the optimizer's parameters."""
    dmp = shard(Case())
    optimizer = make(dmp)
    train(dmp, optimizer, range(3))
    before, groups_before = dense_state(dmp, optimizer), without_params(optimizer)
    pruned = prune(dmp, optimizer, select(GATES), planner=FixedPlanner("row_wise"), batch=batch(7))
    assert pruned.optimizer is optimizer
    names = {id(parameter): name for name, parameter in pruned.model.named_parameters()}
    held = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in optimizer.state} <= names.keys()
    after = dense_state(pruned.model, optimizer)
    return before, after, groups_before, without_params(optimizer), held


def over_columns() -> list[int]:
    """Kept columns of the over arch, from the names of the pairs."""
    pairs = enumerate(combinations(["dense", *FEATURES], 2), start=DIM)
    kept = [column for column, pair in pairs if set(pair) <= {"dense", *KEPT}]
    return [*range(DIM), *kept]


@pytest.mark.parametrize("make", PLAIN, ids=lambda make: make.__name__)
def test_dense_weights_and_states_are_the_kept_columns_of_the_old_ones(
    ranks: ProcessGroup, make: Make
) -> None:
    for before, after, groups_before, groups_after, held in ranks.run(carried, make):
        assert after.keys() == before.keys()
        assert {name.split("/")[1] for name in after if "/" in name} == STATES[make.__name__]
        assert groups_after == groups_before
        assert sorted(held) == sorted(name for name in after if "/" not in name)
        for name, tensor in after.items():
            parameter, _, state = name.partition("/")
            expected = before[name]
            if expected.dim() == 2 and parameter == BOTTOM:
                expected = expected[:, [DENSE.index("y"), DENSE.index("z")]]
                # The gate folds into the weight; the state is not scaled.
                expected = expected if state else expected * torch.tensor([0.7, 1.0])
            elif expected.dim() == 2 and parameter == OVER:
                # c and d share a table and only d stays, so its gate folds into the rows.
                expected = expected[:, over_columns()]
            assert torch.equal(tensor, expected), name
            assert state != "step" or tensor == 3


def continued(make: Make) -> tuple[list[float], list[float], Tensors, Tensors]:
    """Ten steps of the pruned model, and of a model built small with the same state."""
    dmp = shard(Case())
    optimizer = make(dmp)
    train(dmp, optimizer, range(3))
    selection = select(GATES)
    pruned = prune(dmp, optimizer, selection, planner=FixedPlanner("row_wise"), batch=batch(7))
    small = shard(Case("row_wise", gated=False, features=KEPT, dense=kept_dense(selection)))
    load(small, pruned.model)
    small_optimizer = make(small)
    small_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    dense = kept_dense(selection)
    return (
        train(pruned.model, optimizer, range(3, 13), dense),
        train(small, small_optimizer, range(3, 13), dense),
        dense_state(pruned.model, optimizer),
        dense_state(small, small_optimizer),
    )


def shards(dmp: DistributedModelParallel) -> list[LocalShard]:
    return [s for collection in sharded_collections(dmp).values() for s in local_shards(collection)]


@torch.no_grad()
def load(small: DistributedModelParallel, pruned: DistributedModelParallel) -> None:
    """Copies weights and fused state between models of one plan."""
    parameters = dense_parameters(pruned)
    for name, parameter in dense_parameters(small).items():
        parameter.copy_(parameters[name])
    for to, source in zip(shards(small), shards(pruned), strict=True):
        assert (to.table, to.box) == (source.table, source.box)
        to.weight.copy_(source.weight)
        for name, state in to.states.items():
            state.copy_(source.states[name])
        to.kernel.emb_module.set_optimizer_step(int(source.kernel.emb_module.iter.item()))


@pytest.mark.parametrize("make", PLAIN, ids=lambda make: make.__name__)
def test_the_pruned_model_continues_training_like_one_built_small(
    ranks: ProcessGroup, make: Make
) -> None:
    for losses, small_losses, state, small_state in ranks.run(continued, make):
        assert losses == small_losses
        assert state.keys() == small_state.keys()
        for name, tensor in state.items():
            assert torch.equal(tensor, small_state[name]), name


def dense_keyed(dmp: DistributedModelParallel) -> KeyedOptimizerWrapper:
    return KeyedOptimizerWrapper(
        dense_parameters(dmp), lambda parameters: torch.optim.Adam(parameters, lr=0.02)
    )


def warm_up(optimizer: KeyedOptimizer) -> KeyedOptimizer:
    stages = [WarmupStage(WarmupPolicy.LINEAR, max_iters=10, value=0.1)]
    return WarmupOptimizer(optimizer, stages, lr=0.05)


def combined(dmp: DistributedModelParallel) -> Optimizer:
    return CombinedOptimizer([dmp.fused_optimizer, dense_keyed(dmp)])


def combined_with_keys(dmp: DistributedModelParallel) -> Optimizer:
    return CombinedOptimizer([("fused", dmp.fused_optimizer), ("dense", dense_keyed(dmp))])


def warmed_up(dmp: DistributedModelParallel) -> Optimizer:
    return warm_up(dense_keyed(dmp))


def clipped(dmp: DistributedModelParallel) -> Optimizer:
    return GradientClippingOptimizer(dense_keyed(dmp), GradientClipping.NORM, max_gradient=0.05)


def clipped_and_warmed_up(dmp: DistributedModelParallel) -> Optimizer:
    clipped = GradientClippingOptimizer(dense_keyed(dmp), GradientClipping.VALUE, 0.01)
    return CombinedOptimizer([("fused", warm_up(dmp.fused_optimizer)), ("dense", warm_up(clipped))])


def combined_with_gates(dmp: DistributedModelParallel) -> Optimizer:
    """As in the project's own training, the gates have a separate optimizer."""
    named = dense_parameters(dmp)
    dense = {name: p for name, p in named.items() if "log_alpha" not in name}
    gates = {name: p for name, p in named.items() if "log_alpha" in name}
    return CombinedOptimizer(
        [
            dmp.fused_optimizer,
            KeyedOptimizerWrapper(dense, lambda some: torch.optim.Adam(some, lr=0.02)),
            KeyedOptimizerWrapper(gates, lambda _: gate_optimizer(dmp, 0.02)),
        ]
    )


WRAPPED = [
    dense_keyed,
    combined,
    combined_with_keys,
    combined_with_gates,
    warmed_up,
    clipped,
    clipped_and_warmed_up,
]


def rates(optimizer: Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


def scheduled_training(make: Make, prunes: bool) -> tuple[Any, ...]:
    """Learning rates and losses of six steps with open gates; a prune may drop nothing midway."""
    dmp = shard(Case())
    set_open(dmp)
    optimizer = make(dmp)
    # The warm-up sets rates itself.
    schedules = "warm" not in make.__name__
    scheduler = StepLR(optimizer, step_size=2, gamma=0.5) if schedules else None
    records = []
    for step in range(6):
        if step == 3 and prunes:
            dmp, optimizer, _ = prune(dmp, optimizer, select({}), planner=FixedPlanner())
        records.append((train(dmp, optimizer, [step]), sorted(set(rates(optimizer)))))
        if scheduler is not None:
            scheduler.step()
    fused = [shard.kernel.emb_module.get_learning_rate() for shard in shards(dmp)]
    names = sorted(
        plain_name(name) for name in optimizer.state_dict()["state"] if "log_alpha" not in str(name)
    )
    return records, fused, names, tables(dmp)


def tables(dmp: DistributedModelParallel) -> Tensors:
    return {f"{shard.table} {shard.box}": shard.weight.clone() for shard in shards(dmp)}


@pytest.mark.parametrize("make", WRAPPED, ids=lambda make: make.__name__)
def test_torchrecs_wrappers_and_schedulers_continue_as_without_a_prune(
    ranks: ProcessGroup, make: Make
) -> None:
    for pruned, untouched in zip(
        ranks.run(scheduled_training, make, True),
        ranks.run(scheduled_training, make, False),
        strict=True,
    ):
        records, fused, names, weights = pruned
        other_records, other_fused, other_names, other_weights = untouched
        assert records == other_records
        assert fused == other_fused
        assert names == other_names
        assert all(torch.equal(weight, other_weights[name]) for name, weight in weights.items())


def resaved(make: Make) -> list[str]:
    """Names in the state that the pruned model's optimizer saves and loads."""
    dmp = shard(Case())
    optimizer = make(dmp)
    train(dmp, optimizer, range(2))
    pruned = prune(dmp, optimizer, select(GATES), planner=FixedPlanner(), batch=batch(7))
    state = pruned.optimizer.state_dict()
    pruned.optimizer.load_state_dict(copy.copy(state))
    train(pruned.model, pruned.optimizer, range(2, 4), kept_dense(select(GATES)))
    return [str(name) for name in state["state"]]


@pytest.mark.parametrize("make", WRAPPED, ids=lambda make: make.__name__)
def test_the_state_dict_of_a_carried_optimizer_names_the_new_models_parameters(
    ranks: ProcessGroup, make: Make
) -> None:
    for names in ranks.run(resaved, make):
        assert any(name.endswith(OVER) for name in names)
        assert not any("log_alpha" in name or "_module" in name for name in names)
        assert not any("_embedding_bag_collection" in name for name in names)


def with_a_scheduler(make: Make) -> tuple[list[float], list[float]]:
    """Rates that a scheduler sets before and after a prune that drops something."""
    dmp = shard(Case())
    optimizer = make(dmp)
    scheduler: LRScheduler = StepLR(optimizer, step_size=1, gamma=0.5)
    train(dmp, optimizer, [0])
    scheduler.step()
    before = rates(optimizer)
    optimizer = prune(dmp, optimizer, select(GATES), planner=FixedPlanner()).optimizer
    scheduler.step()
    return before, rates(optimizer)


@pytest.mark.parametrize("make", [adam, groups, combined], ids=lambda make: make.__name__)
def test_a_scheduler_still_sets_the_rates_of_the_carried_optimizer(
    ranks: ProcessGroup, make: Make
) -> None:
    for before, after in ranks.run(with_a_scheduler, make):
        assert set(after) == {rate / 2 for rate in before}


class OtherWrapper(OptimizerWrapper):
    """A wrapper that may keep parameters."""


def with_another_wrapper() -> str:
    dmp = shard(Case())
    with pytest.raises(TypeError) as error:
        prune(dmp, OtherWrapper(dense_keyed(dmp)), select(GATES), planner=FixedPlanner())
    return str(error.value)


def test_a_wrapper_that_may_keep_old_parameters_is_refused(ranks_1: ProcessGroup) -> None:
    (message,) = ranks_1.run(with_another_wrapper)
    assert message.startswith("OtherWrapper may keep parameters")
    assert "pass the optimizer that it wraps" in message
