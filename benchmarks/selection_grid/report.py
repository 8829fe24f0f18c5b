"""Compares the rows of a grid and writes the comparison as Markdown."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any

from .cell import FULL
from .figures import Estimate, area, jaccard, paired, spearman
from .settings import OURS, SCORERS, STRONG

_Row = Mapping[str, Any]
_Cost = Callable[[_Row], float]
# Suffix of the commit in rows of earlier grids that ran with uncommitted changes.
_DIRTY = "-dirty"
_INTRODUCTION = f"""\
# Feature selectors compared

Each scorer ranks the features on the same pretraining rows. The best features are kept, the model
is pruned, and training continues. All accuracy figures are for the test split. "Full" is the
unpruned model, trained once on all rows.

- Differences are paired by seed: mean ± half of the 95% confidence interval (Student's t), with the
  standard deviation in parentheses; bold where the interval excludes 0.
- Area: the AUC difference to full, integrated over the kept fraction by trapezoids, with 0 at 1;
  higher is better.
- The best other scorer has the largest mean, which is partly chance.
- Bytes, wall times and rows are relative to full. Selection time is from the choice of rows to the
  scores; total time adds the prune and the continued training. Rows are counted until the features
  are scored: rows trained on, and rows that went forward through the model, in training or not.
- Spearman and Jaccard: mean over pairs of seeds, for scores and for kept features.
- Planted signals are the features whose removal lowers the true logit's AUC by more than
  {STRONG:g}. Recall is the share of planted signals that is kept, precision their share of the kept
  features.
"""


class Group:
    """The rows of one data set and backbone."""

    def __init__(self, rows: Iterable[_Row]) -> None:
        self._rows: dict[tuple[str, float], dict[int, _Row]] = {}
        for row in rows:
            self._rows.setdefault((row["scorer"], row["fraction"]), {})[row["seed"]] = row
        self.full = self._rows.get((FULL, 1.0), {})
        self.scorers = [*dict.fromkeys(name for name, _ in self._rows if name != FULL)]
        self.fractions = sorted({k for name, k in self._rows if name != FULL}, reverse=True)
        self.has_truth = any(
            row["noise_dropped"] is not None
            for rows in self._rows.values()
            for row in rows.values()
        )

    def rows(self, scorer: str, fraction: float) -> Mapping[int, _Row]:
        """Seed -> row."""
        return self._rows.get((scorer, fraction), {})

    def values(self, scorer: str, fraction: float, figure: str) -> dict[int, float]:
        """Seed -> figure."""
        rows = self.rows(scorer, fraction)
        return {seed: row[figure] for seed, row in rows.items() if row[figure] is not None}

    def to_full(self, scorer: str, fraction: float, figure: str) -> Estimate:
        full = {seed: row[figure] for seed, row in self.full.items()}
        return paired(self.values(scorer, fraction, figure), full)

    def ratio(
        self,
        scorer: str,
        fraction: float,
        cost: Callable[[_Row], float],
        of: Callable[[_Row], float],
    ) -> str:
        """Mean over seeds of a cost, relative to a cost of the full model."""
        rows = self.rows(scorer, fraction)
        pairs = [(row, self.full[seed]) for seed, row in rows.items() if seed in self.full]
        return _number(_mean(cost(row) / of(full) for row, full in pairs), ".2f")

    def times(self, scorer: str, fraction: float) -> list[str]:
        """Of the selection and of all phases, relative to the full model's."""
        costs: list[_Cost] = [itemgetter("selection_seconds"), total_seconds]
        return [self.ratio(scorer, fraction, cost, total_seconds) for cost in costs]

    def area(self, scorer: str) -> Estimate:
        """Over the seeds that have every fraction."""
        by_fraction = {k: self.values(scorer, k, "auc") for k in self.fractions}
        seeds = [s for s in self.full if all(s in values for values in by_fraction.values())]
        return Estimate.of(
            [
                area({k: by_fraction[k][s] - self.full[s]["auc"] for k in self.fractions})
                for s in seeds
            ]
        )


def total_seconds(row: _Row) -> float:
    """Wall time of all phases, without evaluations."""
    return row["selection_seconds"] + row["prune_seconds"] + row["continue_seconds"]


def report(rows: Sequence[_Row]) -> str:
    """The whole text.

    Raises:
        ValueError: if a scorer was run with different settings on the same data and backbone.
    """
    _check_settings(rows)
    groups = groups_of(rows)
    sections = [_INTRODUCTION, _origin(rows), f"## Summary of {OURS}\n", _summary(groups)]
    for (data, backbone), group in groups.items():
        sections += [f"## {data}, {backbone}\n", *_sections(group)]
    return "\n".join(sections)


def groups_of(rows: Sequence[_Row]) -> dict[tuple[str, str], Group]:
    """Data set and backbone -> their rows."""
    grouped: dict[tuple[str, str], list[_Row]] = {}
    for row in rows:
        grouped.setdefault((row["data"], row["backbone"]), []).append(row)
    return {name: Group(members) for name, members in grouped.items()}


def _check_settings(rows: Sequence[_Row]) -> None:
    digests: dict[tuple[str, str, str], str] = {}
    for row in rows:
        where = (row["data"], row["backbone"], row["scorer"])
        if digests.setdefault(where, row["config_digest"]) != row["config_digest"]:
            raise ValueError(
                f"{'-'.join(where)} was run with different settings, which cannot be compared. "
                "Run the grid again with all its seeds, or remove the older files in rows/"
            )


def _origin(rows: Sequence[_Row]) -> str:
    """The commits and machines that the rows were measured with."""
    commits = Counter(row["commit"] for row in rows)
    clean = sorted(commit for commit in commits if not commit.endswith(_DIRTY))
    bases = sorted(commit.removesuffix(_DIRTY) for commit in commits if commit not in clean)
    machines = {
        f"{row['device']}, threads per cell: {row['threads']}, cells at a time: {row['jobs']}"
        for row in rows
    }
    lines = [f"{len(rows)} rows; {'; '.join(sorted(machines))}."]
    if clean:
        count = sum(commits[commit] for commit in clean)
        lines.append(f"{count} rows were measured at commit {', '.join(clean)}.")
    if bases:
        count = len(rows) - sum(commits[commit] for commit in clean)
        lines.append(
            f"{count} rows cannot be reproduced exactly: they were measured with uncommitted "
            f"changes on top of commit {', '.join(bases)}. `benchmarks/selection.py run --again` "
            "replaces them, and refuses uncommitted changes."
        )
    return "\n".join(lines) + "\n"


def _summary(groups: Mapping[tuple[str, str], Group]) -> str:
    """Our scorer against the full model, the best other one by mean AUC, and random features."""
    header = [
        *("data", "backbone", "kept", "AUC minus full", "best other scorer"),
        *("AUC minus best other", "AUC minus random", "selection time", "total time"),
    ]
    lines = (
        [data, backbone, *line]
        for (data, backbone), group in groups.items()
        for line in _in_short(group)
    )
    return _table(header, lines)


def _in_short(group: Group) -> Iterator[list[str]]:
    """A line for each fraction that our scorer and another one have."""
    others = [name for name in group.scorers if name in SCORERS and name != OURS]
    for fraction in group.fractions:
        ours = group.values(OURS, fraction, "auc")
        to_full = {name: group.to_full(name, fraction, "auc").mean for name in others}
        known = [name for name in others if not math.isnan(to_full[name])]
        if not ours or not known:
            continue
        best = max(known, key=lambda name: to_full[name])
        less = [paired(ours, group.values(name, fraction, "auc")) for name in (best, "random")]
        yield [
            f"{fraction:.0%}",
            _difference(group.to_full(OURS, fraction, "auc")),
            f"{best}, {to_full[best]:+.4f}",
            *map(_difference, less),
            *group.times(OURS, fraction),
        ]


def _sections(group: Group) -> Iterator[str]:
    yield _full_line(group)
    if not group.scorers:
        return
    yield _overview(group)
    if group.has_truth:
        yield _truth(group)
    for fraction in group.fractions:
        yield f"### {fraction:.0%} kept\n"
        yield _against_full(group, fraction)


def _full_line(group: Group) -> str:
    rows = group.full.values()
    auc = Estimate.of([row["auc"] for row in rows])
    logloss, ne, table_bytes = (
        _mean(row[figure] for row in rows) for figure in ("logloss", "ne", "table_bytes_before")
    )
    return (
        f"Full: AUC {auc.mean:.4f} (sd {_number(auc.deviation, '.4f')}), logloss {logloss:.4f}, "
        f"NE {ne:.4f}, {_mean(map(total_seconds, rows)):.1f} s, {table_bytes:,.0f} bytes of "
        f"tables, {auc.count} seeds.\n"
    )


def _overview(group: Group) -> str:
    """All fractions of a scorer in one line, the largest area first."""
    areas = {scorer: group.area(scorer) for scorer in group.scorers}
    lines = [
        [
            scorer,
            _difference(areas[scorer]),
            _number(_spearman(group, scorer), ".2f"),
            *(_number(_jaccard(group, scorer, k), ".2f") for k in group.fractions),
        ]
        for scorer in sorted(group.scorers, key=lambda name: _last_if_nan(areas[name].mean))
    ]
    jaccards = [f"Jaccard {k:.0%}" for k in group.fractions]
    return _table(["scorer", "area over kept", "Spearman", *jaccards], lines)


def _truth(group: Group) -> str:
    """How much of the planted truth each scorer has found."""
    figures = {"recall": "signal_recall", "precision": "signal_precision"}
    figures["noise dropped"] = "noise_dropped"
    columns = [(k, name) for k in group.fractions for name in figures]
    lines = [
        [scorer]
        + [
            _number(_mean(group.values(scorer, k, figures[name]).values()), ".2f")
            for k, name in columns
        ]
        for scorer in group.scorers
    ]
    return _table(["planted truth", *(f"{name} {k:.0%}" for k, name in columns)], lines)


def _spearman(group: Group, scorer: str) -> float:
    # All fractions share the scores.
    by_seed = group.rows(scorer, group.fractions[0]).values()
    scores = [json.loads(row["scores"]) for row in by_seed]
    return _mean(spearman(a, b) for a, b in itertools.combinations(scores, 2))


def _jaccard(group: Group, scorer: str, fraction: float) -> float:
    kept = [json.loads(row["kept"]) for row in group.rows(scorer, fraction).values()]
    return _mean(jaccard(a, b) for a, b in itertools.combinations(kept, 2))


def _against_full(group: Group, fraction: float) -> str:
    """A scorer a line, the best AUC first."""
    header = [
        *("scorer", "seeds", "features", "AUC", "AUC difference", f"AUC minus {OURS}"),
        *("logloss difference", "NE difference", "AUC pruned", "table bytes"),
        *("selection time", "total time", "rows trained on", "rows forward", "parity"),
    ]
    present = [name for name in group.scorers if group.rows(name, fraction)]
    differences = {name: group.to_full(name, fraction, "auc") for name in present}
    present.sort(key=lambda name: _last_if_nan(differences[name].mean))
    return _table(header, (_against_full_line(group, name, fraction) for name in present))


def _against_full_line(group: Group, scorer: str, fraction: float) -> list[str]:
    rows = group.rows(scorer, fraction).values()
    auc, *others = (group.to_full(scorer, fraction, name) for name in ("auc", "logloss", "ne"))
    ours = paired(group.values(scorer, fraction, "auc"), group.values(OURS, fraction, "auc"))
    trained, forward = (
        group.ratio(scorer, fraction, itemgetter(name), itemgetter("continue_samples"))
        for name in ("selection_samples", "selection_forwards")
    )
    return [
        scorer,
        str(len(rows)),
        f"{_mean(row['features_kept'] for row in rows):.0f}",
        f"{_mean(row['auc'] for row in rows):.4f}",
        _difference(auc),
        "" if scorer == OURS else _difference(ours),
        *map(_difference, others),
        f"{_mean(row['pruned_auc'] for row in rows):.4f}",
        f"{_mean(row['table_bytes_after'] / row['table_bytes_before'] for row in rows):.2f}",
        *(*group.times(scorer, fraction), trained, forward),
        f"{max(row['parity_max_abs'] for row in rows):.0e}",
    ]


def _difference(estimate: Estimate) -> str:
    if not estimate.count:
        return "-"
    if estimate.count == 1:
        return f"{estimate.mean:+.4f}"
    text = f"{estimate.mean:+.4f} ± {estimate.half_width:.4f} ({estimate.deviation:.4f})"
    return f"**{text}**" if estimate.is_clear else text


def _number(value: float, style: str) -> str:
    return "-" if math.isnan(value) else format(value, style)


def _last_if_nan(value: float) -> float:
    """A key that sorts the largest first."""
    return math.inf if math.isnan(value) else -value


def _mean(values: Iterable[float]) -> float:
    """NaN without values; values that are NaN are left out."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.fmean(known) if known else math.nan


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---"] * len(header)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rule, *lines))
