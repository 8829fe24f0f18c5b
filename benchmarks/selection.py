"""Compares feature selectors on accuracy, cost and planted truth; makes docs/selection.md.

    python benchmarks/selection.py run --data ../shared/data --planted planted28
    python benchmarks/selection.py report --out docs/selection.md --plot docs/selection.svg

A grid of data sets, backbones, scorers and seeds, each cell a process of its own: one scoring, and
from it a pruned model at each kept fraction. Names and settings are in selection_grid/settings.py.
Started again after a stop, it continues with the unfinished cells, according to results/rows and
results/selection.parquet. After a change to a scorer, `--again` also runs its finished cells.
Timings are honest with one job on an idle machine.

The folder of `--data` holds flights13.parquet, diabetes130.parquet and census_kdd.parquet, each
with string fields, a `label`, and `is_test` for the last tenth of its rows.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from selection_grid import settings

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    run = verbs.add_parser("run", help="run the cells that are not finished")
    run.add_argument("--data", type=Path, help="folder of the real data sets' raw files")
    run.add_argument("--real", nargs="+", choices=settings.REAL, default=settings.REAL)
    run.add_argument("--planted", nargs="+", choices=settings.PLANTED, default=[])
    run.add_argument("--prepared", nargs="+", metavar="NAME=DIR", default=[])
    run.add_argument("--backbones", nargs="+", choices=settings.BACKBONES, default=["dlrm"])
    names = [*settings.SCORERS, *settings.VARIANTS]
    run.add_argument("--scorers", nargs="+", choices=names, default=[*settings.SCORERS])
    run.add_argument("--fractions", nargs="+", type=float, default=settings.FRACTIONS)
    run.add_argument("--seeds", type=int, default=5, help="how many")
    run.add_argument("--jobs", type=int, default=1, help="cells at the same time")
    run.add_argument("--again", action="store_true", help="also run what is finished")
    report = verbs.add_parser("report", help="the comparison as Markdown")
    report.add_argument("--out", type=Path, help="file; standard output by default")
    report.add_argument("--plot", type=Path, help="SVG file of the AUC over the kept fraction")
    for verb in (run, report):
        verb.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.verb == "run":
        return run_grid(arguments)
    if arguments.verb == "report":
        return write_report(arguments)
    print("Nothing to do without data: name some, as in\n" + (__doc__ or "").split("\n\n")[1])
    return 0


def run_grid(arguments: argparse.Namespace) -> int:
    # Before torch is imported, here and in the process that cells are forked from.
    os.environ["OMP_NUM_THREADS"] = "1"
    from selection_grid import grid

    cells = [
        cell
        for data, prepared in prepared_data(arguments)
        for backbone in arguments.backbones
        for cell in grid.cells_of(
            data,
            prepared,
            settings.shared_config(data, settings.BACKBONES[backbone]),
            backbone,
            {name: settings.sections(name) for name in arguments.scorers},
            range(arguments.seeds),
            arguments.fractions,
        )
    ]
    if not cells:
        print("There is no data to run on: name some by --data, --planted or --prepared.")
        return 0
    commit = grid.clean_commit(RESULTS.parent.parent)
    failed = grid.run(cells, arguments.results, arguments.jobs, commit, again=arguments.again)
    for name, error in failed.items():
        file = arguments.results / "rows" / f"{name}.error"
        sys.stderr.write(f"{name} failed, see {file}: {error.splitlines()[-1]}\n")
    return int(bool(failed))


def prepared_data(arguments: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """Name and prepared directory of each data set."""
    from selection_grid.data import prepare_planted, prepare_real

    cache = arguments.results / "data"
    if arguments.data:
        for name in arguments.real:
            yield name, prepare_real(arguments.data / f"{name}.parquet", cache)
    for name in arguments.planted:
        yield name, prepare_planted(name, settings.PLANTED[name] | settings.PLANTED_ROWS, cache)
    for named in arguments.prepared:
        name, _, directory = named.partition("=")
        yield name, Path(directory)


def write_report(arguments: argparse.Namespace) -> int:
    import pyarrow.parquet as pq
    from selection_grid.report import report

    path = arguments.results / "selection.parquet"
    if not path.exists():
        print(f"There is no {path}: run the grid first.")
        return 0
    rows = pq.read_table(path).to_pylist()
    text = report(rows)
    if arguments.plot:
        from selection_grid.plot import plot

        plot(rows, arguments.plot)
    if arguments.out:
        arguments.out.write_text(text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
