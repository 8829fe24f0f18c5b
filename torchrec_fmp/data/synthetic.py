"""Synthetic click data with planted truth: which features carry signal is known.

The logit of a row is a bias plus

- a *main effect* of each `main_i`: one number per value, of the field's strength;
- an *interaction* of each pair `pair_ia`, `pair_ib`: a product of two signs, so that neither field
  alone says anything about the label;
- a *dense effect*, linear in each `dense_i`.

`copy_i` is a function of `main_i` that merges its values in groups, so it says nothing that
`main_i` does not; `noise_i` and `dense_noise_i` are independent of everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from torchrec_fmp.data.dataset import Dataset, PlantedTruth, RowGroup, Source, Split
from torchrec_fmp.data.schema import Schema, SparseColumn

LABEL = "label"
_ROWS_PER_GROUP = 32_768
# Values merged into one by a redundant copy.
_MERGED_VALUES = 3
_NAME = "synthetic"


@dataclass(frozen=True)
class SyntheticDataset(Dataset):
    """A generator of rows; the same arguments always give the same rows.

    Args:
        rows: training rows.
        test_rows: rows of the test split, drawn from the same distribution.
        main: sparse features with a main effect.
        pairs: pairs of sparse features that matter only together.
        copies: redundant sparse features.
        noise: sparse features without any effect.
        dense: dense features with an effect.
        dense_noise: dense features without any effect.
        strongest: standard deviation of the strongest effect, in logits.
        weakest: of the weakest; the others lie between, geometrically.
        pair_strength: of each interaction, in logits.
        cardinalities: smallest and largest number of values of a field, Zipf-distributed.
        bias: logit of a row without effects.
        seed: of everything.

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
    strongest: float = 0.8
    weakest: float = 0.3
    pair_strength: float = 0.6
    cardinalities: tuple[int, int] = (10, 100_000)
    bias: float = -1.5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("main", "pairs", "copies", "noise", "dense", "dense_noise"):
            if getattr(self, name) < 0:
                raise ValueError(f"synthetic data: {name} is {getattr(self, name)}, below 0")
        if self.rows < 1 or self.test_rows < 1:
            raise ValueError("synthetic data: rows and test_rows must be at least 1")
        if self.copies > self.main:
            raise ValueError(
                f"synthetic data: {self.copies} copies of {self.main} main effects; "
                "each copies another one, so there can be no more copies than main effects"
            )
        low, high = self.cardinalities
        if not 2 <= low <= high:
            raise ValueError(
                f"synthetic data: cardinalities {low} to {high}, need 2 <= low <= high"
            )

    @cached_property
    def schema(self) -> Schema:
        sparse = [SparseColumn(field.name, field.cardinality) for field in self._fields]
        dense = _names("dense", self.dense) + _names("dense_noise", self.dense_noise)
        return Schema(label=LABEL, dense=tuple(dense), sparse=tuple(sparse))

    @property
    def truth(self) -> PlantedTruth:
        pairs = [name for i in range(self.pairs) for name in (f"pair_{i}a", f"pair_{i}b")]
        return PlantedTruth(
            signal=(*_names("main", self.main), *pairs, *_names("dense", self.dense)),
            redundant=tuple(_names("copy", self.copies)),
            noise=(*_names("noise", self.noise), *_names("dense_noise", self.dense_noise)),
        )

    def source(self, split: Split) -> Source:
        return _SyntheticSource(self, split)

    @cached_property
    def _fields(self) -> list[_Field]:
        """The drawn sparse fields, and the copies, in the order of the schema."""
        random = np.random.default_rng((self.seed, 0))
        main = [
            _Field.draw(name, cardinality, strength, random)
            for name, cardinality, strength in zip(
                _names("main", self.main),
                _spread(self.cardinalities, self.main, random),
                _strengths(self.strongest, self.weakest, self.main),
                strict=True,
            )
        ]
        # Pairs are learned from their products, so their fields have few values.
        pairs = [
            _Field.signs(f"pair_{i}{side}", self.cardinalities[0], random)
            for i in range(self.pairs)
            for side in "ab"
        ]
        copies = [field.merged(f"copy_{i}") for i, field in enumerate(main[: self.copies])]
        noise = [
            _Field(name, cardinality)
            for name, cardinality in zip(
                _names("noise", self.noise),
                _spread(self.cardinalities, self.noise, random),
                strict=True,
            )
        ]
        return [*main, *pairs, *copies, *noise]

    def generate(self, rows: int, key: Sequence[int]) -> pa.Table:
        """`rows` rows as a table; `key` says which part of the stream they are."""
        random = np.random.default_rng((self.seed, 1, *key))
        columns: dict[str, npt.NDArray[np.generic]] = {}
        logit = np.full(rows, self.bias)
        drawn = {field.name: field for field in self._fields if field.merges is None}
        for field in drawn.values():
            columns[field.name] = field.sample(random, rows)
        strengths = _strengths(self.strongest, self.weakest, self.dense)
        for name, strength in zip(_names("dense", self.dense), strengths, strict=True):
            columns[name] = random.standard_normal(rows, dtype=np.float32)
            logit += strength * columns[name]
        for name in _names("dense_noise", self.dense_noise):
            columns[name] = random.standard_normal(rows, dtype=np.float32)
        for i in range(self.main):
            logit += drawn[f"main_{i}"].effect_of(columns[f"main_{i}"])
        for i in range(self.pairs):
            left, right = f"pair_{i}a", f"pair_{i}b"
            signs = drawn[left].effect_of(columns[left]) * drawn[right].effect_of(columns[right])
            logit += self.pair_strength * signs
        for field in self._fields:
            if field.merges is not None:
                columns[field.name] = columns[field.merges] // _MERGED_VALUES
        probability = 1 / (1 + np.exp(-logit))
        columns[LABEL] = (random.random(rows) < probability).astype(np.int8)
        return pa.table({name: columns[name] for name in self.schema.columns})


