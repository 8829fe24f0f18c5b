"""Runs cells, one process each, and gathers their rows. Finished cells are not run again."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pkgutil
import subprocess
import sys
import traceback
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

import torchrec_fmp

from .cell import FULL, Cell, Row, run_cell

# Each cell is a fork of a process that has imported these, which takes seconds. All of them, so
# that the cells of a grid run the same code although its files may change meanwhile.
_PRELOADED = [m.name for m in pkgutil.walk_packages(torchrec_fmp.__path__, "torchrec_fmp.")]
# The grid writes results while it runs, and the report writes docs; neither changes what rows say.
_NOT_CODE = [":!benchmarks/results", ":!docs"]
_ARROW = {str: pa.string(), int: pa.int64(), float: pa.float64()}


def cells_of(
    data: str,
    prepared: Path,
    config: dict[str, Any],
    backbone: str,
    scorers: Mapping[str, Mapping[str, dict[str, Any]]],
    seeds: Iterable[int],
    fractions: Sequence[float],
) -> list[Cell]:
    """The full model and every scorer, one seed after the other, so that few seeds pair already.

    Args:
        data: name of the data set.
        prepared: its directory.
        config: the sections that all cells share.
        backbone: name of the backbone.
        scorers: name -> sections, which are merged into the shared ones.
        seeds: of the runs.
        fractions: to keep.
    """
    cells = []
    for seed in seeds:
        cells.append(Cell(data, prepared, backbone, FULL, seed, (), config))
        for name, changes in scorers.items():
            merged = config | {key: config.get(key, {}) | changes[key] for key in changes}
            cells.append(Cell(data, prepared, backbone, name, seed, tuple(fractions), merged))
    return cells


def run(
    cells: Sequence[Cell],
    out: Path,
    jobs: int,
    commit: str,
    say: Callable[[str], None] = print,
    again: bool = False,
) -> dict[str, str]:
    """Runs the cells that are not finished, and writes `selection.parquet` of all there are.

    Args:
        cells: to run.
        out: gets rows/<cell>.json as soon as a cell is done, and rows/<cell>.error if it fails. A
            cell whose rows are in its `selection.parquet` is done, too.
        jobs: number of cells at the same time.
        commit: commit of the code, written into each row.
        say: receives one line per cell.
        again: whether to run the finished cells as well.

    Returns:
        Name -> traceback of the cells that failed; the others have run.
    """
    rows = out / "rows"
    rows.mkdir(parents=True, exist_ok=True)
    _restore(out)
    todo = [cell for cell in cells if again or not _finished(cell, rows)]
    say(f"{len(cells) - len(todo)} of {len(cells)} cells are finished")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    failed = {}

    def work(cell: Cell) -> tuple[Cell, str | None]:
        return cell, _run_apart(context, cell, rows, jobs, commit)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for count, (cell, error) in enumerate(pool.map(work, todo), start=1):
                if error is not None:
                    failed[cell.name] = error
                say(f"{count} of {len(todo)} {cell.name} {'failed' if error else 'done'}")
        finally:
            # Otherwise an interrupted pool would still run the waiting cells.
            pool.shutdown(cancel_futures=True)
            merge(out)
    return failed


def merge(out: Path) -> None:
    """Writes all rows there are into `selection.parquet`."""
    rows = [row for path in sorted((out / "rows").glob("*.json")) for row in _read(path)]
    hints = typing.get_type_hints(Row)
    schema = pa.schema([(f.name, _ARROW[_plain(hints[f.name])]) for f in fields(Row)])
    partial = out / "selection.parquet.partial"
    pq.write_table(pa.Table.from_pylist(rows, schema), partial)
    os.replace(partial, out / "selection.parquet")


def _restore(out: Path) -> None:
    """Writes the rows of `selection.parquet` that have no file."""
    merged = out / "selection.parquet"
    cells: dict[str, list[dict[str, Any]]] = {}
    for row in pq.read_table(merged).to_pylist() if merged.exists() else []:
        name = "-".join(str(row[part]) for part in ("data", "backbone", "scorer", "seed"))
        cells.setdefault(name, []).append(row)
    for name, members in cells.items():
        path = out / "rows" / f"{name}.json"
        if not path.exists():
            path.write_text(json.dumps(members, indent=1))


def _plain(hint: Any) -> type:
    """The type of a field that may be None."""
    return typing.get_args(hint)[0] if typing.get_args(hint) else hint


def _finished(cell: Cell, rows: Path) -> bool:
    path = rows / f"{cell.name}.json"
    return path.exists() and all(row["config_digest"] == cell.digest for row in _read(path))


def _read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())


def _run_apart(
    context: ForkServerContext, cell: Cell, rows: Path, jobs: int, commit: str
) -> str | None:
    """Runs a cell in a process of its own; the traceback if it fails."""
    error = rows / f"{cell.name}.error"
    error.unlink(missing_ok=True)
    process = context.Process(target=_run_here, args=(cell, rows, jobs, commit), name=cell.name)
    process.start()
    process.join()
    if process.exitcode == 0:
        return None
    if not error.exists():
        error.write_text(f"the process ended with {process.exitcode} and said nothing\n")
    return error.read_text()


def _run_here(cell: Cell, rows: Path, jobs: int, commit: str) -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    try:
        content = json.dumps([asdict(row) for row in run_cell(cell, jobs, commit)], indent=1)
        partial = rows / f"{cell.name}.partial"
        partial.write_text(content)
        os.replace(partial, rows / f"{cell.name}.json")
    except BaseException:
        (rows / f"{cell.name}.error").write_text(traceback.format_exc())
        sys.exit(1)


def clean_commit(checkout: Path) -> str:
    """The commit that reproduces a row.

    Raises:
        RuntimeError: if `checkout` is not in a git repository, or its code differs from the commit.
    """
    changed = _git(checkout, "status", "--porcelain", "--", ".", *_NOT_CODE)
    if changed:
        raise RuntimeError(
            f"The code has uncommitted changes:\n{changed}\n"
            "Commit them first: each row names the commit that reproduces it."
        )
    return _git(checkout, "rev-parse", "--short", "HEAD")


def _git(checkout: Path, *arguments: str) -> str:
    command = ["git", "-C", str(checkout), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {result.stderr.strip()}")
    return result.stdout.strip()
