"""Planted features: how their values are drawn, and what each adds to the logit of a row."""

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
    """A sparse feature with one value a row.

    Args:
        name: of the feature.
        cardinality: number of values.
        effect: (cardinality,) what each value adds to the logit; None without effect.
        uniform: values are equally frequent, not Zipf-distributed.
    """

    name: str
    cardinality: int
    effect: Floats | None = None
    uniform: bool = False

    @staticmethod
    def draw(name: str, cardinality: int, strength: float, random: np.random.Generator) -> Field:
        """Normal effects, over the rows of mean 0 and of standard deviation `strength`."""
        effect = random.standard_normal(cardinality)
        share = _zipf_probabilities(cardinality)
        effect -= share @ effect
        return Field(name, cardinality, strength * effect / np.sqrt(share @ effect**2))

    @staticmethod
    def signs(name: str, cardinality: int, random: np.random.Generator) -> Field:
        """+1 and -1 by turns along uniformly drawn values, so that the mean sign is 0."""
        cardinality += cardinality % 2
        effect = random.permutation(np.resize([1.0, -1.0], cardinality))
        return Field(name, cardinality, effect, uniform=True)

    def sample(self, random: np.random.Generator, rows: int) -> Ids:
        """(rows,) values."""
        uniform = random.random(rows)
        if self.uniform:
            return (uniform * self.cardinality).astype(np.int32)
        # Inverse of the continuous density 1/x on [1, cardinality + 1), cut to whole numbers.
        values = np.exp(uniform * np.log(self.cardinality + 1)).astype(np.int32) - 1
        return np.minimum(values, self.cardinality - 1)

    def effect_of(self, values: Ids) -> Floats:
        """(rows,) what each value adds to the logit."""
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
        """(rows,) the copy's values, given the field's."""
        merged: Ids = values // _MERGED_VALUES
        return merged


@dataclass(frozen=True)
class Bag:
    """A sparse feature with several values a row, drawn independently of each other.

    The effect of a bag is the *sum* of its values' effects, as TorchRec's default pooling adds
    their embeddings; an empty bag has none.

    Args:
        field: how each value is drawn, and its effect.
        longest: lengths of bags are uniform on 0 to this.
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
        """(rows,) what each bag adds to the logit."""
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
    """The exact area under the ROC curve, of (rows,) logits and labels; NaN for one class."""
    return exact_auc(torch.from_numpy(logit), torch.from_numpy(labels).double())


def contributions(
    effects: Mapping[tuple[str, ...], Floats], bias: float, labels: Labels
) -> dict[str, float]:
    """AUC of the true logit, less AUC of it without a feature's effect, for each feature.

    Args:
        effects: the features that have an effect together -> (rows,) the effect.
        bias: logit of a row without effects.
        labels: (rows,) 0 or 1.
    """
    whole = auc(logits(effects.values(), bias, len(labels)), labels)
    contribution = {}
    for names in effects:
        # Added up anew: a difference of sums is not exact, and would order rows that are equal.
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
