"""AUC, logloss and normalized entropy of a sharded model over all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.datasets.utils import Batch

from torchrec_fmp.data.auc import exact_auc
from torchrec_fmp.distributed.ranks import Ranks
from torchrec_fmp.embeddings.evaluation import evaluation

# Below 32,768 elements, where torch starts to copy in parallel. Gloo copies in a separate thread,
# whose OpenMP team would persist: with more such threads than cores, OpenMP stops spinning, and
# FBGEMM's backward pass of small batches then takes ten times as long.
_GATHERED_AT_ONCE = 16_384


@dataclass(frozen=True)
class Metrics:
    """Metrics of the predictions for a split.

    Args:
        auc: exact area under the ROC curve; NaN if the split has only one class.
        logloss: mean binary cross entropy in nats.
        ne: normalized entropy, logloss over the entropy of the mean label (He et al. 2014,
            "Practical lessons from predicting clicks on ads at Facebook"); NaN for one class.
    """

    auc: float
    logloss: float
    ne: float


@dataclass(frozen=True)
class Predictions:
    """A model's predictions for a split, in rank order, on every rank.

    Args:
        logits: (N,) fp32 logits, on CPU.
        labels: (N,) fp32 labels, 0 or 1, on CPU.
    """

    logits: Tensor
    labels: Tensor

    def metrics(self) -> Metrics:
        """See `metrics_of`."""
        return metrics_of(self.logits.double(), self.labels.double())


def evaluate(model: nn.Module, batches: Iterable[tuple[Batch, int]], ranks: Ranks) -> Metrics:
    """Metrics of `predict`'s predictions, with the same arguments. Collective."""
    return predict(model, batches, ranks).metrics()


def predict(model: nn.Module, batches: Iterable[tuple[Batch, int]], ranks: Ranks) -> Predictions:
    """Predictions for every rank's batches, with the model in evaluation mode.

    Collective. Logits and labels, 8 bytes per row, are gathered on every rank.

    Args:
        model: model that takes a batch and returns `(loss, (loss, logits, labels))`.
        batches: batches, each with its number of real rows; their number is the same on every rank.
        ranks: process group.
    """
    logits, labels = [], []
    with evaluation(model):
        for batch, real in batches:
            _, (_, batch_logits, batch_labels) = model(batch.to(ranks.device))
            logits.append(batch_logits[:real].float().cpu())
            labels.append(batch_labels[:real].float().cpu())
    return Predictions(_gather(torch.cat(logits), ranks), _gather(torch.cat(labels), ranks))


def metrics_of(logits: Tensor, labels: Tensor) -> Metrics:
    """Metrics of predictions.

    Args:
        logits: (N,) float64 logits.
        labels: (N,) float64 labels, 0 or 1.

    Raises:
        ValueError: if there are no rows, or a logit is not finite.
    """
    if logits.numel() == 0:
        raise ValueError("there are no rows to evaluate")
    if not bool(logits.isfinite().all()):
        raise ValueError("the model predicts values that are not finite: training has diverged")
    logloss = float(nn.functional.binary_cross_entropy_with_logits(logits, labels))
    share = float(labels.mean())
    if share in (0.0, 1.0):
        return Metrics(auc=math.nan, logloss=logloss, ne=math.nan)
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    return Metrics(auc=exact_auc(logits, labels), logloss=logloss, ne=logloss / entropy)


def _gather(values: Tensor, ranks: Ranks) -> Tensor:
    """Every rank's (n,) values concatenated, on every rank; n may differ between ranks."""
    count = torch.tensor([values.numel()], device=ranks.device)
    counts = [torch.zeros_like(count) for _ in range(ranks.world_size)]
    dist.all_gather(counts, count, group=ranks.group)
    longest = max(int(c) for c in counts)
    padded = torch.zeros(longest, device=ranks.device)
    padded[: values.numel()] = values.to(ranks.device)
    parts = [torch.zeros_like(padded) for _ in range(ranks.world_size)]
    for start in range(0, longest, _GATHERED_AT_ONCE):
        chunk = slice(start, start + _GATHERED_AT_ONCE)
        dist.all_gather([part[chunk] for part in parts], padded[chunk], group=ranks.group)
    return torch.cat([p[: int(c)] for p, c in zip(parts, counts, strict=True)]).cpu()
