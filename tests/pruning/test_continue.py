"""Continued training after a prune, against a small model given the same state by hand.

Both have the same plan, so they compute in the same order, and fp32 gives the same bits on any
number of ranks.
"""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torchrec.distributed.model_parallel import DistributedModelParallel

from tests.support.dlrm_model import (
    DENSE,
    DIM,
    FEATURES,
    Case,
    FixedPlanner,
    Piece,
    Tensors,
    adam,
    assemble,
    batch,
    dense_parameters,
    dense_state,
    pieces,
    select,
    shard,
    train,
    trained,
)
from tests.support.process_group import ProcessGroup
from tests.support.runs import Run, assert_equal_runs
from torchrec_fmp.embeddings.local_shards import local_shards, sharded_collections
from torchrec_fmp.pruning.prune import prune

STEPS = 50
DROPPED = ("a", "c", "x")
KEPT = tuple(name for name in FEATURES if name not in DROPPED)
KEPT_DENSE = tuple(name for name in DENSE if name not in DROPPED)
FIRST_DENSE = "model.dense_arch.model._mlp.0._linear.weight"
FIRST_OVER = "model.over_arch.model.0._mlp.0._linear.weight"


def all_of(
    dmp: DistributedModelParallel, optimizer: Optimizer
) -> tuple[dict[str, Tensors], Tensors]:
    """Whole tables with their state, and the dense parameters with theirs."""
    gathered: list[list[tuple[str, Piece]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, pieces(dmp))
    return assemble(gathered), dense_state(dmp, optimizer)


def columns_left(fqn: str) -> list[int] | None:
    """Columns of a dense layer in a model without the dropped features."""
    if fqn == FIRST_DENSE:
        return [DENSE.index(name) for name in KEPT_DENSE]
    if fqn == FIRST_OVER:
        pairs = combinations(("the dense input", *FEATURES), 2)
        stay = [DIM + i for i, pair in enumerate(pairs) if not set(pair) & set(DROPPED)]
        return [*range(DIM), *stay]
    return None


@torch.no_grad()
def built_small(
    sharding: str, tables: dict[str, Tensors], dense: Tensors, step: int
) -> tuple[DistributedModelParallel, Optimizer]:
    """A model that never had the dropped features, given the state of a model that had them."""
    dmp = shard(Case(sharding, gated=False, features=KEPT, dense=KEPT_DENSE))
    for collection in sharded_collections(dmp).values():
        for held in local_shards(collection):
            (row, column, rows, columns), table = held.box, tables[held.table]
            place = slice(row, row + rows), slice(column, column + columns)
            held.weight.copy_(table["weight"][place])
            # One value per row; for several column shards, their mean.
            for name, state in held.states.items():
                state.copy_(table[name][place].double().mean(1))
            held.kernel.emb_module.set_optimizer_step(step)
    optimizer = adam(dmp)
    for fqn, parameter in dense_parameters(dmp).items():
        columns = columns_left(fqn)

        def cut(tensor: Tensor, columns: list[int] | None = columns) -> Tensor:
            return tensor.clone() if columns is None or tensor.dim() == 0 else tensor[:, columns]

        parameter.copy_(cut(dense[fqn]))
        names = ("step", "exp_avg", "exp_avg_sq")
        optimizer.state[parameter] = {name: cut(dense[f"{fqn}/{name}"]) for name in names}
    return dmp, optimizer


def run_on(dmp: DistributedModelParallel, optimizer: Optimizer) -> Run:
    losses = train(dmp, optimizer, range(3, 3 + STEPS), KEPT_DENSE)
    return losses, pieces(dmp), dense_state(dmp, optimizer), torch.get_rng_state()


def both_ways(old: str, new: str) -> tuple[Run, Run]:
    """Continued training of the pruned model, and training of the model built small."""
    dmp, optimizer = trained(Case(old))
    tables, dense = all_of(dmp, optimizer)
    pruned = prune(
        dmp,
        optimizer,
        select(dict.fromkeys(DROPPED, 0.0)),
        planner=FixedPlanner(new),
        batch=batch(7),
    )
    small, small_optimizer = built_small(new, tables, dense, step=3)
    torch.manual_seed(5)
    after_prune = run_on(pruned.model, pruned.optimizer)
    torch.manual_seed(5)
    return after_prune, run_on(small, small_optimizer)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("row_wise", "table_wise"),
        ("table_wise", "row_wise"),
        ("mixed", "column_wise"),
        ("column_wise", "mixed"),
    ],
)
def test_continued_training_is_bit_equal_to_training_a_model_built_small(
    ranks: ProcessGroup, old: str, new: str
) -> None:
    results = ranks.run(both_ways, old, new)
    for (losses, _, state, _), _ in results:
        assert len(losses) == STEPS
        assert losses[-1] != losses[0]
        assert state[FIRST_DENSE].shape[1] == len(KEPT_DENSE)
    assert_equal_runs([pruned for pruned, _ in results], [small for _, small in results])
