"""How much a run depends on its seed: metrics, single predictions and selections over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from torchrec_fmp.metrics import Metrics
from torchrec_fmp.policies.selection import Selection
from torchrec_fmp.result import MODEL_NAMES, format_number


@dataclass(frozen=True)
class SeedRun:
    """What one seed's run gave.

    Args:
        seed: of the run.
        selection: its decisions.
        metrics: of the test split, by full, pruned and final.
        logits: (N,) fp32 for the test split, by full and final.
    """

    seed: int
    selection: Selection
    metrics: Mapping[str, Metrics]
    logits: Mapping[str, Tensor]


def consistency(decisions: Tensor) -> float:
    """How often two runs decide alike: the share of rows, mean over all pairs of runs.

    The consistency of "Assessing the Macro and Micro Effects of Random Seeds on Fine-Tuning Large
    Language Models" (arXiv:2503.07329), taken over all pairs.

    Args:
        decisions: (S, N) bool, S runs of N rows, both at least 1 and S at least 2.
    """
    runs = len(decisions)
    positive = decisions.sum(0).double()
    negative = runs - positive
    agreeing_pairs = (positive * (positive - 1) + negative * (negative - 1)) / 2
    return float(agreeing_pairs.mean()) / (runs * (runs - 1) / 2)


def prediction_deviation(probabilities: Tensor) -> float:
    """Standard deviation (of the sample) over runs of a row's prediction, mean over rows.

    Args:
        probabilities: (S, N), S at least 2.
    """
    return float(probabilities.double().std(0).mean())


def jaccard(kept: Sequence[frozenset[str]]) -> float:
    """Size of the intersection over that of the union, mean over all pairs.

    Args:
        kept: at least 2 sets, none empty.
    """
    pairs = list(combinations(kept, 2))
    return sum(len(one & other) / len(one | other) for one, other in pairs) / len(pairs)


def stability_of(runs: Sequence[SeedRun], labels: Tensor, world_size: int) -> dict[str, Any]:
    """The content of stability.json, as docs/run_directory.md says.

    Args:
        runs: at least 2, of the same features and test rows.
        labels: (N,) of the test rows, 0 or 1.
        world_size: of the runs.
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


def format_stability(stability: Mapping[str, Any]) -> str:
    """The table for people, of what `stability_of` gives."""
    seeds = f"test split, {len(stability['seeds'])} seeds"
    lines = [f"{seeds:<26} {'AUC':>8} {'sd':>8} {'NE':>8} {'sd':>8}"]
    for model, figures in stability["metrics"].items():
        spreads = [figures[metric][part] for metric in ("auc", "ne") for part in ("mean", "sd")]
        row = " ".join(f"{format_number(value, '.4f'):>8}" for value in spreads)
        lines.append(f"  {MODEL_NAMES[model]:<24} {row}")
    lines += ["", f"{'single predictions':<26} {'decided alike':>17} {'sd':>17}"]
    for model, figures in stability["predictions"].items():
        alike, deviation = figures["consistency"], figures["sd"]
        lines.append(f"  {MODEL_NAMES[model]:<24} {alike:>17.4f} {deviation:>17.4f}")
    selections = stability["selections"]
    kept, total = selections["features_kept"], selections["features_total"]
    different = selections["decided_differently"]
    lines += [
        "",
        f"features   {kept['mean']:.1f} of {total} kept, sd {kept['sd']:.1f}; "
        f"Jaccard index {selections['jaccard']:.3f}",
        f"  alike    {total - len(different)} of {total} in all seeds",
        f"  not      {', '.join(different) or 'none'}",
    ]
    return "\n".join(lines) + "\n"


def _agreement(logits: Tensor, threshold: float) -> dict[str, float]:
    """Of (S, N) logits."""
    probabilities = logits.double().sigmoid()
    return {
        "consistency": consistency(probabilities >= threshold),
        "sd": prediction_deviation(probabilities),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard deviation of the sample."""
    tensor = torch.tensor(values, dtype=torch.float64)
    return {"mean": float(tensor.mean()), "sd": float(tensor.std())}