@dataclass(frozen=True)
class _Field:
    """A sparse field: its values, and the effect of each on the logit."""

    name: str
    cardinality: int
    effect: npt.NDArray[np.float64] | None = None
    merges: str | None = None

    @staticmethod
    def draw(name: str, cardinality: int, strength: float, random: np.random.Generator) -> _Field:
        effect = random.standard_normal(cardinality)
        share = _zipf_probabilities(cardinality)
        effect -= share @ effect
        return _Field(name, cardinality, strength * effect / np.sqrt(share @ effect**2))

    @staticmethod
    def signs(name: str, cardinality: int, random: np.random.Generator) -> _Field:
        """+1 and -1 by turns along uniformly drawn values, so that the mean sign is 0."""
        cardinality += cardinality % 2
        return _Field(name, cardinality, random.permutation(np.resize([1.0, -1.0], cardinality)))

    def merged(self, name: str) -> _Field:
        cardinality = -(-self.cardinality // _MERGED_VALUES)
        return _Field(name, cardinality, merges=self.name)

    def sample(self, random: np.random.Generator, rows: int) -> npt.NDArray[np.int32]:
        uniform = random.random(rows)
        if self.name.startswith("pair"):
            return (uniform * self.cardinality).astype(np.int32)
        # Inverse of the continuous density 1/x on [1, cardinality + 1), cut to whole numbers.
        values = np.exp(uniform * np.log(self.cardinality + 1)).astype(np.int32) - 1
        return np.minimum(values, self.cardinality - 1)

    def effect_of(self, values: npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
        assert self.effect is not None
        return self.effect[values]


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
        return self._dataset.generate(group.rows, (self._split == "test", group.index))


def _names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}_{i}" for i in range(count)]


def _strengths(strongest: float, weakest: float, count: int) -> npt.NDArray[np.float64]:
    return np.geomspace(strongest, weakest, count)


def _spread(cardinalities: tuple[int, int], count: int, random: np.random.Generator) -> list[int]:
    """Cardinalities between the two, geometrically spaced, in random order."""
    low, high = cardinalities
    spaced = np.geomspace(low, high, count).round().astype(int)
    return [int(cardinality) for cardinality in random.permutation(spaced)]


def _zipf_probabilities(cardinality: int) -> npt.NDArray[np.float64]:
    """Probabilities of the values that `_Field.sample` draws."""
    edges = np.log(np.arange(1, cardinality + 2))
    return np.diff(edges) / edges[-1]
