"""How much a run depends on its seed: metrics, single predictions and selections over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from torchrec_fmp.selection.selection import Selection
from torchrec_fmp.training.metrics import Metrics


@dataclass(frozen=True)
class SeedRun:
    """The result of one seed's run.

    Args:
        seed: seed of the run.
        selection: decisions of the run.
        metrics: metrics on the test split, by full, pruned and final.
        logits: logits on the test split, (N,) fp32, by full and final.
    """

    seed: int
    selection: Selection
    metrics: Mapping[str, Metrics]
    logits: Mapping[str, Tensor]


def consistency(decisions: Tensor) -> float:
    """How often two runs make the same decision: the share of rows, mean over all pairs of runs.

    The consistency of "Assessing the Macro and Micro Effects of Random Seeds on Fine-Tuning Large
    Language Models" (arXiv:2503.07329), taken over all pairs.

    Args:
        decisions: decisions of S runs on N rows, (S, N) bool, S at least 2 and N at least 1.
    """
    runs = len(decisions)
    positive = decisions.sum(0).double()
    negative = runs - positive
    agreeing_pairs = (positive * (positive - 1) + negative * (negative - 1)) / 2
    return float(agreeing_pairs.mean()) / (runs * (runs - 1) / 2)


def prediction_deviation(probabilities: Tensor) -> float:
    """Standard deviation (of the sample) over runs of a row's prediction, mean over rows.

    Args:
        probabilities: predictions of S runs on N rows, (S, N), S at least 2.
    """
    return float(probabilities.double().std(0).mean())


def jaccard(kept: Sequence[frozenset[str]]) -> float:
    """Size of the intersection divided by the size of the union, mean over all pairs.

    Args:
        kept: sets of kept features, at least 2, none empty.
    """
    pairs = list(combinations(kept, 2))
    return sum(len(one & other) / len(one | other) for one, other in pairs) / len(pairs)


def stability_of(runs: Sequence[SeedRun], labels: Tensor, world_size: int) -> dict[str, Any]:
    """The content of stability.json, as docs/run_directory.md describes it.

    Args:
        runs: runs to compare, at least 2, with the same features and test rows.
        labels: labels of the test rows, (N,), 0 or 1.
        world_size: number of ranks of the runs.
    """
    threshold = float(labels.double().mean())
    kept = [frozenset(run.selection.kept) for run in runs]
    features = list(runs[0].selection.features)
    undecided = [name for name in features if len({name in names for names in kept}) > 1]
    return {
        "seeds": [run.seed for run in runs],
        "world_size": world_size,
        "test_rows": len(labels),
        "metrics": {
            model: {
                metric: _spread([getattr(run.metrics[model], metric) for run in runs])
                for metric in ("auc", "logloss", "ne")
            }
            for model in runs[0].metrics
        },
        "threshold": threshold,
        "predictions": {
            model: _agreement(torch.stack([run.logits[model] for run in runs]), threshold)
            for model in runs[0].logits
        },
        "selections": {
            "features_total": len(features),
            "features_kept": _spread([float(len(names)) for names in kept]),
            "jaccard": jaccard(kept),
            "decided_alike": 1 - len(undecided) / len(features),
            "decided_differently": undecided,
        },
        "runs": [
            {
                "seed": run.seed,
                "kept": run.selection.kept,
                "metrics": {name: asdict(figures) for name, figures in run.metrics.items()},
            }
            for run in runs
        ],
    }


def _agreement(logits: Tensor, threshold: float) -> dict[str, float]:
    """Consistency and standard deviation of (S, N) logits."""
    probabilities = logits.double().sigmoid()
    return {
        "consistency": consistency(probabilities >= threshold),
        "sd": prediction_deviation(probabilities),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard deviation of the sample."""
    tensor = torch.tensor(values, dtype=torch.float64)
    return {"mean": float(tensor.mean()), "sd": float(tensor.std())}
