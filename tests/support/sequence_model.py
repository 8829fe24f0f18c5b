"""A small model of sequence features, with or without gates, its plan, optimizers and batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.fx
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import (
    ParameterShardingGenerator,
    column_wise,
    construct_module_sharding_plan,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ModuleSharder, ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_fmp.gates.attach import attach_gates, feature_gates, gate_optimizer
from torchrec_fmp.gates.feature_gates import GateConfig
from torchrec_fmp.gates.sharded import sharders

BATCH_SIZE = 6
STEPS = 3
DIM = 8
# Table -> its features. Feature s is served by two tables, and pooled by the other collection too.
SEQUENCE_TABLES = {"t0": ["r", "s"], "t1": ["s"], "t2": ["u"]}
BAG_TABLES = {"w0": ["s"], "w1": ["v"]}
KEYS = ("r", "s@t0", "s@t1", "u")
MIXED = {
    "t0": "table_wise",
    "t1": "row_wise",
    "t2": "column_wise",
    "w0": "row_wise",
    "w1": "table_wise",
}
# Not data-parallel: on CPU FBGEMM's dense kernel pools sequences (torchrec 1.8, gates or not).
SHARDINGS = ("table_wise", "row_wise", "column_wise", "mixed")


@dataclass(frozen=True)
class Case:
    """A model, its plan and its gates.

    Args:
        sharding: sharding type of every table, or `mixed`.
        gates: configuration of the gates; None for the plain model.
        bags: whether an `EmbeddingBagCollection` reads some of the features too.
    """

    sharding: str = "mixed"
    gates: GateConfig | None = field(default_factory=GateConfig)
    bags: bool = False


class SequenceModel(nn.Module):
    """Sums each feature's embeddings over an example's positions, after a tanh."""

    def __init__(self, bags: bool) -> None:
        super().__init__()
        self.ec = EmbeddingCollection(
            tables=[
                EmbeddingConfig(
                    name=name, embedding_dim=DIM, num_embeddings=20, feature_names=list(features)
                )
                for name, features in SEQUENCE_TABLES.items()
            ],
            need_indices=True,
        )
        width = len(KEYS) * DIM
        if bags:
            self.ebc = EmbeddingBagCollection(
                tables=[
                    EmbeddingBagConfig(
                        name=name,
                        embedding_dim=DIM,
                        num_embeddings=20,
                        feature_names=list(features),
                    )
                    for name, features in BAG_TABLES.items()
                ]
            )
            width += len(BAG_TABLES) * DIM
        self.bags = bags
        self.over = nn.Linear(width, 1)

    def forward(self, features: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:
        """Loss and logits, (B,)."""
        pooled = [self.ebc(features).values()] if self.bags else []
        sequences = self.ec(features)
        read = torch.cat([*(pool(sequences[key]) for key in KEYS), *pooled], dim=1)
        logits = self.over(read).squeeze(1)
        return (logits - 1).square().mean(), logits


# TorchRec's pipelines trace the model.
@torch.fx.wrap
def pool(sequence: JaggedTensor) -> Tensor:
    """(N, D) -> (B, D)."""
    lengths = sequence.lengths()
    examples = torch.arange(len(lengths)).repeat_interleave(lengths)
    pooled = torch.zeros(len(lengths), DIM)
    return pooled.index_add(0, examples, sequence.values().tanh())


def build_model(case: Case) -> SequenceModel:
    """Its weights are the same in every call."""
    torch.manual_seed(0)
    model = SequenceModel(case.bags)
    if case.gates is not None:
        attach_gates(model, case.gates)
    return model


def fused_sharders() -> list[ModuleSharder[Any]]:
    return sharders({"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.1})


def shard(
    case: Case, model: nn.Module, model_sharders: list[ModuleSharder[Any]] | None = None
) -> DistributedModelParallel:
    model_sharders = model_sharders or fused_sharders()
    by_type = {sharder.module_type: sharder for sharder in model_sharders}
    tables = {"ec": SEQUENCE_TABLES, "ebc": BAG_TABLES}
    plan = {
        fqn: construct_module_sharding_plan(
            module,
            {table: _sharding(case, table) for table in tables[fqn]},
            sharder=by_type[type(module)],
            local_size=dist.get_world_size(),
            world_size=dist.get_world_size(),
            device_type="cpu",
        )
        for fqn, module in model.named_children()
        if fqn in tables
    }
    return DistributedModelParallel(
        model, device=torch.device("cpu"), plan=ShardingPlan(plan), sharders=model_sharders
    )


def _sharding(case: Case, table: str) -> ParameterShardingGenerator:
    kernel = EmbeddingComputeKernel.FUSED.value
    world_size = dist.get_world_size()
    sharding = MIXED[table] if case.sharding == "mixed" else case.sharding
    if sharding == "table_wise":
        return table_wise(rank=int(table[1]) % world_size, compute_kernel=kernel)
    if sharding == "row_wise":
        return row_wise(compute_kernel=kernel)
    return column_wise(list(range(world_size)), compute_kernel=kernel)


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


def batches(count: int = STEPS) -> Iterator[KeyedJaggedTensor]:
    """Batches of this rank, different on every rank; 0 to 3 positions per example."""
    generator = torch.Generator().manual_seed(1000 + dist.get_rank())
    keys = ["v", "u", "s", "r"]
    for _ in range(count):
        lengths = torch.randint(0, 4, (len(keys) * BATCH_SIZE,), generator=generator)
        values = torch.randint(0, 20, (int(lengths.sum()),), generator=generator)
        yield KeyedJaggedTensor(keys=keys, values=values, lengths=lengths)
