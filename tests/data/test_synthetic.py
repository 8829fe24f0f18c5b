"""The generator: deterministic, and its planted truth is true."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_fmp.data.dataset import Source, Split
from torchrec_fmp.data.synthetic import LABEL, SyntheticDataset

SMALL = SyntheticDataset(rows=70_000, test_rows=40_000, cardinalities=(10, 1000))


def read(source: Source) -> pa.Table:
    return pa.concat_tables([source.read(group) for group in source.row_groups])


@pytest.fixture(scope="module")
def rows() -> dict[str, np.ndarray]:
    """200,000 rows by column."""
    dataset = SyntheticDataset(rows=200_000, cardinalities=(10, 1000))
    table = read(dataset.source("train"))
    return {name: table[name].to_numpy() for name in table.column_names}


def explained(label: np.ndarray, values: np.ndarray) -> float:
    """How much more the label's mean varies between values than chance has it, in sigmas."""
    count = np.bincount(values)
    mean = np.bincount(values, label) / np.maximum(count, 1)
    often = count >= 20
    share = label.mean()
    chi2 = (count * (mean - share) ** 2)[often].sum() / (share * (1 - share))
    freedom = often.sum() - 1
    return float((chi2 - freedom) / np.sqrt(2 * freedom))


def test_same_arguments_give_the_same_rows_in_any_order_of_reading() -> None:
    again = SyntheticDataset(rows=70_000, test_rows=40_000, cardinalities=(10, 1000))
    forward, backward = SMALL.source("train"), again.source("train")
    groups = forward.row_groups
    assert [group.first_row for group in groups] == [0, 32_768, 65_536]
    in_reverse = {group.index: backward.read(group) for group in reversed(backward.row_groups)}
    for group in groups:
        assert forward.read(group).equals(in_reverse[group.index])
        assert forward.read(group).num_rows == group.rows


def test_row_groups_splits_and_seeds_have_different_rows() -> None:
    first, second, _ = SMALL.source("train").row_groups
    other_seed = SyntheticDataset(rows=70_000, cardinalities=(10, 1000), seed=1)
    tables = [
        SMALL.source("train").read(first),
        SMALL.source("train").read(second),
        SMALL.source("test").read(SMALL.source("test").row_groups[0]),
        other_seed.source("train").read(first),
    ]
    for name in ("main_0", "noise_0", "dense_0"):
        distinct = {table[name].to_numpy().tobytes() for table in tables}
        assert len(distinct) == len(tables), name


@settings(deadline=None, max_examples=30)
@given(
    main=st.integers(0, 4),
    pairs=st.integers(0, 3),
    noise=st.integers(0, 4),
    dense=st.integers(0, 3),
    dense_noise=st.integers(0, 3),
    low=st.integers(2, 12),
    spread=st.integers(0, 300),
    data=st.data(),
)
def test_truth_names_every_feature_once_and_rows_fit_the_schema(
    main: int,
    pairs: int,
    noise: int,
    dense: int,
    dense_noise: int,
    low: int,
    spread: int,
    data: st.DataObject,
) -> None:
    if main + pairs + noise == 0:
        main = 1
    dataset = SyntheticDataset(
        rows=500,
        test_rows=10,
        main=main,
        pairs=pairs,
        copies=data.draw(st.integers(0, main)),
        noise=noise,
        dense=dense,
        dense_noise=dense_noise,
        cardinalities=(low, low + spread),
    )
    truth = dataset.truth
    named = [*truth.signal, *truth.redundant, *truth.noise]
    assert sorted(named) == sorted(dataset.schema.features)
    assert len(set(named)) == len(named)
    table = read(dataset.source("train"))
    assert table.column_names == list(dataset.schema.columns)
    for column in dataset.schema.sparse:
        ids = table[column.name].to_numpy()
        assert ids.dtype == np.int32
        assert ids.min() >= 0
        assert ids.max() < column.num_embeddings, column.name
    assert all(np.isfinite(table[name].to_numpy()).all() for name in dataset.schema.dense)
    assert set(table[LABEL].to_numpy()) <= {0, 1}


