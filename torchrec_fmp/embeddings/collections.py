"""One view of TorchRec's two embedding collections, pooled and unpooled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, TypeVar

import torch
from torch import nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from torchrec_fmp.embeddings.seams import sequence_options
from torchrec_fmp.embeddings.wrappers import CollectionWrapper

Collection: TypeAlias = EmbeddingBagCollection | EmbeddingCollection
C = TypeVar("C", EmbeddingBagCollection, EmbeddingCollection)


def table_configs(collection: Collection) -> Sequence[BaseEmbeddingConfig]:
    """Configs of the tables, in order."""
    if isinstance(collection, EmbeddingBagCollection):
        return list(collection.embedding_bag_configs())
    return list(collection.embedding_configs())


def feature_names(configs: Sequence[BaseEmbeddingConfig]) -> tuple[str, ...]:
    """Features of the tables in order; a feature that several tables serve appears once."""
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
    """A collection on the meta device with the same options and the given tables."""
    device = torch.device("meta")
    if isinstance(collection, EmbeddingBagCollection):
        return EmbeddingBagCollection(
            tables=list(configs), is_weighted=collection.is_weighted(), device=device
        )
    return EmbeddingCollection(tables=list(configs), device=device, **sequence_options(collection))


def features_by_table(module: nn.Module) -> dict[str, list[str]]:
    """Table -> features, for all collections in an unsharded module."""
    return {
        config.name: list(config.feature_names)
        for child in module.modules()
        if isinstance(child, Collection)
        for config in table_configs(child)
    }


def features_by_collection(model: nn.Module) -> dict[tuple[str, str], list[str]]:
    """(fqn of a collection, table) -> features, for an unsharded model.

    A gated collection has the fqn of the plain collection that it replaces.
    """
    found = {}
    for fqn, module in model.named_modules():
        collection = module.collection if isinstance(module, CollectionWrapper) else module
        if isinstance(collection, Collection):
            for table, features in features_by_table(collection).items():
                found[fqn, table] = features
    return found
