"""The interface of a backbone, and the tables that all of them read."""

from __future__ import annotations

import abc
from functools import partial

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_fmp.data.schema import Schema


class Backbone(abc.ABC):
    """Builds a model for a schema.

    The model takes a `torchrec.datasets.utils.Batch` and returns
    `(loss, (loss, logits, labels))`, as TorchRec's `DLRMTrain` does; loss is a scalar, logits and
    labels are (B,).
    """

    @abc.abstractmethod
    def build(self, schema: Schema, device: torch.device) -> nn.Module:
        """The model, tables on meta and the rest on `device`; draws from the global generator."""

    @abc.abstractmethod
    def dense_modules(self, schema: Schema) -> dict[str, tuple[str, ...]]:
        """Fqn of each module that reads the dense input -> the names of its columns."""


def table_name(feature: str) -> str:
    """Name of the table that serves a feature."""
    return f"t_{feature}"


def check_embedding_dim(embedding_dim: int) -> None:
    """Raises ValueError unless FBGEMM can have tables of this dimension."""
    if embedding_dim < 4 or embedding_dim % 4:
        raise ValueError(f"embedding_dim is {embedding_dim}, it must be a multiple of 4")


def embedding_bags(
    schema: Schema, embedding_dim: int, std: float | None = None
) -> EmbeddingBagCollection:
    """One sum-pooled table for each sparse column, on meta.

    Args:
        schema: of the data.
        embedding_dim: of every table.
        std: standard deviation of the initial weights, which are normal; None is TorchRec's own
            initialization, uniform and the wider the fewer rows a table has.
    """
    tables = [
        EmbeddingBagConfig(
            name=table_name(column.name),
            embedding_dim=embedding_dim,
            num_embeddings=column.num_embeddings,
            feature_names=[column.name],
            init_fn=None if std is None else partial(nn.init.normal_, std=std),
        )
        for column in schema.sparse
    ]
    return EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
