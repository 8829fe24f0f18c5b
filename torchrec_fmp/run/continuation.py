"""The start of training after the prune, and `Snapshot`: weights to rewind to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_fmp.embeddings.local_shards import (
    LocalShard,
    dense_tensors,
    local_shards,
    sharded_collections,
)
from torchrec_fmp.training.job import Job


@dataclass(frozen=True)
class ContinuationConfig:
    """The state that training continues from after the prune.

    Args:
        start: state to start from. `carried`: the weights and optimizer states that the prune has
            moved. `rewound`: the weights that the surviving parameters had after `rewind_steps`
            steps of pretraining, with new optimizer states. `reinitialized`: a newly initialized
            model of the kept features, under a new plan.
        rewind_steps: number of pretraining steps to rewind to; 0 means the initial weights.
        warmup_steps: number of steps over which the learning rates of dense parameters and tables
            rise linearly.
    """

    start: Literal["carried", "rewound", "reinitialized"] = "carried"
    rewind_steps: int = 0
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("rewind_steps", "warmup_steps"):
            if getattr(self, name) < 0:
                value = getattr(self, name)
                raise ValueError(f"continuation.{name} is {value}; it must be at least 0")
        if self.rewind_steps and self.start != "rewound":
            raise ValueError(
                f"continuation.rewind_steps is {self.rewind_steps}, but only start: rewound "
                f"reads it, and start is {self.start}. Set start to rewound, or remove rewind_steps"
            )


class Snapshot:
    """This rank's part of a model's weights, copied to host memory.

    For rewinding: after a cut, weights from early training can learn better than the final ones
    (Frankle et al. 2020, "Linear Mode Connectivity and the Lottery Ticket Hypothesis").

    Args:
        model: sharded model; its optimizer states are not copied.
    """

    def __init__(self, model: DistributedModelParallel) -> None:
        self._weights = [weight.to("cpu", copy=True) for weight in _weights(model)]

    @torch.no_grad()
    def restore(self, job: Job) -> None:
        """Restores the model's weights, and resets its optimizers to before their first step.

        Args:
            job: job with the snapshot's model, sharded as when the snapshot was taken.
        """
        for weight, copy in zip(_weights(job.model), self._weights, strict=True):
            weight.copy_(copy)
        job.optimizer.state.clear()
        for shard in _shards(job.model):
            if not shard.is_fused:
                continue
            for state in shard.states.values():
                state.zero_()
            shard.kernel.emb_module.set_optimizer_step(0)
            # Cached rows no longer match the table.
            shard.kernel.emb_module.reset_cache_states()


def _weights(model: DistributedModelParallel) -> Iterator[Tensor]:
    """Dense parameters, buffers and local shards of tables, always in the same order."""
    for tensor in dense_tensors(model).values():
        yield tensor.detach()
    for shard in _shards(model):
        yield shard.weight


def _shards(model: DistributedModelParallel) -> Iterator[LocalShard]:
    for collection in sharded_collections(model).values():
        yield from local_shards(collection)