def test_cardinalities_run_from_the_smallest_to_the_largest_and_copies_merge() -> None:
    dataset = SyntheticDataset(main=5, noise=6, pairs=1, copies=5, cardinalities=(9, 900))
    size = {column.name: column.num_embeddings for column in dataset.schema.sparse}
    for kind, count in (("main", 5), ("noise", 6)):
        sizes = sorted(size[f"{kind}_{i}"] for i in range(count))
        assert (sizes[0], sizes[-1]) == (9, 900)
    # Both signs need as many values.
    assert size["pair_0a"] == size["pair_0b"] == 10
    assert all(size[f"copy_{i}"] == -(-size[f"main_{i}"] // 3) for i in range(5))


def test_ids_are_zipf_distributed_and_reach_most_values(rows: dict[str, np.ndarray]) -> None:
    dataset = SyntheticDataset(cardinalities=(10, 1000))
    for column in dataset.schema.sparse:
        if column.name.startswith(("main", "noise")):
            count = np.bincount(rows[column.name], minlength=column.num_embeddings)
            expected = np.log1p(1 / np.arange(1, len(count) + 1)) / np.log(len(count) + 1)
            assert count / len(rows[LABEL]) == pytest.approx(expected, abs=0.005), column.name
            assert (count > 0).mean() > 0.99


def test_a_copy_is_a_coarser_function_of_its_original(rows: dict[str, np.ndarray]) -> None:
    for i in range(3):
        original, copy = rows[f"main_{i}"], rows[f"copy_{i}"]
        images = {value: set(copy[original == value]) for value in np.unique(original)}
        assert all(len(image) == 1 for image in images.values())
        assert len(np.unique(copy)) < len(images)


def test_main_effects_tell_of_the_label_and_noise_does_not(rows: dict[str, np.ndarray]) -> None:
    for i in range(8):
        assert explained(rows[LABEL], rows[f"main_{i}"]) > 15
    for i in range(9):
        assert abs(explained(rows[LABEL], rows[f"noise_{i}"])) < 5


def test_pair_members_tell_of_the_label_only_together(rows: dict[str, np.ndarray]) -> None:
    for i in range(2):
        left, right = rows[f"pair_{i}a"], rows[f"pair_{i}b"]
        assert abs(explained(rows[LABEL], left)) < 5
        assert abs(explained(rows[LABEL], right)) < 5
        assert explained(rows[LABEL], left * (right.max() + 1) + right) > 15


def test_dense_features_with_an_effect_correlate_with_the_label_and_the_others_do_not(
    rows: dict[str, np.ndarray],
) -> None:
    for name in ("dense_0", "dense_1"):
        assert np.corrcoef(rows[name], rows[LABEL])[0, 1] > 0.05
    for name in ("dense_noise_0", "dense_noise_1"):
        assert abs(np.corrcoef(rows[name], rows[LABEL])[0, 1]) < 0.012
        assert rows[name].dtype == np.float32


def test_noise_is_independent_of_signal_and_of_other_noise(rows: dict[str, np.ndarray]) -> None:
    for i, j in ((0, 1), (2, 5)):
        value = rows[f"noise_{i}"]
        for other in (rows[f"main_{i}"], rows[f"noise_{j}"]):
            assert abs(explained((other == 0).astype(float), value)) < 5


@pytest.mark.parametrize(("bias", "share"), [(0.0, 0.5), (-2.0, 1 / (1 + np.exp(2.0)))])
def test_without_effects_the_share_of_positives_is_that_of_the_bias(
    bias: float, share: float
) -> None:
    dataset = SyntheticDataset(rows=60_000, main=0, pairs=0, copies=0, dense=0, bias=bias)
    label = read(dataset.source("train"))[LABEL].to_numpy()
    assert label.mean() == pytest.approx(share, abs=0.01)


def test_the_default_share_of_positives_is_like_that_of_click_data(
    rows: dict[str, np.ndarray],
) -> None:
    assert 0.15 < rows[LABEL].mean() < 0.35


@pytest.mark.parametrize(("split", "rows"), [("train", 40_000), ("test", 1)])
def test_a_split_has_the_rows_it_was_asked_for(split: Split, rows: int) -> None:
    source = SyntheticDataset(rows=40_000, test_rows=1).source(split)
    assert sum(group.rows for group in source.row_groups) == rows
    assert read(source).num_rows == rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise": -1}, "noise is -1, below 0"),
        ({"dense_noise": -2}, "dense_noise is -2, below 0"),
        ({"rows": 0}, "rows and test_rows must be at least 1"),
        ({"test_rows": 0}, "rows and test_rows must be at least 1"),
        ({"main": 2, "copies": 3}, "3 copies of 2 main effects"),
        ({"cardinalities": (1, 10)}, "cardinalities 1 to 10, need 2 <= low <= high"),
        ({"cardinalities": (20, 10)}, "cardinalities 20 to 10"),
    ],
)
def test_arguments_that_describe_no_data_are_refused(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SyntheticDataset(**arguments)
