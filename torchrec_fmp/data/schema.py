"""The columns of a row: label, dense columns, and sparse columns with their cardinalities."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass

from torchrec_fmp import paths


@dataclass(frozen=True)
class SparseColumn:
    """One sparse feature.

    Args:
        name: column name; also the feature's key in the `KeyedJaggedTensor`.
        num_embeddings: number of ids, so valid ids are 0 .. num_embeddings - 1.
    """

    name: str
    num_embeddings: int

    def __post_init__(self) -> None:
        if self.num_embeddings < 1:
            raise ValueError(
                f"sparse column {self.name!r}: num_embeddings is {self.num_embeddings}; "
                "it must be at least 1"
            )


@dataclass(frozen=True)
class Schema:
    """Columns of a data set, in the order the model reads them.

    Raises:
        ValueError: if a column is named twice, or there is no sparse column.
    """

    label: str
    dense: tuple[str, ...]
    sparse: tuple[SparseColumn, ...]

    def __post_init__(self) -> None:
        repeated = [name for name, count in Counter(self.columns).items() if count > 1]
        if repeated:
            raise ValueError(f"columns named more than once in the schema: {repeated}")
        if not self.sparse:
            raise ValueError("the schema names no sparse column; there is no table to train")

    @property
    def columns(self) -> tuple[str, ...]:
        """Label, dense, then sparse column names."""
        return (self.label, *self.dense, *self.sparse_names)

    @property
    def sparse_names(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.sparse)

    @property
    def features(self) -> tuple[str, ...]:
        """All features, dense and sparse; each can be gated and dropped."""
        return self.dense + self.sparse_names

    def only(self, features: Collection[str]) -> Schema:
        """The schema restricted to the given features, in the same order.

        Raises:
            ValueError: if no sparse column is left.
        """
        return Schema(
            label=self.label,
            dense=tuple(name for name in self.dense if name in features),
            sparse=tuple(column for column in self.sparse if column.name in features),
        )

    def save(self, path: str) -> None:
        """Writes the schema as JSON."""
        with paths.open_path(path, "w") as file:
            json.dump(asdict(self), file, indent=2)
            file.write("\n")

    @staticmethod
    def load(path: str) -> Schema:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is not a schema; the message names the file.
        """
        with paths.open_path(path, "r") as file:
            text = file.read()
        try:
            content = json.loads(text)
            return Schema(
                label=content["label"],
                dense=tuple(content["dense"]),
                sparse=tuple(SparseColumn(**column) for column in content["sparse"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not a schema file written by `torchrec-fmp prepare`: {error!r}"
            ) from error
