from __future__ import annotations

import threading
from collections import Counter
from itertools import islice
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.datasets.utils import Batch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from tests.support.table_source import TableSource
from torchrec_fmp.data.dataset import RowGroup
from torchrec_fmp.data.errors import DataError
from torchrec_fmp.data.reader import Reader
from torchrec_fmp.data.schema import Schema, SparseColumn

SCHEMA = Schema(
    label="y",
    dense=("d", "e"),
    sparse=(SparseColumn("a", 10**6), SparseColumn("bag", 10), SparseColumn("b", 10**6)),
)


def make_source(group_rows: list[int]) -> TableSource:
    """Row r has d = r, a = r, b = 2r, and r % 3 ids in its bag."""
    tables, first = [], 0
    for count in group_rows:
        rows = range(first, first + count)
        tables.append(
            pa.table(
                {
                    "y": pa.array([row % 2 for row in rows], pa.int32()),
                    "d": pa.array(rows, pa.float32()),
                    "e": pa.array([-row for row in rows], pa.float64()),
                    "a": pa.array(rows, pa.int32()),
                    "bag": pa.array([[row % 10] * (row % 3) for row in rows], pa.list_(pa.int32())),
                    "b": pa.array([2 * row for row in rows], pa.int64()),
                }
            )
        )
        first += count
    return TableSource(tables)


def read(reader: Reader, batch_size: int, start: int = 0, stop: int | None = None) -> list[int]:
    """Rows in order; each batch is checked against the expected content of its rows."""
    rows: list[int] = []
    for batch in reader.batches(batch_size, start, stop):
        rows.extend(check(batch, batch_size))
    return rows


def check(batch: Batch, batch_size: int, real: int | None = None) -> list[int]:
    real = batch_size if real is None else real
    padding = batch_size - real
    rows: list[int] = batch.dense_features[:real, 0].long().tolist()
    assert batch.dense_features.shape == (batch_size, 2)
    assert batch.dense_features.tolist() == [[r, -r] for r in rows] + [[0, 0]] * padding
    assert batch.labels.tolist() == [row % 2 for row in rows] + [0] * padding
    features = batch.sparse_features
    assert features.keys() == ["a", "bag", "b"] and features.stride() == batch_size
    assert features["a"].values().tolist() == rows
    assert features["b"].values().tolist() == [2 * row for row in rows]
    assert features["bag"].values().tolist() == [row % 10 for row in rows for _ in range(row % 3)]
    assert features["bag"].lengths().tolist() == [row % 3 for row in rows] + [0] * padding
    assert features["a"].lengths().tolist() == [1] * real + [0] * padding
    return rows


group_lists = st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any)


@settings(deadline=None, max_examples=60)
@given(group_lists, st.integers(1, 4), st.booleans(), st.integers(1, 7))
def test_every_row_is_read_exactly_once_for_any_world_size(
    group_rows: list[int], world_size: int, shuffle: bool, batch_size: int
) -> None:
    seen: list[int] = []
    steps = set()
    for rank in range(world_size):
        reader = Reader(
            make_source(group_rows),
            SCHEMA,
            rank=rank,
            world_size=world_size,
            shuffle=shuffle,
            workers=0,
        )
        batches = list(reader.padded_batches(batch_size))
        steps.add(len(batches))
        for batch, real in batches:
            seen.extend(check(batch, batch_size, real))
    assert sorted(seen) == list(range(sum(group_rows)))
    assert len(steps) == 1


