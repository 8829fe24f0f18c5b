"""A plot of the AUC over the kept fraction, of the rows that the grid has measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from .report import Group, groups_of
from .settings import OURS, SCORERS

# Drawn over the others.
_HIGHLIGHTED = {OURS: "tab:red", "random": "black"}


def plot(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """A panel for each data set and backbone: mean AUC difference to full, by kept fraction."""
    groups = groups_of(rows)
    columns = list(dict.fromkeys(data for data, _ in groups))
    lines = list(dict.fromkeys(backbone for _, backbone in groups))
    size = (4.5 * len(columns), 4 * len(lines))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(lines), len(columns), squeeze=False)
    for (data, backbone), group in groups.items():
        panel = axes[lines.index(backbone)][columns.index(data)]
        panel.set_title(f"{data}, {backbone}")
        panel.set_xlabel("share of the features kept")
        panel.set_ylabel("AUC, final less full")
        panel.axhline(0, color="grey", linewidth=0.5)
        for scorer in SCORERS:
            if scorer in group.scorers:
                _line(panel, group, scorer)
        panel.set_xticks([1.0, *group.fractions])
        panel.invert_xaxis()
        panel.legend(fontsize=6, loc="lower left", ncols=2)
    save(figure, out)


def save(figure: Figure, out: Path) -> None:
    """Writes an SVG file, without a date and random ids: the same figure gives the same file."""
    with matplotlib.rc_context({"svg.hashsalt": "torchrec_fmp"}):
        figure.savefig(out, format="svg", metadata={"Date": None})


def _line(panel: Any, group: Group, scorer: str) -> None:
    color = _HIGHLIGHTED.get(scorer)
    estimates = [group.to_full(scorer, k, "auc") for k in group.fractions]
    points = [(k, e.mean) for k, e in zip(group.fractions, estimates, strict=True) if e.count]
    panel.plot(
        *zip((1.0, 0.0), *points, strict=True),
        color=color,
        marker=".",
        linewidth=2 if color else 0.8,
        zorder=3 if color else 2,
        label=scorer,
    )
