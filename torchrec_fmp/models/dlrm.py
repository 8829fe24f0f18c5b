"""TorchRec's DLRM."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torchrec.models.dlrm import DLRM, DLRMTrain

from torchrec_fmp.data.schema import Schema
from torchrec_fmp.models.backbone import Backbone, check_embedding_dim, embedding_bags


class DlrmBackbone(Backbone):
    """`torchrec.models.dlrm.DLRM`, from "Deep Learning Recommendation Model" (arXiv:1906.00091).

    Args:
        embedding_dim: embedding dimension of every table; FBGEMM needs a multiple of 4.
        dense_arch: sizes of the bottom MLP's hidden layers; a last layer of size `embedding_dim` is
            added.
        over_arch: sizes of the top MLP's hidden layers; a last layer of size 1 is added.

    Raises:
        ValueError: if a size is not positive, `embedding_dim` is not a multiple of 4, or
            `over_arch` is empty.
    """

    def __init__(
        self,
        embedding_dim: int = 16,
        dense_arch: Sequence[int] = (64,),
        over_arch: Sequence[int] = (128, 64),
    ) -> None:
        check_embedding_dim(embedding_dim)
        if not over_arch or min(*dense_arch, *over_arch, 1) < 1:
            raise ValueError(
                f"dense_arch is {list(dense_arch)} and over_arch is {list(over_arch)}; all sizes "
                "must be positive, and over_arch needs at least one"
            )
        self.embedding_dim = embedding_dim
        self.dense_arch = tuple(dense_arch)
        self.over_arch = tuple(over_arch)

    def build(self, schema: Schema, device: torch.device) -> nn.Module:
        return DLRMTrain(
            DLRM(
                embedding_bag_collection=embedding_bags(schema, self.embedding_dim),
                dense_in_features=len(schema.dense),
                dense_arch_layer_sizes=[*self.dense_arch, self.embedding_dim],
                over_arch_layer_sizes=[*self.over_arch, 1],
                dense_device=device,
            )
        )

    def dense_modules(self, schema: Schema) -> dict[str, tuple[str, ...]]:
        return {"model.dense_arch": schema.dense} if schema.dense else {}
