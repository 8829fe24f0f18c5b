"""One prune, after all of pretraining."""

from __future__ import annotations

from torchrec_fmp.selection.schedules.schedule import Schedule


class OneShot(Schedule):
    """Prunes once, with scores from all pretraining rows."""

    def share(self, prune: int, keep: float) -> float:
        return keep
