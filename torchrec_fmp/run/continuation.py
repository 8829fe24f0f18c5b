"""What training continues from after the prune, and `Snapshot`: weights to go back to."""

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
    """What training goes on from after the prune.

    Args:
        start: `carried`, the weights and optimizer states that the prune has moved; `rewound`, the
            weights that the surviving parameters had after `rewind_steps` steps of pretraining,
            with new optimizer states; `reinitialized`, a newly initialized model of the features
            that stay, under a plan of its own.
        rewind_steps: 0 are the initial weights.
        warmup_steps: over which the learning rates rise linearly, of dense parameters and tables.
    """

    start: Literal["carried", "rewound", "reinitialized"] = "carried"
    rewind_steps: int = 0
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("rewind_steps", "warmup_steps"):
            if getattr(self, name) < 0:
                value = getattr(self, name)
                raise ValueError(f"continuation.{name} is {value}, it must be at least 0")
        if self.rewind_steps and self.start != "rewound":
            raise ValueError(
                f"continuation.rewind_steps is {self.rewind_steps}, which only start: rewound "
                f"reads, and start is {self.start}"
            )


class Snapshot:
    """What this rank holds of a model's weights, copied to host memory.

    For rewinding: after a cut, the weights of early in training can learn better than those of its
    end (Frankle et al. 2020, "Linear Mode Connectivity and the Lottery Ticket Hypothesis").

    Args:
        model: sharded; its optimizers' states are not copied.
    """

    def __init__(self, model: DistributedModelParallel) -> None:
        self._weights = [weight.to("cpu", copy=True) for weight in _weights(model)]

    @torch.no_grad()
    def restore(self, job: Job) -> None:
        """Gives the model its weights back, and its optimizers the states of before any step.

        Args:
            job: with the model that the snapshot was taken of, sharded as it was then.
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
            # What a cache has of the table is no longer what the table has.
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
