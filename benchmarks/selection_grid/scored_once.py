"""`ScoredOnce`: the scorer that lets runs at several kept fractions share one scoring."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from torchrec_fmp.distributed.ranks import Ranks
from torchrec_fmp.embeddings.local_shards import LocalShard
from torchrec_fmp.reshard.tables import tables
from torchrec_fmp.scorers.pretraining import Pretraining
from torchrec_fmp.scorers.scorer import Scorer
from torchrec_fmp.selection.feature_scores import FeatureScores
from torchrec_fmp.training.job import Job
from torchrec_fmp.training.train import Progress


class ScoredOnce(Scorer):
    """Scores the first job that it is given, and brings every later one to where that one was left.

    A job of the same config and seed that is brought there prunes and continues, bit for bit, as if
    it had been scored itself. For one rank.

    Args:
        scorer: scores the first job.
        runs: that share the scoring. A single one may score several times, as a schedule of several
            prunes does.
    """

    def __init__(self, scorer: Scorer, runs: int) -> None:
        self._scorer = scorer
        self._runs = runs
        self._result: tuple[FeatureScores, _State] | None = None
        self.copy_seconds = 0.0
        """Wall time of copying the state in which the first job was left."""
        self.trained_rows = 0
        """Rows that were trained on for it."""
        self.forward_rows = 0
        """Rows that went through the model for it, in training or not."""

    def score(self, pretraining: Pretraining) -> FeatureScores:
        if self._runs == 1:
            return self._score(pretraining)
        if self._result is None:
            scores = self._score(pretraining)
            start = time.perf_counter()
            self._result = scores, _State.of(pretraining)
            self.copy_seconds = time.perf_counter() - start
        else:
            self._result[1].give(pretraining)
        return self._result[0]

    def _score(self, pretraining: Pretraining) -> FeatureScores:
        def count(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            self.forward_rows += len(arguments[0].labels)

        counter = pretraining.job.model.register_forward_pre_hook(count)
        scores = self._scorer.score(pretraining)
        counter.remove()
        self.trained_rows += pretraining.trained_rows
        return scores


@dataclass(frozen=True)
class _State:
    """Copies of all that a scoring changes.

    Args:
        tensors: weights, persistent buffers, and the states of the tables' optimizer.
        optimizer: the dense optimizer's state dict.
        random: of torch's CPU generator.
        trained_rows: of pretraining.
        progress: of pretraining.
    """

    tensors: dict[str, Tensor]
    optimizer: dict[str, Any]
    random: Tensor
    trained_rows: int
    progress: list[Progress]

    @staticmethod
    def of(pretraining: Pretraining) -> _State:
        job = pretraining.job
        return _State(
            {name: tensor.clone() for name, tensor in _tensors(job, pretraining.ranks)},
            copy.deepcopy(job.optimizer.state_dict()),
            torch.get_rng_state(),
            pretraining.trained_rows,
            list(pretraining.progress),
        )

    def give(self, pretraining: Pretraining) -> None:
        """Brings another job of the same kind into this state."""
        for name, tensor in _tensors(pretraining.job, pretraining.ranks):
            tensor.copy_(self.tensors[name])
        # Loading refers to tensors where it can, which the next job must not share.
        pretraining.job.optimizer.load_state_dict(copy.deepcopy(self.optimizer))
        torch.set_rng_state(self.random)
        pretraining.trained_rows = self.trained_rows
        pretraining.progress = list(self.progress)


def shards_of(job: Job, ranks: Ranks) -> Iterator[LocalShard]:
    """This rank's shards of the job's tables. Collective."""
    yield from tables(job.model, ranks.group, timedelta(minutes=1))


def _tensors(job: Job, ranks: Ranks) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in job.model.named_parameters():
        yield name, parameter.detach()
    # Other buffers, such as those of TorchRec's regrouping, are filled by the first forward.
    kept = job.model.state_dict()
    yield from ((name, buffer) for name, buffer in job.model.named_buffers() if name in kept)
    for shard in shards_of(job, ranks):
        for name, tensor in shard.tensors.items():
            yield f"{shard.table}/{shard.box}/{name}", tensor
