"""Selections for the tests of the surgery."""

from __future__ import annotations

from torchrec_fmp.selection.selection import FeatureDecision, Selection


def select(**gates: float) -> Selection:
    """A selection with these gates; a feature with the gate 0 is dropped."""
    return Selection(
        {name: FeatureDecision(0.0, gate, gate > 0, "test") for name, gate in gates.items()}
    )
