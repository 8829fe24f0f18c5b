"""Values to ids: counting, vocabularies, hashing."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_fmp.data import vocabulary as vocabulary_module
from torchrec_fmp.data.vocabulary import HashBuckets, ValueCounts, Vocabulary

values = st.lists(st.text(st.characters(codec="utf-8"), max_size=2), max_size=40)


def strings(items: list[str]) -> pa.LargeStringArray:
    return pa.array(items, pa.large_string())


def count(chunks: list[list[str]]) -> ValueCounts:
    counts = ValueCounts()
    for chunk in chunks:
        counts.add(strings(chunk))
    return counts


@settings(deadline=None)
@given(chunks=st.lists(values, max_size=6), merge_rows=st.integers(1, 50))
def test_counts_are_exact_however_often_they_are_merged(chunks, merge_rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary_module, "_MERGE_ROWS", merge_rows)
        table = count(chunks).table().to_pydict()
    expected = Counter(value for chunk in chunks for value in chunk)
    assert len(table["value"]) == len(expected)
    assert dict(zip(table["value"], table["count"], strict=True)) == expected


@settings(deadline=None)
@given(train=values, served=values, min_count=st.integers(1, 3))
def test_ids_are_ranks_of_frequent_values_and_zero_for_all_others(train, served, min_count):
    vocabulary = Vocabulary.of_frequent(count([train]), min_count)
    ranked = sorted(Counter(train).items(), key=lambda item: (-item[1], item[0].encode()))
    frequent = [value for value, occurrences in ranked if occurrences >= min_count]
    assert vocabulary.values.to_pylist() == frequent
    assert vocabulary.num_embeddings == len(frequent) + 1
    expected = [frequent.index(value) + 1 if value in frequent else 0 for value in served]
    assert vocabulary.ids(strings(served)).to_pylist() == expected
    assert vocabulary.ids(strings(served)).type == pa.int32()


def test_a_hashed_id_is_the_same_on_every_machine():
    # Digests printed by `b2sum -l 64` for "a" and for empty input.
    digests = ["40f89e395b66422f", "e4a6a0577479b2b4", "40f89e395b66422f"]
    expected = [int.from_bytes(bytes.fromhex(digest), "little") % 1000 for digest in digests]
    assert HashBuckets(1000).ids(strings(["a", "", "a"])).to_pylist() == expected


@settings(deadline=None)
@given(items=values, buckets=st.integers(1, 7))
def test_hashed_ids_stay_below_the_number_of_buckets(items, buckets):
    ids = HashBuckets(buckets).ids(strings(items))
    assert ids.type == pa.int32()
    assert len(ids) == len(items)
    assert all(0 <= id_ < buckets for id_ in ids.to_pylist())
