"""ERASE's plain MLP over concatenated embeddings: module, cut rule and backbone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torchrec.models.dlrm import DLRMTrain
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.regroup import KTRegroupAsDict
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_fmp.data.schema import Schema
from torchrec_fmp.embeddings.collections import feature_names, feature_widths
from torchrec_fmp.embeddings.fqns import join_fqn
from torchrec_fmp.models.backbone import Backbone, check_embedding_dim, embedding_bags
from torchrec_fmp.models.batch_norm import GlobalBatchNorm1d
from torchrec_fmp.surgery.cut_tables import cut_tables
from torchrec_fmp.surgery.linear import cut_linear, kept_columns
from torchrec_fmp.surgery.rules import Cutter, cut_rule

_GROUP = "sparse"
# From ERASE, models/basemodel.py.
_EMBEDDING_STD = 0.01


class Mlp(nn.Module):
    """An MLP over the concatenated dense input and pooled embeddings.

    The first layer is the sum of a layer over the embeddings and a layer over the dense input. This
    equals one layer over their concatenation, and lets dense columns be gated.

    ::

        dense ───────────────────▶ dense_layer ──┐
        KeyedJaggedTensor ─ EBC ─▶ sparse_layer ─┴ + ─ norm, ReLU, dropout ─ ... ─ Linear ─▶ logit

    Args:
        embedding_bag_collection: tables of F features, one table per feature.
        dense_in_features: number N of dense columns.
        layers: sizes of the hidden layers.
        dropout: dropout probability after each hidden layer.
        batch_norm: whether each hidden layer is normalized before its ReLU.
        device: device of all parameters except the tables.
    """

    def __init__(
        self,
        embedding_bag_collection: EmbeddingBagCollection,
        dense_in_features: int,
        layers: Sequence[int],
        dropout: float,
        batch_norm: bool,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.embedding_bag_collection = embedding_bag_collection
        self.regroup = regrouped(embedding_bag_collection)
        width = sum(
            config.embedding_dim * len(config.feature_names)
            for config in embedding_bag_collection.embedding_bag_configs()
        )
        self.sparse_layer = nn.Linear(width, layers[0], device=device)
        self.dense_layer = None
        if dense_in_features:
            self.dense_layer = nn.Linear(dense_in_features, layers[0], bias=False, device=device)
        self.over = nn.Sequential(*_over_layers(layers, dropout, batch_norm, device))

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Logits, (B, 1).

        Args:
            dense_features: (B, N) float32 dense input.
            sparse_features: KeyedJaggedTensor with the keys of all features; other keys are
                allowed.
        """
        pooled = self.embedding_bag_collection(sparse_features)
        hidden_BH = self.sparse_layer(self.regroup([pooled])[_GROUP])
        if self.dense_layer is not None:
            hidden_BH = hidden_BH + self.dense_layer(dense_features)
        return self.over(hidden_BH)


def regrouped(collection: EmbeddingBagCollection) -> KTRegroupAsDict:
    """Puts the pooled embeddings in table order, regardless of their order in the plan."""
    return KTRegroupAsDict([[*feature_names(collection.embedding_bag_configs())]], [_GROUP])


@cut_rule(Mlp)
def cut_mlp(model: Mlp, fqn: str, cutter: Cutter) -> None:
    """Cuts the tables, the feature order and the first layer.

    The first layer reads the concatenated embeddings linearly, so closed gates drop its columns.
    Gates between 0 and 1 scale its columns if they do not fold into a table. The dense input has a
    separate layer, and batch normalization follows both layers, so nothing is cut there.

    Raises:
        ValueError: if no sparse feature is left.
    """
    collection = model.embedding_bag_collection
    smaller, gates = cut_tables(collection, join_fqn(fqn, "embedding_bag_collection"), cutter)
    if smaller is None:
        raise ValueError(f"{fqn or 'the model'} has no sparse feature left: keep at least one")
    model.embedding_bag_collection = smaller
    model.regroup = regrouped(smaller)
    cut_linear(
        model.sparse_layer,
        join_fqn(fqn, "sparse_layer"),
        cutter,
        *kept_columns(feature_widths(collection).items(), gates),
    )


def _over_layers(
    layers: Sequence[int], dropout: float, batch_norm: bool, device: torch.device
) -> Iterator[nn.Module]:
    """Yields the layers after the first linear layer."""
    for size, next_size in zip(layers, [*layers[1:], 1], strict=True):
        if batch_norm:
            yield GlobalBatchNorm1d(size, device=device)
        yield nn.ReLU()
        yield nn.Dropout(dropout)
        yield nn.Linear(size, next_size, device=device)


class MlpBackbone(Backbone):
    """The default backbone of ERASE (arXiv:2403.12660), models/rec/mlp.py of its repository.

    Tables start from a normal distribution of standard deviation 0.01, as in ERASE. ERASE has no
    dense columns; here they are concatenated with the embeddings.

    Args:
        embedding_dim: embedding dimension of every table; FBGEMM needs a multiple of 4.
        layers: sizes of the hidden layers; a last layer of size 1 is added.
        dropout: dropout probability after each hidden layer.
        batch_norm: whether each hidden layer is normalized before its ReLU, over the batches of
            all ranks.

    Raises:
        ValueError: if `layers` is empty or a size is not positive, `embedding_dim` is not a
            multiple of 4, or `dropout` is not in [0, 1).
    """

    def __init__(
        self,
        embedding_dim: int = 8,
        layers: Sequence[int] = (16, 16),
        dropout: float = 0.2,
        batch_norm: bool = True,
    ) -> None:
        check_embedding_dim(embedding_dim)
        if not layers or min(layers) < 1:
            raise ValueError(
                f"layers is {list(layers)}; it must hold at least one size, all positive"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; it must be at least 0 and below 1")
        self.embedding_dim = embedding_dim
        self.layers = tuple(layers)
        self.dropout = dropout
        self.batch_norm = batch_norm

    def build(self, schema: Schema, device: torch.device) -> nn.Module:
        return DLRMTrain(
            Mlp(
                embedding_bags(schema, self.embedding_dim, std=_EMBEDDING_STD),
                len(schema.dense),
                self.layers,
                self.dropout,
                self.batch_norm,
                device,
            )
        )

    def dense_modules(self, schema: Schema) -> dict[str, tuple[str, ...]]:
        return {"model.dense_layer": schema.dense} if schema.dense else {}
