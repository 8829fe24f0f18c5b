"""Prepares the data of a grid once, as Parquet: cells read planted rows as they read real ones."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from torchrec_fmp.data.dataset import Split
from torchrec_fmp.data.prepare import PrepareConfig, prepare
from torchrec_fmp.data.synthetic import SyntheticDataset

_TRUTH = "planted.json"


def prepare_real(raw: Path, cache: Path) -> Path:
    """The prepared directory of a raw Parquet file, whose name it has."""
    out = cache / raw.stem
    if not out.exists():
        split: dict[str, Any] = {"split": "column", "split_column": "is_test"}
        prepare(PrepareConfig("parquet", [str(raw)], str(out), label="label", **split))
    return out


def prepare_planted(name: str, arguments: Mapping[str, Any], cache: Path) -> Path:
    """The prepared directory of a planted data set, which also says what was planted."""
    digest = hashlib.blake2b(json.dumps(arguments).encode(), digest_size=4).hexdigest()
    out = cache / f"{name}-{digest}"
    if not out.exists():
        partial = out.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        _write(SyntheticDataset(**arguments), partial)
        os.replace(partial, out)
    return out


def planted(prepared: Path) -> dict[str, Any] | None:
    """`signal`, `redundant`, `noise`, and the oracle's `contributions`; None for real data."""
    path = prepared / _TRUTH
    return json.loads(path.read_text()) if path.exists() else None


def _write(dataset: SyntheticDataset, out: Path) -> None:
    splits: tuple[Split, ...] = ("train", "test")
    for split in splits:
        (out / split).mkdir(parents=True)
        source = dataset.source(split)
        tables = map(source.read, source.row_groups)
        first = next(tables)
        with pq.ParquetWriter(out / split / "0.parquet", first.schema, compression="zstd") as file:
            for table in (first, *tables):
                file.write_table(table)
    dataset.schema.save(str(out / "schema.json"))
    truth = {**asdict(dataset.truth), "contributions": dataset.oracle_contributions()}
    (out / _TRUTH).write_text(json.dumps(truth, indent=2) + "\n")
