"""GPU-only fused optimizers, and row counters, moved between shardings."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    CounterBasedRegularizationDefinition,
    WeightDecayMode,
)
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ModuleSharder, ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.support.dlrm_model import assemble, pieces
from tests.support.process_group import ProcessGroup
from torchrec_fmp.embeddings.local_shards import local_shards, sharded_collections
from torchrec_fmp.gates.sharded import sharders
from torchrec_fmp.pruning.prune import prune
from torchrec_fmp.selection.selection import FeatureDecision, Selection

SHARDINGS = ("table_wise", "row_wise", "column_wise")
COUNTERS = {
    "weight_decay": 0.01,
    "weight_decay_mode": WeightDecayMode.COUNTER,
    "counter_based_regularization": CounterBasedRegularizationDefinition(),
}
# Optimizer -> names of its states with one value per row, and with one value per element.
ON_GPU: dict[EmbOptimType, tuple[set[str], set[str]]] = {
    EmbOptimType.ADAM: (set(), {"exp_avg", "exp_avg_sq"}),
    EmbOptimType.PARTIAL_ROWWISE_ADAM: ({"exp_avg_sq"}, {"exp_avg"}),
    EmbOptimType.LAMB: (set(), {"exp_avg", "exp_avg_sq"}),
    EmbOptimType.PARTIAL_ROWWISE_LAMB: ({"exp_avg_sq"}, {"exp_avg"}),
}


class Collection(nn.Module):
    """Nothing but two tables."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=name, embedding_dim=16, num_embeddings=11, feature_names=[name]
                )
                for name in ("first", "second")
            ]
        )

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        return self.tables(features).values()


class Planner:
    """Gives every table one sharding."""

    def __init__(self, sharding: str, device: torch.device) -> None:
        self.sharding, self.device = sharding, device

    def plan(self, module: nn.Module, all_sharders: list[ModuleSharder[Any]]) -> ShardingPlan:
        world_size = dist.get_world_size()
        collection = module.tables
        assert isinstance(collection, EmbeddingBagCollection)
        per_table = {
            "table_wise": table_wise(rank=world_size - 1, compute_kernel="fused"),
            "row_wise": row_wise(compute_kernel="fused"),
            # Two column shards, both on one rank if there is only one.
            "column_wise": column_wise(ranks=[0, world_size - 1], compute_kernel="fused"),
        }[self.sharding]
        (sharder,) = (s for s in all_sharders if s.module_type is EmbeddingBagCollection)
        plan = construct_module_sharding_plan(
            collection,
            {config.name: per_table for config in collection.embedding_bag_configs()},
            sharder=sharder,
            local_size=world_size,
            world_size=world_size,
            device_type=self.device.type,
        )
        return ShardingPlan({"tables": plan})


def moved(old: str, fused: dict[str, Any], device: torch.device) -> list[Any]:
    """Pieces before, then pieces and step counters after a prune to each sharding."""
    torch.manual_seed(0)
    all_sharders = sharders({"learning_rate": 0.1, **fused})
    model = Collection()
    plan = Planner(old, device).plan(model, all_sharders)
    dmp = DistributedModelParallel(model, device=device, plan=plan, sharders=all_sharders)
    for _ in range(3):
        values = torch.randint(0, 11, (8,))
        features = KeyedJaggedTensor(["first", "second"], values, lengths=torch.full((8,), 1))
        dmp(features.to(device)).square().sum().backward()
    decisions = {name: FeatureDecision(0.0, 1.0, True, "test") for name in ("first", "second")}
    found = [pieces(dmp)]
    for new in SHARDINGS:
        optimizer = dmp.fused_optimizer
        pruned = prune(dmp, optimizer, Selection(decisions), planner=Planner(new, device)).model
        steps = {
            int(local.kernel.emb_module.iter.item())
            for collection in sharded_collections(pruned).values()
            for local in local_shards(collection)
        }
        found.append((pieces(pruned), steps))
    return [[(t, (b, n, v.cpu())) for t, (b, n, v) in found[0]]] + [
        ([(t, (b, n, v.cpu())) for t, (b, n, v) in some], steps) for some, steps in found[1:]
    ]


def check(results: list[list[Any]], by_row: set[str], by_element: set[str]) -> None:
    before = assemble(rank[0] for rank in results)["first"]
    assert before.keys() == {"weight", *by_row, *by_element}
    assert all(tensor.any() for tensor in before.values())
    for new, sharding in enumerate(SHARDINGS, start=1):
        after = assemble(rank[new][0] for rank in results)
        assert after.keys() == {"first", "second"}
        for name, old in before.items():
            value = after["first"][name]
            merged = name in by_row and sharding != "column_wise" and (old != old[:, :1]).any()
            if merged:
                torch.testing.assert_close(value, old.mean(1, keepdim=True).expand_as(value))
            else:
                assert torch.equal(value, old), (sharding, name)
        assert {step for rank in results for step in rank[new][1]} == {3}


def counted(old: str) -> list[Any]:
    fused = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, **COUNTERS}
    return moved(old, fused, torch.device("cpu"))


@pytest.mark.parametrize("old", SHARDINGS)
def test_row_counters_of_adagrad_survive_any_new_sharding(ranks: ProcessGroup, old: str) -> None:
    check(ranks.run(counted, old), {"sum", "prev_iter", "row_counter"}, set())


def _on_gpu(rank: int, world_size: int, store: str, old: str, fused: int, out: str) -> None:
    torch.cuda.set_device(rank)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=world_size)
    found = moved(old, {"optimizer": EmbOptimType(fused)}, torch.device("cuda", rank))
    torch.save(found, f"{out}.{rank}")
    dist.destroy_process_group()


@pytest.mark.parametrize("optimizer", ON_GPU, ids=lambda optimizer: optimizer.name)
@pytest.mark.parametrize("old", SHARDINGS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_states_of_gpu_optimizers_are_bit_equal_under_any_new_sharding(
    world_size: int, old: str, optimizer: EmbOptimType
) -> None:
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"FBGEMM runs {optimizer.name} on GPUs only, and {world_size} are needed")
    with tempfile.TemporaryDirectory() as directory:
        args = (world_size, f"{directory}/store", old, optimizer.value, f"{directory}/out")
        mp.spawn(_on_gpu, args, nprocs=world_size)
        results = [torch.load(f"{directory}/out.{rank}") for rank in range(world_size)]
    check(results, *ON_GPU[optimizer])
