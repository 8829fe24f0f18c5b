"""Pretraining rows as one column per feature, for scorers that use data without the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.datasets.utils import Batch

from torchrec_fmp.distributed.agreement import all_or_none, broadcast_text
from torchrec_fmp.scorers.features import features_of, scores_of
from torchrec_fmp.scorers.learning import generator
from torchrec_fmp.scorers.pretraining import Pretraining
from torchrec_fmp.selection.feature_scores import FeatureScores

# Id of an empty bag.
EMPTY = -1


@dataclass(frozen=True)
class Sample:
    """Rows of all ranks with one value per feature.

    Shapes: N rows, D dense columns, F sparse features.

    Args:
        labels: (N,) bool labels.
        dense: names of the dense columns.
        sparse: names of the sparse features.
        values: (N, D) float32 values of the dense columns.
        ids: (N, F) int64 ids of the sparse features: one id of each bag, drawn at random, or
            `EMPTY` for an empty bag.
    """

    labels: npt.NDArray[np.bool_]
    dense: tuple[str, ...]
    sparse: tuple[str, ...]
    values: npt.NDArray[np.float32]
    ids: npt.NDArray[np.int64]

    @property
    def features(self) -> tuple[str, ...]:
        """Features of the columns of `matrix`."""
        return self.dense + self.sparse

    @property
    def matrix(self) -> npt.NDArray[np.float64]:
        """(N, D + F) dense values, then ids; the order of ids has no meaning."""
        return np.hstack([self.values.astype(np.float64), self.ids])


Importances = Callable[[Sample, int], Mapping[str, float]]


def scores_from_sample(
    pretraining: Pretraining, rows: int, importances: Importances
) -> FeatureScores:
    """Scores computed on rank 0 from the first pretraining rows. Collective.

    The open model is then trained on all pretraining rows, as with other scorers, so that scorers
    compare at equal samples.

    Args:
        pretraining: pretraining whose rows are read.
        rows: number of rows over all ranks, rounded up to whole batches, or all if there are fewer.
        importances: function from a sample and the run's seed to feature -> score; called on
            rank 0.

    Raises:
        ValueError: on rank 0, if all labels are equal; the other ranks raise RuntimeError.
    """
    ranks, model = pretraining.ranks, pretraining.job.model
    sample = gathered(pretraining, rows)
    text = None
    with all_or_none("scoring features", ranks.group):
        if sample is not None:
            if sample.labels.all() or not sample.labels.any():
                raise ValueError(
                    f"all {len(sample.labels)} rows of pretraining that the scorer reads have the "
                    "same label, so features cannot be scored by it. Give the scorer more rows"
                )
            text = json.dumps(importances(sample, pretraining.seed))
    found = json.loads(broadcast_text(text, ranks.group, ranks.device))
    pretraining.train()
    values = [found[feature] for feature in features_of(model)]
    return scores_of(model, torch.tensor(values, dtype=torch.float64))


def gathered(pretraining: Pretraining, rows: int) -> Sample | None:
    """The first pretraining rows, gathered on rank 0 in rank order; None on other ranks.

    Collective.

    Args:
        pretraining: pretraining whose rows are read.
        rows: number of rows over all ranks, rounded up to whole batches, or all if there are fewer.
    """
    ranks = pretraining.ranks
    steps = min(-(-rows // (pretraining.batch_size * ranks.world_size)), pretraining.steps)
    labels, dense, ids = [], [], []
    sparse: tuple[str, ...] = ()
    for step, batch in enumerate(pretraining.batches(steps)):
        sparse = tuple(batch.sparse_features.keys())
        labels.append(batch.labels.cpu().numpy() > 0)
        dense.append(batch.dense_features.cpu().numpy())
        ids.append(drawn_ids(batch, generator(pretraining.seed, step, ranks)).cpu().numpy())
    mine = tuple(np.concatenate(part) for part in (labels, dense, ids))
    parts = [mine] * ranks.world_size if ranks.speaks else None
    dist.gather_object(mine, parts, dst=dist.get_global_rank(ranks.group, 0), group=ranks.group)
    if parts is None:
        return None
    all_labels, all_dense, all_ids = map(np.concatenate, zip(*parts, strict=True))
    return Sample(all_labels, pretraining.job.schema.dense, sparse, all_dense, all_ids)


def check_rows(rows: int) -> int:
    """Returns a scorer's configured number of rows.

    Raises:
        ValueError: if it is below 1.
    """
    if rows < 1:
        raise ValueError(f"rows is {rows}; it must be at least 1")
    return rows


def check_scikit_learn(scorer: object) -> None:
    """Raises ValueError if scikit-learn, which the scorer needs, is not installed."""
    if find_spec("sklearn") is None:
        raise ValueError(
            f"{type(scorer).__name__} needs scikit-learn: pip install 'torchrec-fmp[scorers]'"
        )


def drawn_ids(batch: Batch, noise: torch.Generator) -> Tensor:
    """(B, F) int64, one id of each bag, drawn at random; `EMPTY` for an empty bag."""
    bags = batch.sparse_features
    lengths = bags.lengths()
    uniform = torch.rand(len(lengths), generator=noise, device=lengths.device, dtype=torch.float64)
    # An empty last bag starts past the last id.
    ids = torch.cat([bags.values(), bags.values().new_full((1,), EMPTY)])
    drawn = ids[bags.offsets()[:-1] + (uniform * lengths).long()]
    return drawn.where(lengths > 0, EMPTY).view(len(bags.keys()), -1).T
