"""TorchRec's DeepFM."""

from __future__ import annotations

import torch
from torch import nn
from torchrec.models.deepfm import SimpleDeepFMNN
from torchrec.models.dlrm import DLRMTrain

from torchrec_fmp.data.schema import Schema
from torchrec_fmp.models.backbone import Backbone, check_embedding_dim, embedding_bags

# Rendle 2010 ("Factorization Machines"). The factorization machine's output is the square of a sum
# over all embeddings, which would be large with TorchRec's own initialization.
_EMBEDDING_STD = 0.01


class DeepFmBackbone(Backbone):
    """`torchrec.models.deepfm.SimpleDeepFMNN`, after "DeepFM" (arXiv:1703.04247).

    The sigmoid of the last layer is replaced by the identity: the loss is computed from logits,
    because the logarithm of a sigmoid would overflow. TorchRec's factorization machine multiplies
    every pair of elements of all embeddings, including the embedded dense input. Without dense
    columns, this dense embedding is a learned constant, and its products are the features'
    first-order terms.

    Args:
        embedding_dim: embedding dimension of every table; FBGEMM needs a multiple of 4.
        dense_hidden: size of the hidden layer for the dense input.
        deep: size of the deep layer over all embeddings.

    Raises:
        ValueError: if a size is not positive, or `embedding_dim` is not a multiple of 4.
    """

    def __init__(self, embedding_dim: int = 16, dense_hidden: int = 64, deep: int = 64) -> None:
        check_embedding_dim(embedding_dim)
        if min(dense_hidden, deep) < 1:
            raise ValueError(
                f"dense_hidden is {dense_hidden} and deep is {deep}; both must be positive layer "
                "sizes"
            )
        self.embedding_dim = embedding_dim
        self.dense_hidden = dense_hidden
        self.deep = deep

    def build(self, schema: Schema, device: torch.device) -> nn.Module:
        with device:
            model = SimpleDeepFMNN(
                num_dense_features=len(schema.dense),
                embedding_bag_collection=embedding_bags(
                    schema, self.embedding_dim, std=_EMBEDDING_STD
                ),
                hidden_layer_size=self.dense_hidden,
                deep_fm_dimension=self.deep,
            )
        model.over_arch.model[1] = nn.Identity()
        # DLRMTrain works with any model that returns logits for dense and sparse features.
        return DLRMTrain(model)

    def dense_modules(self, schema: Schema) -> dict[str, tuple[str, ...]]:
        return {"model.dense_arch": schema.dense} if schema.dense else {}
