"""`prepare`: converts raw files to the Parquet files and the schema that training reads."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NoReturn
from urllib.parse import quote

from tqdm import tqdm

from torchrec_fmp import paths
from torchrec_fmp.data.errors import DataError
from torchrec_fmp.data.prepared import RowConverter, SplitWriter
from torchrec_fmp.data.raw.avazu import AvazuTable
from torchrec_fmp.data.raw.conversion import to_values
from torchrec_fmp.data.raw.criteo import criteo_table
from torchrec_fmp.data.raw.delimited import CSV, TSV, DelimitedTable, read_names
from torchrec_fmp.data.raw.erase import EraseCriteoTable, erase_avazu_table, erase_movielens_table
from torchrec_fmp.data.raw.movielens import MovieLensTable
from torchrec_fmp.data.raw.parquet import ParquetTable, read_schema
from torchrec_fmp.data.raw.permuted import shuffled
from torchrec_fmp.data.raw.table import RawChunk, RawColumns, RawTable, list_inputs
from torchrec_fmp.data.schema import Schema, SparseColumn
from torchrec_fmp.data.splitting import ColumnSplit, OrderSplit, RowSplit, SeedSplit, TimeSplit
from torchrec_fmp.data.vocabulary import HashBuckets, IdMap, ValueCounts, Vocabulary

logger = logging.getLogger(__name__)

_FREE_FORMATS = ("csv", "tsv", "parquet")


@dataclass(frozen=True)
class PrepareConfig:
    """Inputs, output and options of `prepare`.

    Args:
        format: format of the raw files. criteo, avazu and movielens have fixed columns.
        inputs: files or directories, plain or compressed; for movielens, the release's directory.
        out: local directory to create.
        label: label column of 0 and 1 (csv, tsv, parquet).
        dense: columns of numbers (csv, tsv, parquet).
        sparse: columns of values that become ids (csv, tsv, parquet); by default, all remaining
            columns.
        log_dense: whether dense x becomes sign(x) * log(1 + abs(x)).
        columns: set of columns (criteo, avazu, movielens): `own` for the format's columns, or
            `erase` for the columns of ERASE's benchmark. With `erase` all columns are sparse:
            criteo has its integers as buckets; avazu has `hour` unchanged; movielens has timestamp
            and title, genres as one value, and ERASE's row order.
        rating_threshold: rating above which a label is positive (movielens).
        min_count: minimum count of a value in the training rows; rarer values share id 0.
        hash_buckets: number of ids per column to hash values to, instead of building vocabularies.
        split: rule for the test split: the last rows (order), the last rows after an in-memory
            permutation by `seed` like pandas' `sample(frac=1)` (shuffle), the latest rows (time),
            random rows (seed), or the rows where `split_column` is 1 (column).
        test_fraction: share of rows in the test split; no effect with `column`.
        validation_fraction: share of rows, just before the test split, that are written to neither
            split (order, shuffle).
        split_column: column that `time` or `column` reads, not a feature (csv, tsv, parquet).
        seed: seed of the split by seed or shuffle.
        row_group_rows: number of rows in a row group of the Parquet files.

    Raises:
        ValueError: if options contradict each other or are out of range.
    """

    format: Literal["criteo", "avazu", "movielens", "csv", "tsv", "parquet"]
    inputs: list[str]
    out: str
    label: str | None = None
    dense: list[str] = field(default_factory=list)
    sparse: list[str] | None = None
    log_dense: bool = True
    columns: Literal["own", "erase"] = "own"
    rating_threshold: float = 3.0
    min_count: int = 2
    hash_buckets: int | None = None
    split: Literal["order", "shuffle", "time", "seed", "column"] = "order"
    test_fraction: float = 0.1
    validation_fraction: float = 0.0
    split_column: str | None = None
    seed: int = 0
    row_group_rows: int = 65_536

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ValueError("inputs is empty; it must name at least one file")
        if self.format == "movielens" and len(self.inputs) != 1:
            raise ValueError(f"movielens takes one directory, but inputs names {len(self.inputs)}")
        for name in ("min_count", "hash_buckets", "row_group_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not 0 < self.test_fraction < 1:
            raise ValueError(f"test_fraction is {self.test_fraction}; it must be between 0 and 1")
        self._check_validation()
        if self.split == "shuffle" and not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; split shuffle takes 0 to {2**32 - 1}")
        if self.format in _FREE_FORMATS:
            self._check_free_columns()
        else:
            self._check_fixed_columns()

    def _check_validation(self) -> None:
        if not 0 <= self.validation_fraction < 1 - self.test_fraction:
            raise ValueError(
                f"validation_fraction is {self.validation_fraction}; it must be at least 0 and "
                f"leave rows to train on, with test_fraction {self.test_fraction}"
            )
        if self.validation_fraction and self.split not in ("order", "shuffle"):
            raise ValueError(f"validation_fraction cannot be set with split {self.split}")

    def _check_free_columns(self) -> None:
        if self.columns != "own":
            raise ValueError(f"columns is {self.columns}; it must be own for format {self.format}")
        if self.label is None:
            raise ValueError(f"format {self.format} needs the name of the label column: set label")
        reads_column = self.split in ("time", "column")
        if reads_column and self.split_column is None:
            raise ValueError(f"split {self.split} of format {self.format} needs split_column")
        if self.split_column is not None and not reads_column:
            raise ValueError(f"split_column has no effect with split {self.split}: remove it")

    def _check_fixed_columns(self) -> None:
        for name in ("label", "dense", "sparse", "split_column"):
            if getattr(self, name):
                raise ValueError(f"{name} cannot be set: format {self.format} has fixed columns")
        if self.split == "column" or (self.split == "time" and self.format == "criteo"):
            raise ValueError(f"format {self.format} has no column for split {self.split}")


def prepare(config: PrepareConfig) -> Schema:
    """Writes `config.out` and returns its schema.

    Memory does not grow with the number of rows, except where they are reordered.

    The directory holds train/ and test/ (Parquet: int8 label, float32 dense, int32 ids, lists of
    int32 for multivalued columns; rows in the order of the raw files, or shuffled),
    schema.json, vocabulary/COLUMN.parquet (value, id, count; not when hashing) and prepare.json
    (config, rows, share of values out of vocabulary). Vocabularies are built on the training rows
    alone, so that the test split measures the effect of unseen values. Missing values are read as
    the value "". The directory appears whole, or not at all.

    Raises:
        DataError: if the raw files cannot be used; names file, column, row and value.
        FileExistsError: if `config.out` exists and is not empty.
        FileNotFoundError: if an input does not exist.
        ValueError: if a path has an unknown scheme, or columns contradict each other.
    """
    with _appearing_whole(config.out) as directory:
        raw = _open_raw(config)
        if not any(chunk.rows.num_rows for chunk in raw.scan([raw.columns.label])):
            raise DataError("no rows", file=raw.files[0], remedy="Name files that hold data.")
        split = _fit_split(config, raw)
        id_maps = _fit_id_maps(config, raw, split)
        converter = RowConverter(raw.columns, id_maps, config.log_dense)
        report = _write_splits(config, raw, split, converter, directory)
        schema = Schema(
            label=raw.columns.label,
            dense=raw.columns.dense,
            sparse=tuple(
                SparseColumn(name, id_maps[name].num_embeddings) for name in raw.columns.sparse
            ),
        )
        schema.save(paths.join(directory, "schema.json"))
        _save_vocabularies(id_maps, paths.join(directory, "vocabulary"))
        with paths.open_path(paths.join(directory, "prepare.json"), "w") as file:
            json.dump({"config": asdict(config), **report}, file, indent=2)
            file.write("\n")
    logger.info("prepared %s: rows %s", config.out, report["rows"])
    return schema


@contextlib.contextmanager
def _appearing_whole(out: str) -> Iterator[str]:
    """A directory beside `out` that is renamed to `out` if the block ends without an error."""
    if "://" in out:
        raise ValueError(f"{out} is not local: prepare into a local directory, then copy it")
    if paths.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise FileExistsError(f"{out} exists and is not empty: choose another, or remove it")
    target = os.path.realpath(out)
    staging = f"{target}.{uuid.uuid4().hex[:8]}.partial"
    paths.make_directories(staging)
    try:
        yield staging
        # This replaces an empty directory, and fails if someone filled it meanwhile.
        os.replace(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _open_raw(config: PrepareConfig) -> RawTable:
    raw = _open_in_order(config)
    return shuffled(raw, config.seed) if config.split == "shuffle" else raw


def _open_in_order(config: PrepareConfig) -> RawTable:
    erase = config.columns == "erase"
    if config.format == "movielens":
        movielens = erase_movielens_table if erase else MovieLensTable
        return movielens(config.inputs[0], config.rating_threshold)
    files = list_inputs(config.inputs)
    if config.format == "criteo":
        return EraseCriteoTable(files) if erase else criteo_table(files)
    if config.format == "avazu":
        return erase_avazu_table(files) if erase else AvazuTable(files)
    if config.format == "parquet":
        return ParquetTable(files, _free_columns(config, read_schema(files[0]).names))
    dialect = CSV if config.format == "csv" else TSV
    return DelimitedTable(files, dialect, _free_columns(config, read_names(files[0], dialect)))


def _free_columns(config: PrepareConfig, present: tuple[str, ...] | list[str]) -> RawColumns:
    assert config.label is not None
    sparse = config.sparse
    if sparse is None:
        taken = {config.label, config.split_column, *config.dense}
        sparse = [name for name in present if name not in taken]
    return RawColumns(config.label, tuple(config.dense), tuple(sparse))


def _fit_split(config: PrepareConfig, raw: RawTable) -> RowSplit:
    column = config.split_column or raw.columns.time
    if config.split in ("order", "shuffle"):
        return OrderSplit.fit(raw, config.test_fraction, config.validation_fraction)
    if config.split == "seed":
        return SeedSplit(config.seed, config.test_fraction)
    assert column is not None
    if config.split == "time":
        return TimeSplit.fit(raw, column, config.test_fraction)
    return ColumnSplit(column)


def _fit_id_maps(config: PrepareConfig, raw: RawTable, split: RowSplit) -> Mapping[str, IdMap]:
    columns = raw.columns
    if config.hash_buckets is not None:
        return {name: HashBuckets(config.hash_buckets) for name in columns.sparse}
    counts = {name: ValueCounts() for name in columns.sparse}
    names = dict.fromkeys((*columns.sparse, *split.columns))
    with ThreadPoolExecutor() as pool, _progress("counting values") as progress:
        for chunk in raw.scan(list(names)):
            train_mask, _ = split.masks(chunk)
            train = chunk.rows.filter(train_mask)
            _count(replace(chunk, rows=train), columns.multivalued, counts, pool)
            progress.update(chunk.rows.num_rows)
        vocabularies = pool.map(
            lambda name: Vocabulary.of_frequent(counts[name], config.min_count), columns.sparse
        )
        return dict(zip(columns.sparse, vocabularies, strict=True))


def _count(
    chunk: RawChunk, multivalued: frozenset[str], counts: Mapping[str, ValueCounts], pool: Executor
) -> None:
    def count(name: str) -> None:
        counts[name].add(to_values(chunk, name, name in multivalued).values)

    # `list` waits for the threads, and raises their errors.
    list(pool.map(count, counts))


def _write_splits(
    config: PrepareConfig, raw: RawTable, split: RowSplit, converter: RowConverter, directory: str
) -> dict[str, Any]:
    names = dict.fromkeys((*converter.schema.names, *split.columns))
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor())
        progress = stack.enter_context(_progress("writing"))
        train, test = (
            stack.enter_context(_open_split(directory, name, converter, config.row_group_rows))
            for name in ("train", "test")
        )
        for chunk in raw.scan(list(names)):
            table = converter.convert(chunk, pool)
            train_mask, test_mask = split.masks(chunk)
            train.write(table.filter(train_mask))
            test.write(table.filter(test_mask))
            progress.update(chunk.rows.num_rows)
    writers = {"train": train, "test": test}
    for name, writer in writers.items():
        if not writer.rows:
            raise DataError(
                f"split {config.split} leaves the {name} split empty",
                file=raw.files[0],
                remedy="Change split, its fractions or split_column.",
            )
    report: dict[str, Any] = {"rows": {name: writer.rows for name, writer in writers.items()}}
    if config.hash_buckets is None:
        report["out_of_vocabulary"] = {
            name: writer.out_of_vocabulary() for name, writer in writers.items()
        }
    return report


def _open_split(
    directory: str, name: str, converter: RowConverter, row_group_rows: int
) -> SplitWriter:
    split_directory = paths.join(directory, name)
    paths.make_directories(split_directory)
    path = paths.join(split_directory, "part-00000.parquet")
    return SplitWriter(path, converter.schema, row_group_rows)


def _save_vocabularies(id_maps: Mapping[str, IdMap], directory: str) -> None:
    vocabularies = {name: ids for name, ids in id_maps.items() if isinstance(ids, Vocabulary)}
    if vocabularies:
        paths.make_directories(directory)
    for name, vocabulary in vocabularies.items():
        # A column name may contain "/", a file name may not.
        vocabulary.save(paths.join(directory, f"{quote(name, safe=' ')}.parquet"))


def _progress(what: str) -> tqdm[NoReturn]:
    # With `disable=None`, tqdm shows a bar only on a terminal.
    return tqdm(desc=what, unit=" rows", unit_scale=True, disable=None)
