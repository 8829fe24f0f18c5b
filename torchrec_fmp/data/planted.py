"""Planted features: how their values are drawn, and how much each adds to a row's logit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from torchrec_fmp.data.auc import exact_auc

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int32]
Labels = npt.NDArray[np.int8]

# Values merged into one by a redundant copy.
_MERGED_VALUES = 3


@dataclass(frozen=True)
class Field:
    """A sparse feature with one value per row.

    Args:
        name: feature name.
        cardinality: number of values.
        effect: (cardinality,) contribution of each value to the logit; None without effect.
        uniform: whether values are equally frequent instead of Zipf-distributed.
    """

    name: str
    cardinality: int
    effect: Floats | None = None
    uniform: bool = False

    @staticmethod
    def draw(name: str, cardinality: int, strength: float, random: np.random.Generator) -> Field:
        """Draws normal effects with mean 0 and standard deviation `strength` over the rows."""
        effect = random.standard_normal(cardinality)
        share = _zipf_probabilities(cardinality)
        effect -= share @ effect
        return Field(name, cardinality, strength * effect / np.sqrt(share @ effect**2))

    @staticmethod
    def signs(name: str, cardinality: int, random: np.random.Generator) -> Field:
        """Assigns +1 and -1 to equally many uniformly drawn values, so the mean sign is 0."""
        cardinality += cardinality % 2
        effect = random.permutation(np.resize([1.0, -1.0], cardinality))
        return Field(name, cardinality, effect, uniform=True)

    def sample(self, random: np.random.Generator, rows: int) -> Ids:
        """Draws (rows,) values."""
        uniform = random.random(rows)
        if self.uniform:
            return (uniform * self.cardinality).astype(np.int32)
        # Inverts the CDF of the density 1/x on [1, cardinality + 1), truncated to whole numbers.
        values = np.exp(uniform * np.log(self.cardinality + 1)).astype(np.int32) - 1
        return np.minimum(values, self.cardinality - 1)

    def effect_of(self, values: Ids) -> Floats:
        """(rows,) contribution of each value to the logit."""
        assert self.effect is not None
        return self.effect[values]


@dataclass(frozen=True)
class Copy:
    """A redundant feature: a field's values, merged in groups."""

    name: str
    field: Field

    @property
    def cardinality(self) -> int:
        return -(-self.field.cardinality // _MERGED_VALUES)

    def merge(self, values: Ids) -> Ids:
        """(rows,) the copy's values for the field's values."""
        merged: Ids = values // _MERGED_VALUES
        return merged


@dataclass(frozen=True)
class Bag:
    """A sparse feature with several values per row, drawn independently of each other.

    The effect of a bag is the *sum* of its values' effects, just as TorchRec's default pooling
    adds their embeddings. An empty bag has no effect.

    Args:
        field: distribution and effect of each value.
        longest: maximum bag length; lengths are uniform from 0 to this.
    """

    field: Field
    longest: int

    @property
    def name(self) -> str:
        return self.field.name

    @property
    def cardinality(self) -> int:
        return self.field.cardinality

    def sample(self, random: np.random.Generator, rows: int) -> pa.ListArray:
        """(rows,) lists of int32 values."""
        offsets = np.zeros(rows + 1, np.int32)
        np.cumsum(random.integers(0, self.longest + 1, rows), out=offsets[1:])
        return pa.ListArray.from_arrays(offsets, self.field.sample(random, int(offsets[-1])))

    def effect_of(self, bags: pa.ListArray) -> Floats:
        """(rows,) contribution of each bag to the logit."""
        rows = np.repeat(np.arange(len(bags)), bags.value_lengths().to_numpy())
        effect = np.zeros(len(bags))
        of_values = self.field.effect_of(bags.flatten().to_numpy())
        effect += np.bincount(rows, of_values, minlength=len(bags))
        return effect


def logits(effects: Iterable[Floats], bias: float, rows: int) -> Floats:
    """(rows,) the bias plus the effects, each (rows,)."""
    logit = np.full(rows, bias, np.float64)
    for effect in effects:
        logit += effect
    return logit


def auc(logit: Floats, labels: Labels) -> float:
    """The exact area under the ROC curve of (rows,) logits and labels; NaN for one class."""
    return exact_auc(torch.from_numpy(logit), torch.from_numpy(labels).double())


def contributions(
    effects: Mapping[tuple[str, ...], Floats], bias: float, labels: Labels
) -> dict[str, float]:
    """For each feature, AUC of the true logit minus its AUC without the feature's effect.

    Args:
        effects: features with a joint effect -> (rows,) that effect.
        bias: logit of a row without effects.
        labels: (rows,) 0 or 1.
    """
    whole = auc(logits(effects.values(), bias, len(labels)), labels)
    contribution = {}
    for names in effects:
        # Summed again: a difference of sums is inexact and would order rows that are equal.
        others = (effect for other, effect in effects.items() if other != names)
        without = auc(logits(others, bias, len(labels)), labels)
        contribution.update(dict.fromkeys(names, whole - without))
    return contribution


def spread(cardinalities: tuple[int, int], count: int, random: np.random.Generator) -> list[int]:
    """Cardinalities between the two, geometrically spaced, in random order."""
    low, high = cardinalities
    spaced = np.geomspace(low, high, count).round().astype(int)
    return [int(cardinality) for cardinality in random.permutation(spaced)]


def _zipf_probabilities(cardinality: int) -> Floats:
    """Probabilities of the values that `Field.sample` draws."""
    edges = np.log(np.arange(1, cardinality + 2))
    return np.diff(edges) / edges[-1]
