"""`result.json`: the result of a run."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torchrec_fmp.distributed.ranks import Ranks
from torchrec_fmp.distributed.versions import installed_versions
from torchrec_fmp.run.config import RunConfig
from torchrec_fmp.run.outcome import Outcome


def result_of(outcome: Outcome, config: RunConfig, ranks: Ranks) -> dict[str, Any]:
    """The content of result.json, as docs/run_directory.md describes it."""
    selection = outcome.selection
    truth = config.data.truth
    metrics = {name: asdict(figures) for name, figures in outcome.metrics.items()}
    progress = outcome.progress
    step_names = {"full": "full", "gated": "pretrain", "pruned": "continue"}
    return {
        "features_total": len(selection.features),
        "features_kept": len(selection.kept),
        "kept": selection.kept,
        "dropped": selection.dropped,
        "planted": asdict(truth) if truth else None,
        "metrics": {name: metrics.get(name) for name in ("full", "pruned", "final")},
        "bytes": dict(zip(("before", "after"), outcome.table_bytes, strict=True)),
        "parameters": dict(zip(("before", "after"), outcome.parameters, strict=True)),
        "step_ms": {
            name: progress[phase].step_ms if phase in progress else None
            for name, phase in step_names.items()
        },
        "seconds": {
            phase: outcome.seconds.get(phase) for phase in ("full", "pretrain", "prune", "continue")
        },
        "samples": {phase: progress[phase].samples for phase in ("pretrain", "continue")},
        "input_share": {phase: figures.input_share for phase, figures in progress.items()},
        "replaced": [
            {"column": column, "problem": problem, "count": count}
            for (column, problem), count in sorted(outcome.replaced.items())
        ],
        "parity_max_abs": outcome.parity_max_abs,
        "world_size": ranks.world_size,
        "seed": config.seed,
        "versions": {name: v for name, v in installed_versions().items() if v is not None},
    }
