"""`Job`: a sharded model with the optimizer of its dense parameters, trained by each phase."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch.optim import Adam, Optimizer
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.types import ModuleSharder, ShardingPlan, ShardingType
from torchrec.optim.optimizers import in_backward_optimizer_filter

from torchrec_fmp.data.schema import Schema
from torchrec_fmp.distributed.ranks import Ranks
from torchrec_fmp.embeddings.local_shards import sharded_collections
from torchrec_fmp.gates.attach import attach_gates, feature_gates
from torchrec_fmp.gates.feature_gates import GateConfig
from torchrec_fmp.gates.sharded import sharders
from torchrec_fmp.models.backbone import Backbone
from torchrec_fmp.training.train_config import TrainConfig

# A prime beyond the seeds that anyone sweeps.
_SEEDS_APART = 1_000_003
_FUSED = {
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adam": EmbOptimType.ADAM,
}


@dataclass
class Job:
    """A sharded model, the optimizer of its parameters that are not fused, and its columns."""

    model: DistributedModelParallel
    optimizer: Optimizer
    schema: Schema


def build_job(
    backbone: Backbone,
    schema: Schema,
    train: TrainConfig,
    seed: int,
    *,
    ranks: Ranks,
    planner: EmbeddingShardingPlanner,
    gates: GateConfig | None = None,
) -> Job:
    """A freshly initialized model of the schema's columns, sharded over all ranks. Collective.

    With the same seed, the gated and the plain model start from the same weights.

    Args:
        backbone: backbone that builds the model.
        schema: columns that the model reads.
        train: learning rates, and the tables' optimizer.
        seed: seed of the weights; added to the gates' own seed, it also seeds their noise.
        ranks: process group.
        planner: planner for the tables.
        gates: config of every feature's gate; None for a model without gates.

    Raises:
        ValueError: if the tables' optimizer cannot train a table of the plan on this device.
    """
    torch.manual_seed(seed)
    model = backbone.build(schema, ranks.device)
    if gates is not None:
        seeded = replace(gates, seed=gates.seed + seed)
        attach_gates(model, seeded, backbone.dense_modules(schema))
    model_sharders = table_sharders(train)
    plan = planner.collective_plan(model, model_sharders, ranks.group)
    _check_kernels(plan, train, ranks.device.type)
    # Each rank initializes its own shards, which must differ between ranks. The CPU generator
    # reads only the seed's lower 32 bits.
    torch.manual_seed(seed + _SEEDS_APART * ranks.rank)
    sharded = DistributedModelParallel(
        model, device=ranks.device, plan=plan, sharders=model_sharders
    )
    return Job(sharded, _optimizer(sharded, train), schema)


def table_sharders(config: TrainConfig) -> list[ModuleSharder[Any]]:
    """Sharders for a run's tables, with the configured optimizer."""
    return sharders(
        {
            "optimizer": _FUSED[config.embedding_optimizer],
            "learning_rate": config.embedding_learning_rate,
        }
    )


def _check_kernels(plan: ShardingPlan, config: TrainConfig, device_type: str) -> None:
    replicated = ShardingType.DATA_PARALLEL.value
    of_tables = (table for module_plan in plan.plan.values() for table in module_plan.items())
    fused = [name for name, sharding in of_tables if sharding.sharding_type != replicated]
    if fused and config.embedding_optimizer == "adam" and device_type == "cpu":
        raise ValueError(
            f"train.embedding_optimizer is adam and the plan shards {fused[0]}, but FBGEMM has no "
            "fused Adam on CPU. Set planner.sharding_types to [data_parallel], so that "
            "torch.optim.Adam trains the tables, or train.embedding_optimizer to rowwise_adagrad"
        )


def _optimizer(model: DistributedModelParallel, config: TrainConfig) -> Adam:
    """The optimizer of all layers and, in a separate group, data-parallel tables; not of gates."""
    log_alphas = {id(module.log_alpha) for _, module in feature_gates(model)}
    named = dict(in_backward_optimizer_filter(model.named_parameters()))
    dense = [parameter for parameter in named.values() if id(parameter) not in log_alphas]
    of_tables = {
        id(parameter)
        for collection in sharded_collections(model).values()
        for parameter in collection.parameters()
    }
    layers = [parameter for parameter in dense if id(parameter) not in of_tables]
    tables = [parameter for parameter in dense if id(parameter) in of_tables]
    groups: list[dict[str, Any]] = [{"params": layers}]
    if tables:
        groups.append({"params": tables, "lr": config.embedding_learning_rate})
    return Adam(groups, lr=config.learning_rate, fused=True)
