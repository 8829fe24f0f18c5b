"""Pretrainings of tiny models, for scorers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.datasets.utils import Batch

from tests.support.sequence_model import Case, SequenceModel, batches, shard
from torchrec_fmp.data.schema import Schema, SparseColumn
from torchrec_fmp.distributed.ranks import Ranks
from torchrec_fmp.gates.attach import attach_gates
from torchrec_fmp.loggers.jsonl import MetricsLog
from torchrec_fmp.run.config import load_config
from torchrec_fmp.run.pipeline import Pipeline
from torchrec_fmp.scorers.pretraining import Pretraining, PretrainingRows
from torchrec_fmp.training.job import Job


def this_rank() -> Ranks:
    group = dist.group.WORLD
    assert group is not None
    return Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), group)


def make_pretraining(config_path: str) -> Pretraining:
    """Pretraining of an untrained DLRM with open gates."""
    config, _ = load_config(config_path)
    ranks = this_rank()
    pipeline = Pipeline(config, ranks)
    job = pipeline._build(gated=True)
    return pipeline._pretraining(job)


class OnBatches(SequenceModel):
    """Takes batches, as backbones do."""

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        loss, logits = super().forward(batch.sparse_features)
        return loss, (loss.detach(), logits.detach(), batch.labels)


def sequence_pretraining() -> Pretraining:
    """Pretraining of a model whose bag collection and sequence collection share a feature."""
    torch.manual_seed(0)
    model = shard(Case(), attach_gates(OnBatches(bags=True)))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    features = [SparseColumn(name, 20) for name in "rsuv"]
    job = Job(model, torch.optim.SGD(parameters, lr=0.0), Schema("y", (), tuple(features)))

    def read(start: int, stop: int) -> Iterator[Batch]:
        for ids in batches((stop - start) // 6):
            yield Batch(torch.zeros(6, 0), ids, torch.ones(6))

    def read_validation(rows: int) -> Iterator[Batch]:
        return read(0, min(rows // dist.get_world_size(), 24))

    rows = PretrainingRows(read, read_validation, count=24, batch_size=6)
    return Pretraining(job, this_rank(), rows, 0, MetricsLog(None, 100))


def logits_of(pretraining: Pretraining, batch: Batch) -> Tensor:
    """Logits in evaluation."""
    model = pretraining.job.model
    model.eval()
    with torch.no_grad():
        _, (_, logits, _) = model(batch)
    return logits


def hooks_left(model: nn.Module) -> Sequence[str]:
    """Names of the modules that have hooks."""
    return [
        name
        for name, module in model.named_modules()
        if module._forward_hooks or module._forward_pre_hooks
    ]
