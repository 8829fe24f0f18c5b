"""Cut rule of TorchRec's `DLRM`.

DLRM's interaction takes the dot product of every pair out of the embedded dense input and the F
sparse features. A feature whose gate is 0 makes its F products 0, so the over arch loses their
columns, and nothing else changes. An unfolded gate between 0 and 1 scales these columns instead.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchrec.models.dlrm import DLRM, DenseArch, InteractionArch, OverArch, SparseArch

from torchrec_fmp.embeddings.collections import table_configs
from torchrec_fmp.embeddings.fqns import join_fqn
from torchrec_fmp.embeddings.seams import MLP_LAYERS, PERCEPTRON_LINEAR
from torchrec_fmp.surgery.cut_tables import cut_tables
from torchrec_fmp.surgery.linear import cut_linear
from torchrec_fmp.surgery.rules import Cutter, check_parts, cut_rule

_FIRST_OVER = f"over_arch.model.0.{MLP_LAYERS}.0.{PERCEPTRON_LINEAR}"


@cut_rule(DLRM)
def cut_dlrm(model: DLRM, fqn: str, cutter: Cutter) -> None:
    """Shrinks the tables, the interaction and the first layer of the over arch.

    If no feature is left, `sparse_arch` becomes `torch.nn.Identity`: the interaction of no features
    returns the embedded dense input and ignores its other argument.

    Raises:
        TypeError: if a part of the model was replaced by a module of another type.
    """
    if _has_no_sparse_features(model):
        return
    check_parts(
        model,
        fqn,
        {
            "dense_arch": DenseArch,
            "sparse_arch": SparseArch,
            "inter_arch": InteractionArch,
            "over_arch": OverArch,
        },
    )
    names = list(model.sparse_arch.sparse_feature_names)
    collection = model.sparse_arch.embedding_bag_collection
    smaller, gates = cut_tables(
        collection, join_fqn(fqn, "sparse_arch.embedding_bag_collection"), cutter
    )
    model.sparse_arch = nn.Identity() if smaller is None else SparseArch(smaller)
    model.inter_arch = InteractionArch(len(gates))
    columns, scale = interaction_columns(
        [name in gates for name in names],
        [gates.get(name, 0.0) for name in names],
        table_configs(collection)[0].embedding_dim,
    )
    linear = model.get_submodule(_FIRST_OVER)
    assert isinstance(linear, nn.Linear)
    cut_linear(linear, join_fqn(fqn, _FIRST_OVER), cutter, columns, scale)


def _has_no_sparse_features(model: DLRM) -> bool:
    """Whether an earlier cut has dropped all sparse features."""
    interaction = model.inter_arch
    return (
        type(model.sparse_arch) is nn.Identity
        and type(interaction) is InteractionArch
        and interaction.F == 0
    )


def interaction_columns(
    keep: list[bool], gates: list[float], embedding_dim: int
) -> tuple[Tensor, Tensor]:
    """Kept columns of DLRM's interaction, and their scales.

    The interaction is the embedded dense input (D columns), then the products of the pairs i < j
    out of dense (0) and the sparse features (1 to F), row by row (InteractionArch.forward).

    Args:
        keep: whether each of the F features is kept.
        gates: gate of each feature; read only for kept features.
        embedding_dim: embedding dimension D.

    Returns:
        (I',) int64 columns in ascending order, and (I',) fp32 scales.
    """
    size = len(keep) + 1
    first, second = torch.triu_indices(size, size, offset=1)
    stays = torch.tensor([True, *keep])
    gate = torch.tensor([1.0, *gates])
    pairs = (stays[first] & stays[second]).nonzero().squeeze(1)
    columns = torch.cat([torch.arange(embedding_dim), embedding_dim + pairs])
    scale = torch.cat([torch.ones(embedding_dim), (gate[first] * gate[second])[pairs]])
    return columns, scale
