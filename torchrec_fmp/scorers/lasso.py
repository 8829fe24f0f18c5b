"""Coefficients of a linear model with an L1 penalty, of scikit-learn."""

from __future__ import annotations

from torchrec_fmp.scorers.pretraining import Pretraining
from torchrec_fmp.scorers.scorer import Scorer
from torchrec_fmp.scorers.tabular import Sample, check_rows, check_scikit_learn, scores_from_sample
from torchrec_fmp.selection.feature_scores import FeatureScores


class LassoScorer(Scorer):
    """|coefficient| of a feature in the Lasso's regression of the label.

    Tibshirani 1996, "Regression shrinkage and selection via the lasso", as in ERASE
    (arXiv:2403.12660; Applied-Machine-Learning-Lab/ERASE, utils/utils.py, lasso), with its alpha.
    As there, an id counts as a number, so a sparse feature scores what its ids' order says. Columns
    are scaled to a standard deviation of 1, as Tibshirani assumes and ERASE does not: there,
    a coefficient is the smaller the more ids a table has. Of a bag, one id is drawn at random.

    Args:
        rows: of pretraining to fit, over all ranks, in memory of rank 0; ERASE takes all.
        alpha: weight of the L1 norm.

    Raises:
        ValueError: if rows is below 1, alpha is not positive, or scikit-learn is missing.
    """

    def __init__(self, rows: int = 1_000_000, alpha: float = 1e-3) -> None:
        check_scikit_learn(self)
        if not alpha > 0:
            raise ValueError(f"alpha is {alpha}, it must be positive")
        self.rows = check_rows(rows)
        self.alpha = alpha

    def score(self, pretraining: Pretraining) -> FeatureScores:
        return scores_from_sample(pretraining, self.rows, self._importances)

    def _importances(self, sample: Sample, seed: int) -> dict[str, float]:
        from sklearn.linear_model import Lasso
        from sklearn.preprocessing import StandardScaler

        scaled = StandardScaler().fit_transform(sample.matrix)
        lasso = Lasso(alpha=self.alpha).fit(scaled, sample.labels)
        return dict(zip(sample.features, abs(lasso.coef_).tolist(), strict=True))
