"""`Outcome`: everything that a run measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torchrec_fmp.manifest import Manifest
from torchrec_fmp.metrics import Metrics
from torchrec_fmp.policies.selection import Selection
from torchrec_fmp.train import Progress


@dataclass(frozen=True)
class Outcome:
    """Everything that a run measured; the `full` ones are of the reference model, None without it.

    Args:
        selection: the decisions on all features: of the prune that dropped one, or of the last.
        manifests: what each prune did.
        metrics: of the test split, by full, pruned and final.
        progress: of training, by full, pretrain and continue.
        seconds: wall time by phase: full, pretrain, prune and continue, without evaluations; over
            all prunes.
        replaced: (column, problem) -> bad values replaced in all reading, over all ranks.
    """

    selection: Selection
    manifests: Sequence[Manifest]
    metrics: dict[str, Metrics] = field(default_factory=dict)
    progress: dict[str, Progress] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    replaced: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def table_bytes(self) -> tuple[int, int]:
        """Of all embedding tables, before the first prune and after the last."""
        return self.manifests[0].table_bytes[0], self.manifests[-1].table_bytes[1]

    @property
    def parameters(self) -> tuple[int, int]:
        """Of the whole model, before the first prune and after the last."""
        return self.manifests[0].parameters[0], self.manifests[-1].parameters[1]

    @property
    def parity_max_abs(self) -> float:
        """Max abs difference of the outputs, over all prunes and ranks."""
        return max(manifest.parity_max_abs or 0.0 for manifest in self.manifests)
