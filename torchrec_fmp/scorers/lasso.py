"""Coefficients of scikit-learn's linear model with an L1 penalty."""

from __future__ import annotations

from torchrec_fmp.scorers.pretraining import Pretraining
from torchrec_fmp.scorers.scorer import Scorer
from torchrec_fmp.scorers.tabular import Sample, check_rows, check_scikit_learn, scores_from_sample
from torchrec_fmp.selection.feature_scores import FeatureScores


class LassoScorer(Scorer):
    """|coefficient| of a feature when the Lasso predicts the label.

    Tibshirani 1996, "Regression shrinkage and selection via the lasso", as in ERASE
    (arXiv:2403.12660; Applied-Machine-Learning-Lab/ERASE, utils/utils.py, lasso), with its alpha.
    As in ERASE, an id counts as a number, so the score of a sparse feature depends on the order of
    its ids. Columns are scaled to a standard deviation of 1. Tibshirani assumes this; ERASE does
    not do it, so a coefficient there becomes smaller the more ids a table has. One id is drawn at
    random from each bag.

    Args:
        rows: number of pretraining rows to fit, over all ranks, in memory of rank 0; ERASE uses
            all rows.
        alpha: weight of the L1 norm.

    Raises:
        ValueError: if rows is below 1, alpha is not positive, or scikit-learn is missing.
    """

    def __init__(self, rows: int = 1_000_000, alpha: float = 1e-3) -> None:
        check_scikit_learn(self)
        if not alpha > 0:
            raise ValueError(f"alpha is {alpha}; it must be positive")
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
