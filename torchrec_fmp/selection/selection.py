"""`Selection`: which features are kept, with reasons. Plain data, JSON, editable by hand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torchrec_fmp import paths


@dataclass(frozen=True)
class FeatureDecision:
    """The decision for one feature.

    Args:
        score: importance, from the scorer.
        gate: factor that scales a kept feature from now on, in [0, 1]; 0 for a dropped feature.
        kept: whether the feature is kept.
        reason: reason for the decision, in words.
        confidence: confidence in the decision, in [0, 1]; None if the scorer does not have it.
    """

    score: float
    gate: float
    kept: bool
    reason: str
    confidence: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.gate <= 1:
            raise ValueError(f"gate is {self.gate}; it must be in [0, 1]")
        if self.kept != (self.gate > 0):
            raise ValueError(
                f"kept is {self.kept} and gate is {self.gate}; "
                "a kept feature needs a gate above 0, and a dropped feature needs gate 0"
            )
        if self.confidence is not None and not 0 <= self.confidence <= 1:
            raise ValueError(f"confidence is {self.confidence}; it must be in [0, 1]")


@dataclass(frozen=True)
class Selection:
    """The decision for every feature, in the model's order."""

    features: Mapping[str, FeatureDecision]

    @property
    def kept(self) -> list[str]:
        return [name for name, decision in self.features.items() if decision.kept]

    @property
    def dropped(self) -> list[str]:
        return [name for name, decision in self.features.items() if not decision.kept]

    @property
    def gates(self) -> dict[str, float]:
        """Feature -> gate; 0 for dropped features."""
        return {name: decision.gate for name, decision in self.features.items()}

    @staticmethod
    def dropping(names: Iterable[str], reason: str = "named") -> Selection:
        """A selection that drops these features; others, which must have no gates, are unchanged.

        For a model without gates, when the features to drop are known from another source.
        """
        return Selection({name: FeatureDecision(0.0, 0.0, False, reason) for name in names})

    def describe(self) -> dict[str, dict[str, Any]]:
        """Plain data: one object per feature, by name."""
        return {name: asdict(decision) for name, decision in self.features.items()}

    @staticmethod
    def of(content: Mapping[str, Mapping[str, Any]], source: str = "selection") -> Selection:
        """Reads the output of `describe`, possibly edited.

        Args:
            content: plain data.
            source: file name for error messages.

        Raises:
            ValueError: if a decision is invalid; the message names the source and the feature.
        """
        features = {}
        for name, decision in content.items():
            try:
                features[name] = FeatureDecision(**decision)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{source}, feature {name!r}: {error}") from error
        return Selection(features)

    def to_json(self) -> str:
        """One JSON object per feature, by name."""
        return json.dumps(self.describe(), indent=2) + "\n"

    @staticmethod
    def from_json(text: str, source: str = "selection") -> Selection:
        """Reads the output of `to_json`, possibly edited.

        Args:
            text: JSON.
            source: file name for error messages.

        Raises:
            ValueError: if `text` is not a selection; the message names the source and the feature.
        """
        try:
            content = json.loads(text, object_pairs_hook=_unique)
        except ValueError as error:
            raise ValueError(f"{source} cannot be read: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{source}: expected one JSON object with a member for each feature")
        return Selection.of(content, source)

    def save(self, path: str) -> None:
        """Writes the JSON atomically."""
        with paths.write_atomically(path) as file:
            file.write(self.to_json())

    @staticmethod
    def load(path: str) -> Selection:
        """Reads a selection file.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is not a selection.
        """
        with paths.open_path(path) as file:
            return Selection.from_json(file.read(), source=path)

    def digest(self) -> str:
        """A hash that is equal for equal selections, on any rank and machine."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=16).hexdigest()


def _unique(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """Builds a JSON object; refuses duplicate names, which copying a line by hand easily leaves."""
    content = dict(members)
    if len(content) < len(members):
        names = [name for name, _ in members]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is given twice")
    return content
