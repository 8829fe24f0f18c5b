"""TorchRec's own DeepFM."""

from __future__ import annotations

import torch
from torch import nn
from torchrec.models.deepfm import SimpleDeepFMNN
from torchrec.models.dlrm import DLRMTrain

from torchrec_fmp.data.schema import Schema
from torchrec_fmp.models.backbone import Backbone, check_embedding_dim, embedding_bags

# Rendle 2010 ("Factorization Machines"); the factorization machine's output is the square of a sum
# over all embeddings, which TorchRec's own initialization makes large.
_EMBEDDING_STD = 0.01


class DeepFmBackbone(Backbone):
    """`torchrec.models.deepfm.SimpleDeepFMNN`, after "DeepFM" (arXiv:1703.04247).

    Its last layer is a sigmoid, which becomes the identity: the loss is computed from logits, as a
    logarithm of a sigmoid would overflow. TorchRec's factorization machine takes the product of
    every pair of elements of all embeddings, the embedded dense input being one of them; without a
    dense column that one is a learned constant, which makes the features' first-order terms.

    Args:
        embedding_dim: of every table; FBGEMM needs a multiple of 4.
        dense_hidden: size of the hidden layer that the dense input goes through.
        deep: size of the deep layer over all embeddings.

    Raises:
        ValueError: if a size is not positive, or `embedding_dim` is no multiple of 4.
    """

    def __init__(self, embedding_dim: int = 16, dense_hidden: int = 64, deep: int = 64) -> None:
        check_embedding_dim(embedding_dim)
        if min(dense_hidden, deep) < 1:
            raise ValueError(
                f"dense_hidden {dense_hidden} and deep {deep} must be positive sizes of layers"
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
        # It asks of its model only that it gives logits for the two kinds of features.
        return DLRMTrain(model)

    def dense_modules(self, schema: Schema) -> dict[str, tuple[str, ...]]:
        return {"model.dense_arch": schema.dense} if schema.dense else {}
