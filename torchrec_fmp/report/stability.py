"""The table that shows how much a run depends on its seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchrec_fmp.report.text import MODEL_NAMES, format_number


def format_stability(stability: Mapping[str, Any]) -> str:
    """The output of `stability_of` as a table for people."""
    seeds = f"test split, {len(stability['seeds'])} seeds"
    lines = [f"{seeds:<35} {'AUC':>8} {'sd':>8} {'NE':>8} {'sd':>8}"]
    for model, figures in stability["metrics"].items():
        spreads = [figures[metric][part] for metric in ("auc", "ne") for part in ("mean", "sd")]
        row = " ".join(f"{format_number(value, '.4f'):>8}" for value in spreads)
        lines.append(f"  {MODEL_NAMES[model]:<33} {row}")
    lines += ["", f"{'single predictions':<35} {'decided alike':>17} {'sd':>17}"]
    for model, figures in stability["predictions"].items():
        alike, deviation = figures["consistency"], figures["sd"]
        lines.append(f"  {MODEL_NAMES[model]:<33} {alike:>17.4f} {deviation:>17.4f}")
    selections = stability["selections"]
    kept, total = selections["features_kept"], selections["features_total"]
    different = selections["decided_differently"]
    lines += [
        "",
        f"features   {kept['mean']:.1f} of {total} kept, sd {kept['sd']:.1f}; "
        f"Jaccard index {selections['jaccard']:.3f}",
        f"  alike    {total - len(different)} of {total} in all seeds",
        f"  differ   {', '.join(different) or 'none'}",
    ]
    return "\n".join(lines) + "\n"
