"""Subsets: each partitions the rows, alike on every rank, and chooses the rows it documents."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.table_source import TableSource
from torchrec_fmp.data.dataset import Source
from torchrec_fmp.data.errors import DataError
from torchrec_fmp.data.reader import Reader
from torchrec_fmp.data.schema import Schema, SparseColumn
from torchrec_fmp.data.subset import Prefix, Random, RecentResampling, Stratified, Subset

SCHEMA = Schema(
    label="y",
    dense=("row",),
    sparse=(SparseColumn("value", 100), SparseColumn("bag", 10), SparseColumn("text", 50)),
)
SUBSETS = (Prefix(), Random(), Stratified(blocks=3), RecentResampling(recent=0.2))
group_lists = st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any)


def make_source(
    group_rows: list[int],
    value: Callable[[int], int] = lambda row: row % 7,
    bag: Callable[[int], list[int]] = lambda row: [row % 10] * (row % 3),
    label: Callable[[int], int] = lambda row: int(row % 3 == 0),
) -> TableSource:
    """Column `row` holds the row number."""
    tables, first = [], 0
    for count in group_rows:
        rows = range(first, first + count)
        tables.append(
            pa.table(
                {
                    "y": pa.array([label(row) for row in rows], pa.int8()),
                    "row": pa.array(rows, pa.int32()),
                    "value": pa.array([value(row) for row in rows], pa.int32()),
                    "bag": pa.array([bag(row) for row in rows], pa.list_(pa.int32())),
                    "text": pa.array([f"t{row % 5}" for row in rows], pa.string()),
                }
            )
        )
        first += count
    return TableSource(tables)


def rows_of(source: Source) -> list[int]:
    rows: list[int] = []
    for group in source.row_groups:
        read = source.read(group)["row"].to_pylist()
        assert len(read) == group.rows > 0
        assert source.row_numbers(group).tolist() == read
        assert group.first_row == read[0]
        rows += read
    return rows


def chosen_rows(subset: Subset, source: Source, rows: int, seed: int = 0) -> list[int]:
    chosen, _ = subset.split(source, SCHEMA, rows, seed)
    return rows_of(chosen)


@pytest.mark.parametrize("subset", SUBSETS)
@settings(deadline=None, max_examples=40)
@given(group_rows=group_lists, data=st.data())
def test_chosen_rows_and_the_rest_partition_the_rows_and_keep_their_order(
    subset: Subset, group_rows: list[int], data: st.DataObject
) -> None:
    total = sum(group_rows)
    wanted = data.draw(st.integers(1, total))
    parts = subset.split(make_source(group_rows), SCHEMA, wanted, data.draw(st.integers(0, 9)))
    chosen, rest = (rows_of(part) for part in parts)
    assert len(chosen) == wanted
    assert sorted(chosen + rest) == list(range(total))
    assert chosen == sorted(chosen) and rest == sorted(rest)


@pytest.mark.parametrize("subset", SUBSETS)
def test_the_choice_depends_only_on_the_seed(subset: Subset) -> None:
    first, again, other = (
        chosen_rows(subset, make_source([50, 50]), 30, seed) for seed in (0, 0, 1)
    )
    assert first == again
    assert (first == other) == isinstance(subset, Prefix)


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world_size", [1, 3])
def test_ranks_read_every_chosen_row_and_every_remaining_row_once(
    subset: Subset, shuffle: bool, world_size: int
) -> None:
    parts = subset.split(make_source([40, 60]), SCHEMA, 31, 0)
    for wanted, part in zip((31, 69), parts, strict=True):
        seen: list[int] = []
        for rank in range(world_size):
            reader = Reader(part, SCHEMA, rank=rank, world_size=world_size, shuffle=shuffle)
            for batch, real in reader.padded_batches(4):
                rows = batch.dense_features[:real, 0].long().tolist()
                values = batch.sparse_features["value"].values().tolist()
                assert values == [row % 7 for row in rows]
                assert batch.sparse_features["bag"].values().tolist() == [
                    row % 10 for row in rows for _ in range(row % 3)
                ]
                seen += rows
        assert len(seen) == wanted
        assert sorted(seen) == rows_of(part)


def test_prefix_and_random_split_without_reading_and_prefix_reads_only_its_row_groups() -> None:
    source = make_source([10, 10, 10])
    Random().split(source, SCHEMA, 12, 0)
    chosen, rest = Prefix().split(source, SCHEMA, 12, 0)
    assert source.read_indices == []
    assert rows_of(chosen) == list(range(12))
    assert source.read_indices == [0, 1]
    assert rows_of(rest) == list(range(12, 30))
    assert source.read_indices == [0, 1, 1, 2]


def test_random_draws_evenly_from_old_and_new_rows() -> None:
    rows = np.array(chosen_rows(Random(), make_source([1000] * 4), 1000))
    assert np.bincount(rows // 1000).tolist() == pytest.approx([250] * 4, abs=60)


def test_stratified_keeps_the_share_of_each_label_in_each_block() -> None:
    random = np.random.default_rng(0)
    # The share of positives rises from 0 to 0.5.
    labels = (random.random(1000) < np.linspace(0, 0.5, 1000)).astype(int)
    source = make_source([300, 300, 400], label=lambda row: int(labels[row]))
    rows = np.array(chosen_rows(Stratified(blocks=5), source, 333))
    for block in range(5):
        inside = rows[rows // 200 == block]
        for label in (0, 1):
            of_all = (labels[200 * block : 200 * (block + 1)] == label).sum()
            assert abs((labels[inside] == label).sum() - 0.333 * of_all) < 1


def test_resampled_rows_are_distributed_like_the_recent_ones() -> None:
    # Not the seed of the choice, whose noise would come from the same random numbers.
    random = np.random.default_rng(1)
    # Value 1 has a share of 10%, but 90% among the last tenth of the rows.
    share = np.where(np.arange(20_000) < 18_000, 0.1, 0.9)
    values = (random.random(20_000) < share).astype(int)
    source = make_source([7000, 7000, 6000], value=lambda row: int(values[row]))
    rows = np.array(chosen_rows(RecentResampling(recent=0.1), source, 1000))
    assert values[rows].mean() == pytest.approx(0.9, abs=0.04)
    # Old rows that resemble the recent ones are as likely to be chosen.
    alike = values == 1
    is_old = np.arange(20_000) < 18_000
    assert (rows < 18_000)[alike[rows]].mean() == pytest.approx(is_old[alike].mean(), abs=0.05)
    # Features without drift keep their distribution.
    assert np.bincount(rows % 5) / 1000 == pytest.approx([0.2] * 5, abs=0.05)


def test_resampling_without_drift_is_a_random_choice() -> None:
    rows = np.array(chosen_rows(RecentResampling(), make_source([5000] * 2), 2000))
    assert np.bincount(rows // 1000).tolist() == pytest.approx([200] * 10, abs=50)
    assert np.bincount(rows % 7) / 2000 == pytest.approx([1 / 7] * 7, abs=0.03)


def test_equal_values_of_different_features_are_told_apart() -> None:
    # Recent rows have 1 in one feature and 2 in the other; most old rows have the reverse.
    like_recent = np.arange(10_000) % 20 == 0
    like_recent[9000:] = True
    source = make_source(
        [10_000],
        value=lambda row: 1 if like_recent[row] else 2,
        bag=lambda row: [2 if like_recent[row] else 1],
    )
    rows = chosen_rows(RecentResampling(), source, 500)
    assert like_recent[rows].mean() > 0.95


@pytest.mark.parametrize("subset", SUBSETS)
def test_a_bad_value_is_reported_with_its_row_in_the_file(subset: Subset) -> None:
    source = make_source([20, 20], value=lambda row: 1000 if row == 33 else 1)
    with pytest.raises(DataError, match="id out of range") as raised:
        for part in subset.split(source, SCHEMA, 15, 0):
            list(Reader(part, SCHEMA).batches(1))
    assert raised.value.row == 33


def test_a_changed_source_is_reported() -> None:
    source = make_source([10, 10])
    chosen, _ = Random().split(source, SCHEMA, 10, 0)
    source.tables = [table.slice(1) for table in source.tables]
    with pytest.raises(DataError, match="9 rows were read, but 10 were announced"):
        rows_of(chosen)


@pytest.mark.parametrize("rows", [0, -1, 21])
def test_an_invalid_number_of_rows_is_refused(rows: int) -> None:
    with pytest.raises(ValueError, match=f"{rows} rows cannot be chosen .* out of 20"):
        Prefix().split(make_source([20]), SCHEMA, rows, 0)


def test_invalid_options_are_refused() -> None:
    with pytest.raises(ValueError, match="blocks is 0; it must be at least 1"):
        Stratified(blocks=0)
    for recent in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"recent is {recent}; it must be between 0 and 1"):
            RecentResampling(recent=recent)
