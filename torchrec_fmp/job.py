"""A sharded model with the optimizer of its dense parameters: what a phase trains."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch.optim import Adam, Optimizer
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.optim.optimizers import in_backward_optimizer_filter

from torchrec_fmp.config import RunConfig
from torchrec_fmp.data.schema import Schema
from torchrec_fmp.gates.attach import attach_gates, feature_gates
from torchrec_fmp.gates.sharded import sharders
from torchrec_fmp.ranks import Ranks

# A prime beyond the seeds that anyone sweeps.
_SEEDS_APART = 1_000_003


@dataclass
class Job:
    """A sharded model, the optimizer of its dense parameters, and the columns that it reads."""

    model: DistributedModelParallel
    optimizer: Optimizer
    schema: Schema


def build_job(
    config: RunConfig, schema: Schema, ranks: Ranks, planner: EmbeddingShardingPlanner, gated: bool
) -> Job:
    """A freshly initialized model of the schema's columns, sharded over all ranks. Collective.

    With the same seed, the gated and the plain model start from the same weights.
    """
    torch.manual_seed(config.seed)
    model = config.model.build(schema, ranks.device)
    if gated:
        gates = replace(config.gates, seed=config.gates.seed + config.seed)
        attach_gates(model, gates, config.model.dense_modules(schema))
    model_sharders = sharders(
        {
            "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            "learning_rate": config.train.embedding_learning_rate,
        }
    )
    plan = planner.collective_plan(model, model_sharders, ranks.group)
    # Each rank fills its own shards, which must not be each other's copies. The CPU generator
    # reads the seed's lower 32 bits only.
    torch.manual_seed(config.seed + _SEEDS_APART * ranks.rank)
    sharded = DistributedModelParallel(
        model, device=ranks.device, plan=plan, sharders=model_sharders
    )
    log_alphas = {id(module.log_alpha) for _, module in feature_gates(sharded)}
    dense = dict(in_backward_optimizer_filter(sharded.named_parameters()))
    parameters = [parameter for parameter in dense.values() if id(parameter) not in log_alphas]
    return Job(sharded, Adam(parameters, lr=config.train.learning_rate, fused=True), schema)
