"""One prune, behind all of pretraining."""

from __future__ import annotations

from torchrec_fmp.selection.schedules.schedule import Schedule


class OneShot(Schedule):
    """Prunes once, by all rows of pretraining."""

    def share(self, prune: int, keep: float) -> float:
        return keep
