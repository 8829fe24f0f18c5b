"""Replay a selection from a file, possibly edited by hand."""

from __future__ import annotations

from torchrec_fmp.selection.feature_scores import FeatureScores
from torchrec_fmp.selection.policies.policy import Policy
from torchrec_fmp.selection.selection import Selection


class FromFile(Policy):
    """Takes the decisions of a `selection.json`.

    Args:
        path: file to read, at once: before a job starts, not after it has pretrained.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not a selection.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._selection = Selection.load(path)

    def select(self, scores: FeatureScores) -> Selection:
        """The file's decisions, in the model's order.

        Raises:
            ValueError: if the file's features differ from the model's.
        """
        selection = self._selection
        missing = [name for name in scores.scores if name not in selection.features]
        unknown = [name for name in selection.features if name not in scores.scores]
        if missing or unknown:
            raise ValueError(
                f"{self.path} does not fit the model: no decision for {missing}, "
                f"and decisions for features that the model does not have: {unknown}"
            )
        return Selection({name: selection.features[name] for name in scores.scores})
