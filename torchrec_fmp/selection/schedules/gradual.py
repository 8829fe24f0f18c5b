"""Several prunes, each of which leaves the same share of what it finds."""

from __future__ import annotations

from torchrec_fmp.selection.schedules.schedule import Schedule


class Gradual(Schedule):
    """Scores and prunes several times, each on its part of the rows of pretraining.

    Prune r of n leaves keep^(r / n) of all features, where the last one leaves `keep` of them:
    the same share each time, as the iterative pruning of Frankle and Carbin 2019, "The Lottery
    Ticket Hypothesis" (arXiv:1803.03635, section 2), though training goes on from the weights that
    it has. Scoring again what is left is the recursive feature elimination of Guyon et al. 2002,
    "Gene Selection for Cancer Classification using Support Vector Machines": a feature may matter
    only once another one has gone, such as its copy.

    Args:
        prunes: number of them; each scores by 1 / prunes of the rows of pretraining.

    Raises:
        ValueError: if it is not positive.
    """

    def __init__(self, prunes: int) -> None:
        if prunes < 1:
            raise ValueError(f"the number of prunes is {prunes}, it must be at least 1")
        self.prunes = prunes

    def share(self, prune: int, keep: float) -> float:
        return keep if self.is_last(prune) else keep ** (prune / self.prunes)
