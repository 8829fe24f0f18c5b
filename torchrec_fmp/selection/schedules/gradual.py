"""Several prunes, each of which keeps the same share of the remaining features."""

from __future__ import annotations

from torchrec_fmp.selection.schedules.schedule import Schedule


class Gradual(Schedule):
    """Scores and prunes several times, each time on its part of the pretraining rows.

    Prune r of n keeps keep^(r / n) of all features, and the last prune keeps `keep` of them: the
    same share each time, as in the iterative pruning of Frankle and Carbin 2019, "The Lottery
    Ticket Hypothesis" (arXiv:1803.03635, section 2), except that training continues from the
    current weights. Scoring the remaining features again is the recursive feature elimination of
    Guyon et al. 2002, "Gene Selection for Cancer Classification using Support Vector Machines": a
    feature may matter only once another feature, such as its copy, is dropped.

    Args:
        prunes: number of prunes; each scores on 1 / prunes of the pretraining rows.

    Raises:
        ValueError: if `prunes` is not positive.
    """

    def __init__(self, prunes: int) -> None:
        if prunes < 1:
            raise ValueError(f"the number of prunes is {prunes}; it must be at least 1")
        self.prunes = prunes

    def share(self, prune: int, keep: float) -> float:
        return keep if self.is_last(prune) else keep ** (prune / self.prunes)
