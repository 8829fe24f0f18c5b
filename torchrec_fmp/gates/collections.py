"""TorchRec's two embedding collections, pooled and not, seen alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

Collection: TypeAlias = EmbeddingBagCollection | EmbeddingCollection
C = TypeVar("C", EmbeddingBagCollection, EmbeddingCollection)


def table_configs(collection: Collection) -> Sequence[BaseEmbeddingConfig]:
    """Configs of the tables, in order."""
    if isinstance(collection, EmbeddingBagCollection):
        return list(collection.embedding_bag_configs())
    return list(collection.embedding_configs())


def feature_names(configs: Sequence[BaseEmbeddingConfig]) -> tuple[str, ...]:
    """Features of the tables in order, one that several tables serve once."""
    return tuple(dict.fromkeys(feature for config in configs for feature in config.feature_names))


def feature_widths(collection: Collection) -> dict[str, int]:
    """Embedding dimension of each feature, in the order of the tables."""
    configs = table_configs(collection)
    return {name: config.embedding_dim for config in configs for name in config.feature_names}


def weight_name(collection: Collection, table: str) -> str:
    """Name of a table's weight within the collection."""
    is_pooled = isinstance(collection, EmbeddingBagCollection)
    return f"{'embedding_bags' if is_pooled else 'embeddings'}.{table}.weight"


def table_weight(collection: Collection, table: str) -> nn.Parameter:
    """A table's weight, (rows, dimension)."""
    return collection.get_parameter(weight_name(collection, table))


def with_tables(collection: C, configs: Sequence[BaseEmbeddingConfig]) -> C:
    """A collection on meta with the options of this one and other tables."""
    device = torch.device("meta")
    if isinstance(collection, EmbeddingBagCollection):
        return EmbeddingBagCollection(
            tables=list(configs), is_weighted=collection.is_weighted(), device=device
        )
    return EmbeddingCollection(tables=list(configs), device=device, **sequence_options(collection))


def sequence_options(collection: nn.Module) -> dict[str, Any]:
    """What an `EmbeddingCollection`, sharded or not, was made with besides its tables.

    TorchRec 1.6 does not have the last of the options.
    """
    names = ("need_indices", "use_gather_select", "use_gather_select_per_sharding")
    return {
        name: getattr(collection, f"_{name}") for name in names if hasattr(collection, f"_{name}")
    }