@settings(deadline=None, max_examples=60)
@given(group_lists, st.booleans(), st.integers(1, 9), st.data())
def test_the_order_depends_on_neither_batch_size_nor_workers_nor_start(
    group_rows: list[int], shuffle: bool, batch_size: int, data: st.DataObject
) -> None:
    def reader(workers: int) -> Reader:
        return Reader(make_source(group_rows), SCHEMA, seed=3, shuffle=shuffle, workers=workers)

    order = read(reader(workers=0), 1)
    start = data.draw(st.integers(0, len(order)))
    stop = data.draw(st.integers(start, len(order)))
    full = start + (stop - start) // batch_size * batch_size
    for workers in (0, 1, 3):
        assert read(reader(workers), batch_size, start, stop) == order[start:full]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_rank_gives_the_same_number_of_batches(world_size: int) -> None:
    readers = [
        Reader(make_source([5, 6, 7, 2]), SCHEMA, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert {reader.rows for reader in readers} == {20 // world_size}
    assert {len(list(reader.batches(2))) for reader in readers} == {20 // world_size // 2}


def test_without_shuffle_rows_come_in_file_order() -> None:
    assert read(Reader(make_source([3, 0, 4]), SCHEMA), 1) == list(range(7))


def test_a_shuffle_mixes_groups_and_rows_and_follows_the_seed() -> None:
    def order(seed: int) -> list[int]:
        return read(Reader(make_source([20] * 10), SCHEMA, seed=seed, shuffle=True), 1)

    assert order(0) == order(0)
    assert order(0) != order(1)
    groups = [row // 20 for row in order(0)]
    assert groups[::20] != sorted(groups[::20]) and sorted(groups[::20]) == list(range(10))
    assert order(0)[:20] != sorted(order(0)[:20])


def test_row_groups_before_start_and_after_stop_are_not_read() -> None:
    source = make_source([4] * 6)
    assert read(Reader(source, SCHEMA, workers=0), 2, 9, 15) == list(range(9, 15))
    assert source.read_indices == [2, 3]


def test_values_and_lengths_have_the_types_that_torchrec_expects() -> None:
    batch = next(Reader(make_source([6]), SCHEMA).batches(6))
    features = batch.sparse_features
    assert (features.values().dtype, features.lengths().dtype) == (torch.int64, torch.int32)
    assert (batch.dense_features.dtype, batch.labels.dtype) == (torch.float32, torch.float32)
    tables = [
        EmbeddingBagConfig(
            name=f"t_{column.name}",
            embedding_dim=4,
            num_embeddings=20,
            feature_names=[column.name],
        )
        for column in SCHEMA.sparse
    ]
    pooled = EmbeddingBagCollection(tables=tables)(features)
    assert pooled.values().shape == (6, 12)


def test_batches_share_no_memory() -> None:
    first, second = islice(Reader(make_source([8]), SCHEMA).batches(4), 2)
    for tensor in (first.labels, first.dense_features, first.sparse_features.values()):
        tensor.fill_(7)
    assert check(second, 4) == [4, 5, 6, 7]


def test_replaced_values_are_counted_once_when_rows_are_read_in_parts() -> None:
    columns: dict[str, Any] = {"y": [0] * 6, "d": [float("nan"), 1, 2, None, 4, 5], "e": [0.0] * 6}
    columns |= {"a": [0, 1, 2, 3, -4, 5], "bag": [[0]] * 6, "b": [0] * 6}
    source = TableSource([pa.table(columns)])
    reader = Reader(source, SCHEMA, bad_input="replace", shuffle=True)
    for start in range(0, 6, 2):
        for _ in reader.batches(2, start, start + 2):
            pass
    expected = {("d", "not finite in float32"): 1, ("d", "null"): 1, ("a", "negative id"): 1}
    assert reader.replaced == Counter(expected)


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_bad_value_is_reported_with_its_row_in_the_file(shuffle: bool) -> None:
    source = make_source([5, 5])
    bad = pa.array([5, 6, 7, -8, 9], pa.int32())
    source.tables[1] = source.tables[1].set_column(3, "a", bad)  # type: ignore[index]
    with pytest.raises(DataError, match=r"memory, column 'a', row 8: negative id \(-8\)"):
        read(Reader(source, SCHEMA, shuffle=shuffle), 2)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_rows_before_an_error_are_yielded_first(workers: int) -> None:
    class Broken(TableSource):
        def read(self, group: RowGroup) -> pa.Table:
            if group.index == 2:
                raise DataError("broken", file="f", remedy="Mend it.")
            return super().read(group)

    batches = Reader(Broken(make_source([4] * 5).tables), SCHEMA, workers=workers).batches(4)
    assert [check(next(batches), 4), check(next(batches), 4)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(DataError, match="f: broken. Mend it."):
        next(batches)


def test_closing_early_stops_the_threads_and_the_reading() -> None:
    before = threading.active_count()
    source = make_source([4] * 50)
    batches = Reader(source, SCHEMA, workers=2).batches(4)
    next(batches)
    assert threading.active_count() > before
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
    assert len(source.read_indices) <= 4


def test_a_row_group_that_changed_size_is_an_error() -> None:
    source = make_source([4, 4])
    source.tables[1] = source.tables[1].slice(1)  # type: ignore[index]
    with pytest.raises(DataError, match="memory, row 4: 3 rows were read, but 4 were announced"):
        read(Reader(source, SCHEMA), 2)


def test_a_source_without_rows_is_an_error() -> None:
    with pytest.raises(DataError, match="memory: there are no rows to read"):
        Reader(make_source([0]), SCHEMA)
    with pytest.raises(DataError, match="an empty list of files: there are no rows to read"):
        Reader(TableSource([]), SCHEMA)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 7)])
def test_an_invalid_range_of_rows_is_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="a rank has rows 0 to 6"):
        Reader(make_source([6]), SCHEMA).batches(2, start, stop)


def test_arguments_out_of_range_are_refused() -> None:
    source = make_source([6])
    with pytest.raises(ValueError, match=r"rank is 2; it must be in \[0, 2\)"):
        Reader(source, SCHEMA, rank=2, world_size=2)
    with pytest.raises(ValueError, match="workers is -1"):
        Reader(source, SCHEMA, workers=-1)
    with pytest.raises(ValueError, match="batch_size is 0"):
        Reader(source, SCHEMA).batches(0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        Reader(source, SCHEMA).padded_batches(0)
