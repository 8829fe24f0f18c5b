"""`RunState`: the progress of a run and its measurements so far, as plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torchrec_fmp.selection.costs import TableCost
from torchrec_fmp.selection.selection import Selection
from torchrec_fmp.training.metrics import Metrics
from torchrec_fmp.training.train import Progress

Phase = Literal["full", "pretrain", "prune", "continue", "done"]


@dataclass
class RunState:
    """Everything about a run that changes, except tensors.

    Args:
        phase: phase under way; `full` is the reference's training.
        prunes: number of prunes done.
        rows: phase -> number of rows that each rank has trained on, over all prunes.
        selections: decisions of each prune, over all features of the full model.
        manifests: record of each prune, from `Manifest.describe`.
        metrics: metrics on the test split, by full, pruned and final.
        progress: phase -> progress of each part; a phase has a part for each prune.
        seconds: wall time by phase: full, pretrain, prune and continue, without evaluations.
        costs: unit -> feature -> cost in the full model; every prune's penalty uses them.
        table_costs: table costs in the full model, which every prune's policy uses; None if not
            priced.
        replaced: (column, problem) -> bad values replaced in all passes, over all ranks.
    """

    phase: Phase = "full"
    prunes: int = 0
    rows: Counter[str] = field(default_factory=Counter)
    selections: list[Selection] = field(default_factory=list)
    manifests: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Metrics] = field(default_factory=dict)
    progress: dict[str, list[Progress]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    costs: dict[str, Mapping[str, float]] = field(default_factory=dict)
    table_costs: list[TableCost] | None = None
    replaced: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def selection(self) -> Selection | None:
        """The decisions of the last prune; None before the first."""
        return self.selections[-1] if self.selections else None

    def describe(self) -> dict[str, Any]:
        """The whole state as plain data, ready for JSON."""
        return {
            "phase": self.phase,
            "prunes": self.prunes,
            "rows": dict(self.rows),
            "selections": [selection.describe() for selection in self.selections],
            "manifests": self.manifests,
            "metrics": {name: asdict(figures) for name, figures in self.metrics.items()},
            "progress": {
                phase: [asdict(part) for part in parts] for phase, parts in self.progress.items()
            },
            "seconds": dict(self.seconds),
            "costs": {unit: dict(costs) for unit, costs in self.costs.items()},
            "table_costs": self.table_costs and [asdict(cost) for cost in self.table_costs],
            "replaced": [[*key, count] for key, count in self.replaced.items()],
        }

    @staticmethod
    def of(content: Mapping[str, Any]) -> RunState:
        """Reads the output of `describe`, after a round trip through JSON or without one."""
        table_costs = content["table_costs"]
        return RunState(
            phase=content["phase"],
            prunes=content["prunes"],
            rows=Counter(content["rows"]),
            selections=[Selection.of(selection) for selection in content["selections"]],
            manifests=list(content["manifests"]),
            metrics={name: Metrics(**figures) for name, figures in content["metrics"].items()},
            progress={
                phase: [Progress(**part) for part in parts]
                for phase, parts in content["progress"].items()
            },
            seconds=dict(content["seconds"]),
            costs=dict(content["costs"]),
            table_costs=table_costs
            and [TableCost(tuple(cost["features"]), cost["amount"]) for cost in table_costs],
            replaced=Counter({(name, what): n for name, what, n in content["replaced"]}),
        )
