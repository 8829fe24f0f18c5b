"""A small gated DLRM that is not sharded."""

from __future__ import annotations

from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_fmp.gates.attach import attach_gates
from torchrec_fmp.gates.feature_gates import GateConfig

DENSE = ("x", "y", "z")
DIM = 4
EBC = "model.sparse_arch.embedding_bag_collection"
BOTTOM = "model.dense_arch"


def plain_model() -> DLRMTrain:
    tables = [
        EmbeddingBagConfig(
            name=f"t_{'_'.join(features)}",
            embedding_dim=DIM,
            num_embeddings=5,
            feature_names=features,
        )
        for features in (["a", "b"], ["c"], ["d"])
    ]
    return DLRMTrain(DLRM(EmbeddingBagCollection(tables=tables), len(DENSE), [6, DIM], [7, 1]))


def gated_model() -> DLRMTrain:
    model = plain_model()
    attach_gates(model, GateConfig(), {BOTTOM: DENSE})
    return model
