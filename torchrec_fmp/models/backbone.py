"""The backbone interface, and the tables that all backbones read."""

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
        """Builds the model with tables on meta, the rest on `device`; uses the global generator."""

    @abc.abstractmethod
    def dense_modules(self, schema: Schema) -> dict[str, tuple[str, ...]]:
        """Fqn of each module that reads the dense input -> names of the columns that it reads."""


def table_name(feature: str) -> str:
    """Name of the table that serves a feature."""
    return f"t_{feature}"


def check_embedding_dim(embedding_dim: int) -> None:
    """Raises ValueError if FBGEMM does not support tables of this dimension."""
    if embedding_dim < 4 or embedding_dim % 4:
        raise ValueError(f"embedding_dim is {embedding_dim}; it must be a positive multiple of 4")


def embedding_bags(
    schema: Schema, embedding_dim: int, std: float | None = None
) -> EmbeddingBagCollection:
    """One sum-pooled table for each sparse column, on meta.

    Args:
        schema: schema of the data.
        embedding_dim: embedding dimension of every table.
        std: standard deviation of the normal initial weights; None for TorchRec's uniform
            initialization, whose range is wider the fewer rows a table has.
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
