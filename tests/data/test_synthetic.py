"""The generator is deterministic, and its data match its planted truth."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_fmp.data.dataset import Source, Split
from torchrec_fmp.data.reader import Reader
from torchrec_fmp.data.synthetic import LABEL, SyntheticDataset

SMALL = SyntheticDataset(rows=70_000, test_rows=40_000, cardinalities=(10, 1000))
BAGS = replace(SMALL, multi_valued=2, multi_valued_noise=2, longest_bag=4)


def read(source: Source) -> pa.Table:
    return pa.concat_tables([source.read(group) for group in source.row_groups])


def table_of(dataset: SyntheticDataset, split: Split) -> dict[str, np.ndarray]:
    """A split by column."""
    table = read(dataset.source(split))
    return {name: table[name].to_numpy() for name in table.column_names}


@pytest.fixture(scope="module")
def rows() -> dict[str, np.ndarray]:
    """200,000 rows by column."""
    return table_of(SyntheticDataset(rows=200_000, cardinalities=(10, 1000)), "train")


def explained(label: np.ndarray, values: np.ndarray) -> float:
    """Variation of the label's mean between values in excess of chance, in sigmas."""
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


def test_the_rows_of_a_seed_are_the_same_in_every_version() -> None:
    dataset = SyntheticDataset(rows=50, test_rows=10, cardinalities=(10, 100))
    digest = hashlib.sha256()
    for name, column in (*table_of(dataset, "train").items(), *table_of(dataset, "test").items()):
        digest.update(name.encode() + column.tobytes())
    assert digest.hexdigest()[:16] == "42dd6514612c3fdb"


def test_adding_multi_valued_features_does_not_change_the_others() -> None:
    # Bias so high that no label depends on the effects.
    plain, more = (table_of(replace(dataset, bias=1e3), "test") for dataset in (SMALL, BAGS))
    assert [name for name in more if name not in plain] == [
        *("multi_0", "multi_1", "multi_noise_0", "multi_noise_1")
    ]
    assert all((more[name] == column).all() for name, column in plain.items())


def test_noise_has_its_own_cardinalities() -> None:
    dataset = replace(BAGS, noise_cardinalities=(2, 10**6))
    size = {column.name: column.num_embeddings for column in dataset.schema.sparse}
    assert sorted(size[f"noise_{i}"] for i in range(9))[::8] == [2, 10**6]
    assert sorted(size[f"multi_noise_{i}"] for i in range(2)) == [2, 10**6]
    assert max(size[f"main_{i}"] for i in range(8)) == 1000
    rows = table_of(dataset, "test")
    for i in range(9):
        highest = rows[f"noise_{i}"].max()
        assert 0.8 * size[f"noise_{i}"] <= highest + 1 <= size[f"noise_{i}"]
    assert sorted(np.unique(rows[f"noise_{i}"]).size for i in range(9))[0] == 2


def test_bags_have_every_length_and_the_reader_reads_them() -> None:
    (group, *_) = BAGS.source("test").row_groups
    table = BAGS.source("test").read(group)
    batch = next(iter(Reader(BAGS.source("test"), BAGS.schema).batches(group.rows)))
    for name in ("multi_0", "multi_1", "multi_noise_0", "multi_noise_1"):
        lengths = pc.list_value_length(table[name]).to_numpy()
        assert np.bincount(lengths) / group.rows == pytest.approx([0.2] * 5, abs=0.02)
        bags = batch.sparse_features[name]
        assert bags.lengths().numpy() == pytest.approx(lengths)
        assert bags.values().tolist() == pc.list_flatten(table[name]).to_pylist()


def test_bag_values_predict_the_label_and_noise_bag_values_do_not() -> None:
    table = read(BAGS.source("train"))
    for name, tells in (("multi_0", True), ("multi_1", True), ("multi_noise_0", False)):
        row = pc.list_parent_indices(table[name].combine_chunks()).to_numpy()
        value = pc.list_flatten(table[name]).to_numpy()
        seen_in = explained(table[LABEL].to_numpy()[row], value)
        assert seen_in > 10 if tells else abs(seen_in) < 5
        lengths = pc.list_value_length(table[name]).to_numpy()
        assert abs(explained(table[LABEL].to_numpy(), lengths)) < 5


def test_the_strength_of_a_feature_is_the_standard_deviation_of_its_effect() -> None:
    effects, _ = BAGS._test_effects()
    for kind, count in (("main", 8), ("multi", 2), ("dense", 2)):
        for i, strength in ((0, 0.8), (count - 1, 0.3)):
            effect = effects[f"{kind}_{i}",]
            assert effect.std() == pytest.approx(strength, rel=0.05), (kind, i)
            assert effect.mean() == pytest.approx(0, abs=0.02), (kind, i)
    assert effects["pair_0a", "pair_0b"].std() == pytest.approx(0.6, rel=0.05)


def test_the_oracle_auc_drops_for_every_signal_feature_and_for_no_other() -> None:
    lost = BAGS.oracle_contributions()
    truth = BAGS.truth
    assert list(lost) == list(BAGS.schema.features)
    assert min(lost[name] for name in truth.signal) > 0.001
    assert {lost[name] for name in (*truth.redundant, *truth.noise)} == {0.0}
    assert lost["pair_0a"] == lost["pair_0b"] != lost["pair_1a"]
    assert lost["main_0"] > lost["main_7"] and lost["dense_0"] > lost["dense_1"]


