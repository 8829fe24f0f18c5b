"""`pooling` is equal for two plans exactly if TorchRec's collections compute the same values."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ModuleSharder, ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.support.process_group import ProcessGroup
from torchrec_fmp import Selection, prune, sharders
from torchrec_fmp.planning.pooling import PoolingChangedError, pooling
from torchrec_fmp.selection.selection import FeatureDecision

TYPES = ("table_wise", "row_wise", "column_wise")
# Sharding types of the mean-pooled table and of the sum-pooled table.
PLANS = list(itertools.product(TYPES, TYPES))


class Pooled(nn.Module):
    def __init__(self, weighted: bool) -> None:
        super().__init__()
        tables = [
            EmbeddingBagConfig(
                name=f"t_{kind.name}",
                embedding_dim=16,
                num_embeddings=20,
                feature_names=[kind.name],
                pooling=kind,
            )
            for kind in (PoolingType.MEAN, PoolingType.SUM)
        ]
        self.ebc = EmbeddingBagCollection(tables, is_weighted=weighted)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        return self.ebc(features).values()


class Fixed:
    """Plans the two tables with fixed sharding types."""

    def __init__(self, types: tuple[str, str]) -> None:
        self.types = types

    def plan(self, module: nn.Module, sharders: list[ModuleSharder[Any]]) -> ShardingPlan:
        ranks = dist.get_world_size()
        made = {
            "table_wise": table_wise(rank=0, compute_kernel="fused"),
            "row_wise": row_wise(compute_kernel="fused"),
            "column_wise": column_wise(ranks=list(range(ranks)), compute_kernel="fused"),
        }
        (sharder,) = (s for s in sharders if s.module_type is EmbeddingBagCollection)
        collection = module.get_submodule("ebc")
        per_table = {
            table: made[kind] for table, kind in zip(("t_MEAN", "t_SUM"), self.types, strict=True)
        }
        plan = construct_module_sharding_plan(
            collection, per_table, sharder, local_size=ranks, world_size=ranks, device_type="cpu"
        )
        return ShardingPlan({"ebc": plan})


def shard(types: tuple[str, str], weighted: bool) -> DistributedModelParallel:
    torch.manual_seed(0)
    model = Pooled(weighted)
    weights = model.state_dict()
    all_sharders = sharders({"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": 0.1})
    plan = Fixed(types).plan(model, all_sharders)
    dmp = DistributedModelParallel(
        model, device=torch.device("cpu"), plan=plan, sharders=all_sharders
    )
    dmp.load_state_dict(weights)
    return dmp


def batch(weighted: bool) -> KeyedJaggedTensor:
    generator = torch.Generator().manual_seed(dist.get_rank())
    lengths = torch.randint(1, 5, (8,), generator=generator)
    total = int(lengths.sum())
    return KeyedJaggedTensor(
        keys=["MEAN", "SUM"],
        values=torch.randint(0, 20, (total,), generator=generator),
        lengths=lengths,
        weights=torch.rand(total, generator=generator) if weighted else None,
    )


def pooled(weighted: bool) -> list[tuple[dict[tuple[str, str], str], Tensor]]:
    """`pooling` and the pooled values for every plan."""
    found = []
    for types in PLANS:
        dmp = shard(types, weighted)
        how = pooling(dmp.plan, Pooled(weighted))
        found.append((how, dmp(batch(weighted)).detach()))
    return found


@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
def test_pooling_is_equal_exactly_if_torchrec_computes_equal_values(
    ranks_2: ProcessGroup, weighted: bool
) -> None:
    alike_and_not = set()
    for found in ranks_2.run(pooled, weighted):
        for (how, values), (other_how, other_values) in itertools.combinations(found, 2):
            for index, table in enumerate((("ebc", "t_MEAN"), ("ebc", "t_SUM"))):
                columns = slice(16 * index, 16 * (index + 1))
                close = torch.allclose(values[:, columns], other_values[:, columns], rtol=1e-5)
                assert close == (how[table] == other_how[table]), (how, other_how, table)
                alike_and_not.add(close)
    assert alike_and_not == {True, False}


def refused(old: tuple[str, str], new: tuple[str, str]) -> str:
    dmp = shard(old, weighted=False)
    decisions = {
        name: FeatureDecision(0.0, 1.0, kept=True, reason="test") for name in ("MEAN", "SUM")
    }
    try:
        prune(dmp, dmp.fused_optimizer, Selection(decisions), planner=Fixed(new))
    except (PoolingChangedError, RuntimeError) as error:
        assert isinstance(error, PoolingChangedError) == (dist.get_rank() == 0)
        return str(error)
    return ""


def test_a_plan_that_pools_differently_is_refused_before_anything_moves(
    ranks_2: ProcessGroup,
) -> None:
    by_table, mixed = ("table_wise", "table_wise"), ("row_wise", "table_wise")
    for error in ranks_2.run(refused, by_table, mixed):
        assert "t_SUM of ebc was a sum, would be a sum divided by length" in error
        assert "t_MEAN" not in error
    assert ranks_2.run(refused, by_table, ("column_wise", "table_wise")) == ["", ""]
    assert ranks_2.run(refused, by_table, ("column_wise", "row_wise")) == ["", ""]
