"""`Snapshot`: a model's weights at one time, to go back to."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_fmp.job import Job
from torchrec_fmp.pruning import dense_tensors
from torchrec_fmp.reshard.local_shards import LocalShard, local_shards, sharded_collections


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