def test_a_single_signal_gives_the_oracle_all_its_auc_above_chance() -> None:
    dataset = replace(SMALL, main=1, pairs=0, copies=0, dense=0, strongest=1.0)
    assert dataset.oracle_auc() == pytest.approx(0.75, abs=0.03)
    assert dataset.oracle_contributions()["main_0"] == dataset.oracle_auc() - 0.5


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
    multi_valued=st.integers(0, 2),
    multi_valued_noise=st.integers(0, 2),
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
    multi_valued: int,
    multi_valued_noise: int,
    low: int,
    spread: int,
    data: st.DataObject,
) -> None:
    if main + pairs + noise + multi_valued + multi_valued_noise == 0:
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
        multi_valued=multi_valued,
        multi_valued_noise=multi_valued_noise,
        cardinalities=(low, low + spread),
    )
    truth = dataset.truth
    named = [*truth.signal, *truth.redundant, *truth.noise]
    assert sorted(named) == sorted(dataset.schema.features)
    assert len(set(named)) == len(named)
    table = read(dataset.source("train"))
    assert table.column_names == list(dataset.schema.columns)
    for column in dataset.schema.sparse:
        is_bag = pa.types.is_list(table[column.name].type)
        assert is_bag == column.name.startswith("multi")
        ids = (pc.list_flatten(table[column.name]) if is_bag else table[column.name]).to_numpy()
        assert ids.dtype == np.int32
        assert ids.min() >= 0
        assert ids.max() < column.num_embeddings, column.name
    assert all(np.isfinite(table[name].to_numpy()).all() for name in dataset.schema.dense)
    assert set(table[LABEL].to_numpy()) <= {0, 1}


def test_cardinalities_span_the_given_range_and_copies_merge_values() -> None:
    dataset = SyntheticDataset(main=5, noise=6, pairs=1, copies=5, cardinalities=(9, 900))
    size = {column.name: column.num_embeddings for column in dataset.schema.sparse}
    for kind, count in (("main", 5), ("noise", 6)):
        sizes = sorted(size[f"{kind}_{i}"] for i in range(count))
        assert (sizes[0], sizes[-1]) == (9, 900)
    # Both signs need equally many values.
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


def test_main_effects_predict_the_label_and_noise_does_not(rows: dict[str, np.ndarray]) -> None:
    for i in range(8):
        assert explained(rows[LABEL], rows[f"main_{i}"]) > 15
    for i in range(9):
        assert abs(explained(rows[LABEL], rows[f"noise_{i}"])) < 5


def test_pair_members_predict_the_label_only_together(rows: dict[str, np.ndarray]) -> None:
    for i in range(2):
        left, right = rows[f"pair_{i}a"], rows[f"pair_{i}b"]
        assert abs(explained(rows[LABEL], left)) < 5
        assert abs(explained(rows[LABEL], right)) < 5
        assert explained(rows[LABEL], left * (right.max() + 1) + right) > 15


def test_dense_features_correlate_with_the_label_and_dense_noise_does_not(
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


@pytest.mark.parametrize(("bias", "share"), [(0.0, 0.5), (-4.0, 1 / (1 + np.exp(4.0)))])
def test_without_effects_the_bias_sets_the_share_of_positives(bias: float, share: float) -> None:
    dataset = SyntheticDataset(rows=60_000, main=0, pairs=0, copies=0, dense=0, bias=bias)
    label = read(dataset.source("train"))[LABEL].to_numpy()
    assert label.mean() == pytest.approx(share, abs=0.005)


def test_the_default_share_of_positives_resembles_click_data(
    rows: dict[str, np.ndarray],
) -> None:
    assert 0.15 < rows[LABEL].mean() < 0.35


@pytest.mark.parametrize(("split", "rows"), [("train", 40_000), ("test", 1)])
def test_a_split_has_the_requested_number_of_rows(split: Split, rows: int) -> None:
    source = SyntheticDataset(rows=40_000, test_rows=1).source(split)
    assert sum(group.rows for group in source.row_groups) == rows
    assert read(source).num_rows == rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise": -1}, "noise is -1; it must be at least 0"),
        ({"dense_noise": -2}, "dense_noise is -2; it must be at least 0"),
        ({"rows": 0}, "rows and test_rows must be at least 1"),
        ({"test_rows": 0}, "rows and test_rows must be at least 1"),
        ({"multi_valued": -1}, "multi_valued is -1; it must be at least 0"),
        ({"multi_valued_noise": -1}, "multi_valued_noise is -1; it must be at least 0"),
        ({"longest_bag": 0}, "longest_bag is 0; it must be at least 1"),
        (
            {"noise_cardinalities": (1, 9)},
            "noise_cardinalities are 1 to 9; they must satisfy 2 <= low <= high",
        ),
        ({"main": 2, "copies": 3}, "3 copies of 2 main effects"),
        (
            {"cardinalities": (1, 10)},
            "cardinalities are 1 to 10; they must satisfy 2 <= low <= high",
        ),
        ({"cardinalities": (20, 10)}, "cardinalities are 20 to 10"),
    ],
)
def test_invalid_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SyntheticDataset(**arguments)
