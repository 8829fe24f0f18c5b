"""A small DLRM with or without gates, its plan, its optimizers and its batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torchrec.datasets.utils import Batch
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardedTensor, ShardingPlan
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_fmp.gates.attach import attach_gates, feature_gates, gate_optimizer
from torchrec_fmp.gates.feature_gates import GateConfig
from torchrec_fmp.gates.sharded import sharders

EBC = "model.sparse_arch.embedding_bag_collection"
BATCH_SIZE = 6
STEPS = 3
DENSE = ("x", "y")
Sharding = Literal["table_wise", "row_wise", "column_wise", "mixed"]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A model, its plan and its gates; table `t0` serves two features."""

    sharding: Sharding
    pooling: PoolingType = PoolingType.SUM
    weighted: bool = False
    gates: GateConfig | None = field(default_factory=GateConfig)

    def __str__(self) -> str:
        return f"{self.sharding}-{self.pooling.name}-{'' if self.weighted else 'un'}weighted"


def build_model(case: Case) -> DLRMTrain:
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(
            name=f"t{i}",
            embedding_dim=8,
            num_embeddings=20 + i,
            feature_names=features,
            pooling=case.pooling,
        )
        for i, features in enumerate((["a", "b"], ["c"], ["d"]))
    ]
    collection = EmbeddingBagCollection(tables=tables, is_weighted=case.weighted)
    model = DLRMTrain(DLRM(collection, len(DENSE), [16, 8], [8, 1]))
    if case.gates is not None:
        attach_gates(model, case.gates, {"model.dense_arch": DENSE})
    return model


def shard(case: Case, model: DLRMTrain) -> DistributedModelParallel:
    world_size = dist.get_world_size()
    all_sharders = sharders({"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.1})
    kernel = EmbeddingComputeKernel.FUSED.value
    by_table = [table_wise(rank=i % world_size, compute_kernel=kernel) for i in range(3)]
    by_row = [row_wise(compute_kernel=kernel)] * 3
    by_column = [column_wise(list(range(world_size)), compute_kernel=kernel)] * 3
    shardings = {
        "table_wise": by_table,
        "row_wise": by_row,
        "column_wise": by_column,
        "mixed": [by_table[0], by_row[1], by_column[2]],
    }[case.sharding]
    plan = construct_module_sharding_plan(
        model.get_submodule(EBC),
        {f"t{i}": sharding for i, sharding in enumerate(shardings)},
        sharder=all_sharders[0] if case.gates is not None else all_sharders[1],
        local_size=world_size,
        world_size=world_size,
        device_type="cpu",
    )
    return DistributedModelParallel(
        model, device=torch.device("cpu"), plan=ShardingPlan({EBC: plan}), sharders=all_sharders
    )


def optimizers(dmp: DistributedModelParallel) -> CombinedOptimizer:
    """TorchRec's fused and dense optimizers, and the gates' own where there are gates."""
    dense = {
        name: parameter
        for name, parameter in in_backward_optimizer_filter(dmp.named_parameters())
        if not name.endswith("log_alpha")
    }
    keyed = [
        dmp.fused_optimizer,
        KeyedOptimizerWrapper(dense, lambda parameters: torch.optim.Adagrad(parameters, lr=0.05)),
    ]
    if any(feature_gates(dmp)):
        gates = gate_optimizer(dmp, 0.2)
        named = {f"{fqn}.log_alpha": module.log_alpha for fqn, module in feature_gates(dmp)}
        keyed.append(KeyedOptimizerWrapper(named, lambda _: gates))
    return CombinedOptimizer(keyed)


def run_steps(
    dmp: DistributedModelParallel, optimizer: CombinedOptimizer, some: list[Batch]
) -> None:
    for batch in some:
        optimizer.zero_grad()
        dmp(batch)[0].backward()
        optimizer.step()


def batches(case: Case, count: int = STEPS) -> Iterator[Batch]:
    """Batches of this rank; every rank has different ones."""
    generator = torch.Generator().manual_seed(1000 + dist.get_rank())
    for _ in range(count):
        lengths = torch.randint(0, 4, (4 * BATCH_SIZE,), generator=generator)
        total = int(lengths.sum())
        yield Batch(
            dense_features=torch.randn(BATCH_SIZE, len(DENSE), generator=generator),
            sparse_features=KeyedJaggedTensor(
                keys=["d", "b", "a", "c"],
                values=torch.randint(0, 20, (total,), generator=generator),
                lengths=lengths,
                weights=torch.rand(total, generator=generator) if case.weighted else None,
            ),
            labels=torch.randint(0, 2, (BATCH_SIZE,), generator=generator),
        )


def local(state: Mapping[str, Any]) -> Tensors:
    """This rank's part of every tensor of a nested state, by path."""
    tensors: Tensors = {}
    for name, value in state.items():
        if isinstance(value, ShardedTensor):
            for shard in value.local_shards():
                tensors[f"{name}{shard.metadata.shard_offsets}"] = shard.tensor.clone()
        elif isinstance(value, Mapping):
            tensors |= local({f"{name}/{key}": inner for key, inner in value.items()})
        elif isinstance(value, Tensor):
            tensors[str(name)] = value.detach().clone()
    return tensors


def set_open(model: nn.Module, is_open: bool) -> None:
    for _, gates in feature_gates(model):
        gates.set_open(is_open)
