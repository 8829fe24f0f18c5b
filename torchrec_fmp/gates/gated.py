"""Modules that gate the features of embedding collections and the columns of dense inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_fmp.embeddings.collections import Collection, feature_names, table_configs
from torchrec_fmp.embeddings.wrappers import CollectionWrapper, Wrapper
from torchrec_fmp.gates.feature_gates import FeatureGates
from torchrec_fmp.gates.scale import Scale, scale_keys, scale_sequences
from torchrec_fmp.gates.step_counter import StepCounter


class GatedCollection(CollectionWrapper):
    """A collection with a gate for each feature, applied after the lookup.

    Collections that read the same features share one `FeatureGates`, with gates for the features of
    all of them. Each collection counts its own steps. Every collection runs once per training
    step, so a feature's noise is the same in all of them, in whatever order a pipeline runs ahead.

    Args:
        collection: the user's collection.
        gates: gates for at least the features of the collection.
    """

    # (embeddings, features, gates, centered) -> embeddings
    scale: ClassVar[Callable[..., Any]]

    def __init__(self, collection: Collection, gates: FeatureGates) -> None:
        super().__init__()
        setattr(self, self.inner, collection)
        self.gates = gates
        self.step = StepCounter()

    @property
    def features(self) -> tuple[str, ...]:
        """Features that the collection reads."""
        return feature_names(table_configs(self.collection))

    def forward(self, features: KeyedJaggedTensor) -> Any:
        """The collection's embeddings times the gates, in the collection's own format."""
        embeddings = self.collection(features)
        gates = self.gates(self.step.next(), features.stride())
        return self.scale(embeddings, self.gates.features, gates, self.gates.config.centered)

    @property
    def device(self) -> torch.device:
        return self.collection.device


class GatedEmbeddingBagCollection(GatedCollection):
    """An `EmbeddingBagCollection` with gates.

    Pooling is linear, so scaling the pooled embedding equals scaling every row that went into it,
    under every sharding type.

    ::

        KeyedJaggedTensor -> EmbeddingBagCollection -> KeyedTensor -> * gates -> KeyedTensor
    """

    inner = "_embedding_bag_collection"
    scale = staticmethod(scale_keys)
    _embedding_bag_collection: EmbeddingBagCollection

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        return self._embedding_bag_collection.embedding_bag_configs()

    def is_weighted(self) -> bool:
        return self._embedding_bag_collection.is_weighted()


class GatedEmbeddingCollection(GatedCollection):
    """An `EmbeddingCollection` with gates; all positions of an example share its gate.

    ::

        KeyedJaggedTensor -> EmbeddingCollection -> dict[str, JaggedTensor] -> * gates -> the same
    """

    inner = "_embedding_collection"
    scale = staticmethod(scale_sequences)
    _embedding_collection: EmbeddingCollection

    def embedding_configs(self) -> list[EmbeddingConfig]:
        return self._embedding_collection.embedding_configs()

    def embedding_dim(self) -> int:
        return self._embedding_collection.embedding_dim()

    def need_indices(self) -> bool:
        return self._embedding_collection.need_indices()


class GatedDense(Wrapper):
    """A module that reads dense features, with a gate on each column of its input.

    Args:
        module: the user's module; its only argument is the dense input (B, F).
        gates: one gate for each column, in order.
    """

    inner = "_module"

    def __init__(self, module: nn.Module, gates: FeatureGates) -> None:
        super().__init__()
        self._module = module
        self.gates = gates
        self.step = StepCounter()

    def forward(self, dense_BF: Tensor) -> Tensor:
        """The module's output for the gated input.

        Raises:
            ValueError: if the number of input columns differs from the number of gates.
        """
        if dense_BF.shape[-1] != len(self.gates.features):
            raise ValueError(
                f"the dense input has {dense_BF.shape[-1]} columns and {self.gates.name!r} has "
                f"{len(self.gates.features)} gates: name every column, in order, in attach_gates"
            )
        gates = self.gates(self.step.next(), dense_BF.shape[0])
        lengths = [1] * len(self.gates.features)
        centered = self.gates.config.centered
        return self._module(Scale.apply(dense_BF, gates.to(dense_BF.dtype), lengths, centered))
