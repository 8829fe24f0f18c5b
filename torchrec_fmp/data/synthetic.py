"""Synthetic click data with planted truth: it is known which features carry signal.

The logit of a row is a bias plus

- a *main effect* of each `main_i`: one number per value, scaled to the field's strength;
- an *interaction* of each pair `pair_ia`, `pair_ib`: a product of two signs, so neither field
  alone carries information about the label;
- a *dense effect*, linear in each `dense_i`;
- a *main effect* of each `multi_i`, whose rows hold bags of values: the sum over the bag.

`copy_i` is `main_i` with its values merged in groups, so it carries no information beyond
`main_i`. `noise_i`, `multi_noise_i` and `dense_noise_i` are independent of everything.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from torchrec_fmp.data import planted
from torchrec_fmp.data.dataset import Dataset, PlantedTruth, RowGroup, Source, Split
from torchrec_fmp.data.planted import Bag, Copy, Field, Floats, Labels
from torchrec_fmp.data.schema import Schema, SparseColumn

LABEL = "label"
_ROWS_PER_GROUP = 32_768
_NAME = "synthetic"
_COUNTS = (
    *("main", "pairs", "copies", "noise", "dense", "dense_noise"),
    *("multi_valued", "multi_valued_noise"),
)


@dataclass(frozen=True)
class SyntheticDataset(Dataset):
    """Generates rows; the same arguments always give the same rows.

    Args:
        rows: number of training rows.
        test_rows: number of rows in the test split, drawn from the same distribution.
        main: number of sparse features with a main effect.
        pairs: number of pairs of sparse features that matter only together.
        copies: number of redundant sparse features.
        noise: number of sparse features without any effect.
        dense: number of dense features with an effect.
        dense_noise: number of dense features without any effect.
        multi_valued: number of sparse features with a main effect and several values per row.
        multi_valued_noise: number of sparse features without any effect and several values per row.
        strongest: standard deviation of the strongest effect, in logits.
        weakest: standard deviation of the weakest effect; the others are geometrically spaced
            between the two.
        pair_strength: strength of each interaction, in logits.
        cardinalities: smallest and largest number of values of a field, Zipf-distributed.
        noise_cardinalities: `cardinalities` of the sparse features without effect; the same by
            default.
        longest_bag: number of values in the largest bag of a multi-valued feature; the smallest bag
            is empty.
        bias: logit of a row without effects. Without any effects, -4 gives 1.8% positives;
            effects raise this share.
        seed: seed of all random draws.

    Raises:
        ValueError: for counts below 0, more copies than main effects, or no rows.
    """

    rows: int = 400_000
    test_rows: int = 100_000
    main: int = 8
    pairs: int = 2
    copies: int = 3
    noise: int = 9
    dense: int = 2
    dense_noise: int = 2
    multi_valued: int = 0
    multi_valued_noise: int = 0
    strongest: float = 0.8
    weakest: float = 0.3
    pair_strength: float = 0.6
    cardinalities: tuple[int, int] = (10, 100_000)
    noise_cardinalities: tuple[int, int] | None = None
    longest_bag: int = 8
    bias: float = -1.5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if getattr(self, name) < 0:
                raise ValueError(
                    f"synthetic data: {name} is {getattr(self, name)}; it must be at least 0"
                )
        if self.rows < 1 or self.test_rows < 1:
            raise ValueError("synthetic data: rows and test_rows must be at least 1")
        if self.longest_bag < 1:
            raise ValueError(
                f"synthetic data: longest_bag is {self.longest_bag}; it must be at least 1"
            )
        if self.copies > self.main:
            raise ValueError(
                f"synthetic data: {self.copies} copies of {self.main} main effects; "
                "each copies a different one, so there can be no more copies than main effects"
            )
        for name in ("cardinalities", "noise_cardinalities"):
            low, high = getattr(self, name) or self.cardinalities
            if not 2 <= low <= high:
                raise ValueError(
                    f"synthetic data: {name} are {low} to {high}; "
                    "they must satisfy 2 <= low <= high"
                )

    @cached_property
    def schema(self) -> Schema:
        sparse = [SparseColumn(feature.name, feature.cardinality) for feature in self._sparse]
        dense = _names("dense", self.dense) + _names("dense_noise", self.dense_noise)
        return Schema(label=LABEL, dense=tuple(dense), sparse=tuple(sparse))

    @property
    def truth(self) -> PlantedTruth:
        main, multi = _names("main", self.main), _names("multi", self.multi_valued)
        pairs = [name for pair in self._pairs for name in pair]
        noise = _names("noise", self.noise) + _names("multi_noise", self.multi_valued_noise)
        return PlantedTruth(
            signal=(*main, *pairs, *multi, *_names("dense", self.dense)),
            redundant=tuple(_names("copy", self.copies)),
            noise=(*noise, *_names("dense_noise", self.dense_noise)),
        )

    def source(self, split: Split) -> Source:
        return _SyntheticSource(self, split)

    def oracle_auc(self) -> float:
        """AUC of the true logit on the test split; NaN if the split has only one class."""
        effects, labels = self._test_effects()
        return planted.auc(planted.logits(effects.values(), self.bias, len(labels)), labels)

    def oracle_contributions(self) -> dict[str, float]:
        """For each feature: AUC of the true logit minus its AUC without the feature's effect.

        Uses the test split, with every effect of all its rows in memory at 8 bytes each. The
        result is exactly 0 for copies and noise. Both features of a pair get the contribution of
        their interaction. An effect too weak for the number of test rows may come out slightly
        below 0.
        """
        effects, labels = self._test_effects()
        useless = dict.fromkeys(self.schema.features, 0.0)
        return useless | planted.contributions(effects, self.bias, labels)

    def generate(self, split: Split, group: RowGroup) -> pa.Table:
        """The rows of one row group of a split."""
        columns = self._columns(split, group)
        return pa.table({name: columns[name] for name in self.schema.columns})

    @property
    def _pairs(self) -> list[tuple[str, str]]:
        return [(f"pair_{i}a", f"pair_{i}b") for i in range(self.pairs)]

    @cached_property
    def _sparse(self) -> list[Field | Copy | Bag]:
        """The sparse features in the order of the schema."""
        random = np.random.default_rng((self.seed, 0))
        main = self._main_effects("main", self.main, 1, random)
        # Pairs are learned from their products, so their fields have few values.
        pairs = [
            Field.signs(name, self.cardinalities[0], random)
            for pair in self._pairs
            for name in pair
        ]
        copies = [Copy(f"copy_{i}", field) for i, field in enumerate(main[: self.copies])]
        noise = self._without_effect("noise", self.noise, random)
        # A separate generator keeps the other features the same for any number of these.
        random = np.random.default_rng((self.seed, 2))
        mean_length = self.longest_bag / 2
        multi = self._main_effects("multi", self.multi_valued, mean_length, random)
        multi += self._without_effect("multi_noise", self.multi_valued_noise, random)
        return [*main, *pairs, *copies, *noise, *(Bag(field, self.longest_bag) for field in multi)]

    def _main_effects(
        self, prefix: str, count: int, values: float, random: np.random.Generator
    ) -> list[Field]:
        """Fields with `values` values per row on average, whose effects add up."""
        # The variance of a sum of independent effects of mean 0 is theirs times their mean number.
        strengths = self._strengths(count) / np.sqrt(values)
        return [
            Field.draw(name, cardinality, strength, random)
            for name, cardinality, strength in zip(
                _names(prefix, count),
                planted.spread(self.cardinalities, count, random),
                strengths,
                strict=True,
            )
        ]

    def _without_effect(self, prefix: str, count: int, random: np.random.Generator) -> list[Field]:
        cardinalities = self.noise_cardinalities or self.cardinalities
        spread = planted.spread(cardinalities, count, random)
        return [
            Field(name, cardinality)
            for name, cardinality in zip(_names(prefix, count), spread, strict=True)
        ]

    def _strengths(self, count: int) -> Floats:
        return np.geomspace(self.strongest, self.weakest, count)

    def _columns(self, split: Split, group: RowGroup) -> dict[str, Any]:
        """The features and the label of a row group, as NumPy arrays, or Arrow lists for bags."""
        rows = group.rows
        random, bags_random = (
            np.random.default_rng((self.seed, stream, split == "test", group.index))
            for stream in (1, 3)
        )
        columns: dict[str, Any] = {}
        for feature in self._sparse:
            match feature:
                case Field():
                    columns[feature.name] = feature.sample(random, rows)
                case Copy():
                    columns[feature.name] = feature.merge(columns[feature.field.name])
                case Bag():
                    columns[feature.name] = feature.sample(bags_random, rows)
        for name in self.schema.dense:
            columns[name] = random.standard_normal(rows, dtype=np.float32)
        effects = (effect for _, effect in self._effects(columns))
        probabilities = 1 / (1 + np.exp(-planted.logits(effects, self.bias, rows)))
        columns[LABEL] = (random.random(rows) < probabilities).astype(np.int8)
        return columns

    def _effects(self, columns: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Floats]]:
        """Features with a joint effect, and the effect on each row's logit."""
        for name, strength in zip(
            _names("dense", self.dense), self._strengths(self.dense), strict=True
        ):
            yield (name,), strength * columns[name]
        fields = {field.name: field for field in self._sparse if not isinstance(field, Copy)}
        for name in _names("main", self.main):
            yield (name,), fields[name].effect_of(columns[name])
        for left, right in self._pairs:
            signs = fields[left].effect_of(columns[left]) * fields[right].effect_of(columns[right])
            yield (left, right), self.pair_strength * signs
        for name in _names("multi", self.multi_valued):
            yield (name,), fields[name].effect_of(columns[name])

    def _test_effects(self) -> tuple[dict[tuple[str, ...], Floats], Labels]:
        """The effects and the labels of the test split."""
        effects: defaultdict[tuple[str, ...], Floats]
        effects = defaultdict(lambda: np.empty(self.test_rows))
        labels = np.empty(self.test_rows, np.int8)
        for group in self.source("test").row_groups:
            place = slice(group.first_row, group.first_row + group.rows)
            columns = self._columns("test", group)
            labels[place] = columns[LABEL]
            for names, effect in self._effects(columns):
                effects[names][place] = effect
        return effects, labels


class _SyntheticSource(Source):
    def __init__(self, dataset: SyntheticDataset, split: Split) -> None:
        self._dataset = dataset
        self._split = split
        rows = dataset.rows if split == "train" else dataset.test_rows
        self._groups = [
            RowGroup(f"{_NAME} {split}", index, first, min(_ROWS_PER_GROUP, rows - first))
            for index, first in enumerate(range(0, rows, _ROWS_PER_GROUP))
        ]

    @property
    def row_groups(self) -> Sequence[RowGroup]:
        return self._groups

    def read(self, group: RowGroup) -> pa.Table:
        return self._dataset.generate(self._split, group)


def _names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}_{i}" for i in range(count)]
