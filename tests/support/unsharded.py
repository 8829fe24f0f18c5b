"""Cuts an unsharded model with gates, and compares what it computes before and after."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_fmp.embeddings.fqns import own_tensors
from torchrec_fmp.gates.attach import feature_gates
from torchrec_fmp.selection.selection import Selection
from torchrec_fmp.surgery.blueprint import blueprint
from torchrec_fmp.surgery.cut import cut

DENSE = ("x", "y")
DIM = 4
ROWS = 6


def shared_tables() -> EmbeddingBagCollection:
    """Features a and b share a table; c and d have their own."""
    tables = [
        EmbeddingBagConfig(
            name=f"t_{names}", embedding_dim=DIM, num_embeddings=5, feature_names=list(names)
        )
        for names in ("ab", "c", "d")
    ]
    return EmbeddingBagCollection(tables=tables, device=torch.device("cpu"))


def inputs() -> tuple[Tensor, KeyedJaggedTensor]:
    """Dense columns (6, 2), and bags of one id and of none."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 2, (4 * ROWS,), generator=generator)
    values = torch.randint(0, 5, (int(lengths.sum()),), generator=generator)
    features = KeyedJaggedTensor(keys=["d", "c", "b", "a"], values=values, lengths=lengths)
    return torch.randn(ROWS, len(DENSE), generator=generator), features


@torch.no_grad()
def gated_output(model: nn.Module, selection: Selection) -> Tensor:
    """Output in evaluation, with gates at the selection's values and all others open."""
    for _, module in feature_gates(model):
        module.fix(dict.fromkeys(module.features, 1.0) | selection.gates)
    return model.eval()(*inputs())


def pruned(model: nn.Module, selection: Selection) -> nn.Module:
    """The smaller model with its weights, in evaluation."""
    smaller = cut(blueprint(model), selection)
    old = dict(own_tensors(model))
    tensors = smaller.cut_map.tensors.items()
    new = {fqn: made.apply(old[made.source].detach()) for fqn, made in tensors}
    result = smaller.model.to_empty(device="cpu")
    result.load_state_dict(new)
    return result.eval()


@torch.no_grad()
def pruned_output(model: nn.Module, selection: Selection) -> Tensor:
    """Output of the smaller model for the kept dense columns."""
    dense, features = inputs()
    columns = [i for i, name in enumerate(DENSE) if name not in selection.dropped]
    return pruned(model, selection)(dense[:, columns], features)
