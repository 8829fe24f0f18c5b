"""Rows a second of the reader, from Parquet to batches, against pyarrow alone on the same file.

python benchmarks/reader.py --rows 1000000
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_fmp.data.dataset import Source
from torchrec_fmp.data.parquet import ParquetSource
from torchrec_fmp.data.reader import Reader
from torchrec_fmp.data.schema import Schema, SparseColumn

BATCH_SIZE = 4096
REPETITIONS = 7
# Of the 26 categorical columns of Criteo's Kaggle data set.
# fmt: off
CARDINALITIES = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194,
    27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572,
)
# fmt: on
SCHEMA = Schema(
    label="label",
    dense=tuple(f"dense_{n}" for n in range(13)),
    sparse=tuple(SparseColumn(f"cat_{f}", rows) for f, rows in enumerate(CARDINALITIES)),
)


def write_file(path: Path, rows: int, rows_per_group: int) -> None:
    """Writes 13 float32 and 26 int32 columns of Zipf-distributed values, group by group."""
    random = np.random.default_rng(0)
    writer = None
    for start in range(0, rows, rows_per_group):
        count = min(rows_per_group, rows - start)
        columns = {"label": (random.random(count) < 0.25).astype(np.int32)}
        for name in SCHEMA.dense:
            columns[name] = np.log1p(random.exponential(100, count).astype(np.int32), dtype="f4")
        for column in SCHEMA.sparse:
            # exp of a uniform variable has density 1/x: Zipf's law with exponent 1.
            ids = np.exp(random.random(count) * np.log(column.num_embeddings + 1)) - 1
            columns[column.name] = ids.astype(np.int32)
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table, row_group_size=count)
    assert writer is not None
    writer.close()


def decode_only(path: Path) -> None:
    file = pq.ParquetFile(path)
    for group in range(file.num_row_groups):
        file.read_row_group(group, columns=list(SCHEMA.columns), use_threads=False)


def read_batches(source: Source, workers: int, shuffle: bool = False) -> None:
    for _ in Reader(source, SCHEMA, workers=workers, shuffle=shuffle).batches(BATCH_SIZE):
        pass


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rows-per-group", type=int, default=65_536)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "criteo_shaped.parquet"
        write_file(path, arguments.rows, arguments.rows_per_group)
        print(f"{arguments.rows} rows, {path.stat().st_size / 1e6:.0f} MB")
        source = ParquetSource([str(path)], SCHEMA)
        runs: dict[str, Callable[[], None]] = {
            "pyarrow alone": lambda: decode_only(path),
            "reader, workers=0": lambda: read_batches(source, workers=0),
            "reader, workers=1": lambda: read_batches(source, workers=1),
            "reader, workers=1, shuffled": lambda: read_batches(source, workers=1, shuffle=True),
        }
        for run in runs.values():
            run()
        # In alternation, so that what else the machine does weighs on all alike.
        times = [{name: seconds(run) for name, run in runs.items()} for _ in range(REPETITIONS)]
    for name in runs:
        rates = [arguments.rows / time[name] / 1e6 for time in times]
        ratios = [time["pyarrow alone"] / time[name] for time in times]
        print(
            f"{name:28}{statistics.median(rates):6.2f} M rows/s, of pyarrow alone "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
