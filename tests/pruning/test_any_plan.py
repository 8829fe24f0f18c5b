"""Prunes from every sharding type to every other, including hierarchical and data-parallel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ModuleSharder, ShardingPlan
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.optimizers import in_backward_optimizer_filter

from tests.support.dlrm_model import Case, Piece, assemble, build, pieces, select, train
from tests.support.explicit_plans import FLAT, HIERARCHICAL, Placement, collection_plan, hosts_of
from tests.support.process_group import ProcessGroup
from torchrec_fmp import prune, sharders

TYPES = (*FLAT, *HIERARCHICAL)
# Drops one table, and one feature of the shared table.
GATES = {"e": 0.0, "c": 0.0}
SURVIVORS = {"t_seven", "t_one", "t_shared"}
RANKS, RANKS_A_HOST = 4, 2
BY_ROW = EmbOptimType.EXACT_ROWWISE_ADAGRAD


@dataclass(frozen=True)
class OneType:
    """Plans every table with one sharding type, or table-wise if it has fewer rows than ranks.

    TorchRec cannot shard such a table by grid with a row-wise optimizer: "Total volume of shards
    does not match tensor volume". It can shard it row-wise: see test_reshard.py.
    """

    sharding: str

    def plan(self, module: nn.Module, sharders: list[ModuleSharder[Any]]) -> ShardingPlan:
        kernel = "dense" if self.sharding == "data_parallel" else "fused"
        plan = {}
        for fqn, child in module.named_modules():
            if isinstance(child, EmbeddingBagCollection):
                tables = collection_plan(module, fqn, Placement(self.sharding, kernel))
                small = collection_plan(module, fqn, Placement("table_wise", "fused"))
                for config in child.embedding_bag_configs():
                    if config.num_embeddings < RANKS:
                        tables[config.name] = small[config.name]
                plan[fqn] = tables
        return ShardingPlan(plan)


Held = list[tuple[str, Piece]]


def resharded(old: str, optimizer_type: EmbOptimType) -> tuple[Held, list[Held]]:
    """This rank's pieces after some steps, and after a prune to each sharding type."""
    with hosts_of(RANKS_A_HOST):
        model = build(Case(gated=False))
        all_sharders = sharders({"optimizer": optimizer_type, "learning_rate": 0.1})
        dmp = DistributedModelParallel(
            model,
            device=torch.device("cpu"),
            plan=OneType(old).plan(model, all_sharders),
            sharders=all_sharders,
        )
        dense = dict(in_backward_optimizer_filter(dmp.named_parameters()))
        # For data-parallel tables it keeps the same state as FBGEMM's Adagrad for sharded ones.
        optimizer = torch.optim.Adagrad(dense.values(), lr=0.1)
        train(dmp, optimizer, range(3))
        before = held(dmp, optimizer)
        after = []
        for new in TYPES:
            # A prune moves the optimizer to the pruned model.
            own = torch.optim.Adagrad(dense.values(), lr=0.1)
            own.load_state_dict(optimizer.state_dict())
            pruned = prune(dmp, own, select(GATES, Case(gated=False)), planner=OneType(new))
            after.append(held(pruned.model, pruned.optimizer))
    return before, after


def held(dmp: DistributedModelParallel, optimizer: torch.optim.Optimizer) -> Held:
    """This rank's pieces, including the dense optimizer's state of data-parallel tables."""
    found = pieces(dmp)
    for name, parameter in dmp.named_parameters():
        if "embedding_bags" in name and parameter in optimizer.state:
            box = (0, 0, *parameter.shape)
            table = name.split(".")[-2]
            found.append((table, (box, "sum", optimizer.state[parameter]["sum"].clone())))
    return found


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(BY_ROW, id=BY_ROW.name),
        # Its states have the weights' layout, so the same code moves them.
        pytest.param(
            EmbOptimType.EXACT_ADAGRAD, id=EmbOptimType.EXACT_ADAGRAD.name, marks=pytest.mark.slow
        ),
    ],
)
@pytest.mark.parametrize("old", TYPES)
def test_weights_and_states_are_bit_equal_or_merged_as_documented(
    ranks_4: ProcessGroup, old: str, optimizer: EmbOptimType
) -> None:
    results = ranks_4.run(resharded, old, optimizer)
    before = assemble(rank for rank, _ in results)
    for index, new in enumerate(TYPES):
        after = assemble(found[index] for _, found in results)
        assert after.keys() == SURVIVORS
        for table, tensors in after.items():
            assert torch.equal(tensors["weight"], before[table]["weight"]), (new, table)
            state, expected = tensors["sum"], before[table]["sum"]
            assert expected.any()
            if torch.equal(state, expected):
                continue
            # Several column shards or elements, each with its own value, were merged into one.
            assert optimizer is BY_ROW, (new, table)
            torch.testing.assert_close(state.mean(1), expected.mean(1), msg=f"{new}, {table}")


def test_row_states_merge_and_split_with_their_column_shards(ranks_4: ProcessGroup) -> None:
    results = ranks_4.run(resharded, "column_wise", BY_ROW)
    before = assemble(rank for rank, _ in results)["t_shared"]["sum"]
    assert (before[:, :4] != before[:, 4:8]).any(), "each column shard has a value of its own"
    merged = assemble(found[TYPES.index("table_wise")] for _, found in results)
    assert torch.equal(merged["t_shared"]["sum"], merged["t_shared"]["sum"][:, :1].expand(-1, 16))
    halves = assemble(found[TYPES.index("grid_shard")] for _, found in results)["t_shared"]["sum"]
    for columns in (slice(0, 8), slice(8, 16)):
        expected = before[:, columns].mean(1, keepdim=True).expand(-1, 8)
        torch.testing.assert_close(halves[:, columns], expected)
