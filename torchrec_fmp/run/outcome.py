"""`Outcome`: everything that a run measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchrec_fmp.run.state import RunState
from torchrec_fmp.selection.selection import Selection
from torchrec_fmp.training.metrics import Metrics
from torchrec_fmp.training.train import Progress, total_progress


@dataclass(frozen=True)
class Outcome:
    """Everything that a finished run measured; a run without a reference has no `full` figures.

    Args:
        state: final state of the run.
    """

    state: RunState

    @property
    def selection(self) -> Selection:
        """The decision on every feature: from the prune that dropped it, or from the last prune."""
        return self.state.selections[-1]

    @property
    def metrics(self) -> Mapping[str, Metrics]:
        """Metrics on the test split, by full, pruned and final."""
        return self.state.metrics

    @property
    def progress(self) -> dict[str, Progress]:
        """Training progress, by full, pretrain and continue, over all prunes."""
        return {phase: total_progress(parts) for phase, parts in self.state.progress.items()}

    @property
    def seconds(self) -> Mapping[str, float]:
        """Wall time by phase: full, pretrain, prune and continue, without evaluations."""
        return self.state.seconds

    @property
    def replaced(self) -> Counter[tuple[str, str]]:
        """(column, problem) -> number of bad values replaced in all passes, over all ranks."""
        return self.state.replaced

    @property
    def table_bytes(self) -> tuple[int, int]:
        """Bytes of all embedding tables, before the first prune and after the last."""
        return self._first_and_last("table_bytes")

    @property
    def parameters(self) -> tuple[int, int]:
        """Parameters of the whole model, before the first prune and after the last."""
        return self._first_and_last("parameters")

    @property
    def parity_max_abs(self) -> float:
        """Largest absolute difference of the outputs, over all prunes and ranks."""
        return max(manifest["parity_max_abs"] or 0.0 for manifest in self.state.manifests)

    def _first_and_last(self, name: str) -> tuple[Any, Any]:
        manifests = self.state.manifests
        return manifests[0][name]["before"], manifests[-1][name]["after"]
