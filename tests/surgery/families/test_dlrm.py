"""The rule for TorchRec's DLRM, against its own forward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchrec.models.dlrm import DLRM, InteractionArch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.support.selections import select
from torchrec_fmp.gates.attach import attach_gates, feature_gates
from torchrec_fmp.surgery.blueprint import blueprint
from torchrec_fmp.surgery.cut import cut
from torchrec_fmp.surgery.families.dlrm import cut_dlrm, interaction_columns
from torchrec_fmp.surgery.rules import Cutter

DIM = 4
META = torch.device("meta")
GATES = st.sampled_from([0.0, 0.25, 1.0])


@settings(max_examples=60, deadline=None)
@given(gates=st.lists(GATES, min_size=1, max_size=7).filter(any))
def test_the_columns_equal_the_interaction_of_the_kept_features(
    gates: list[float],
) -> None:
    generator = torch.Generator().manual_seed(len(gates))
    dense = torch.randn(3, DIM, generator=generator)
    sparse = torch.randn(3, len(gates), DIM, generator=generator)
    keep = [gate > 0 for gate in gates]
    columns, scale = interaction_columns(keep, gates, DIM)

    gated = InteractionArch(len(gates))(dense, sparse * torch.tensor(gates).view(1, -1, 1))
    smaller = InteractionArch(sum(keep))(dense, sparse[:, torch.tensor(keep)])
    torch.testing.assert_close(smaller * scale, gated[:, columns])
    left = sorted(set(range(gated.shape[1])) - set(columns.tolist()))
    assert not gated[:, left].any(), "a column that goes is not zero"
    assert columns.tolist() == sorted(columns.tolist())


def dlrm(device: torch.device = META) -> DLRM:
    tables = [
        EmbeddingBagConfig(
            name=f"t_{name}", embedding_dim=DIM, num_embeddings=5, feature_names=[name]
        )
        for name in "abc"
    ]
    collection = EmbeddingBagCollection(tables=tables, device=device)
    return DLRM(collection, 2, [DIM], [6, 1], dense_device=device)


def test_the_interaction_and_the_over_arch_shrink() -> None:
    model = dlrm()
    cutter = Cutter(select(b=0))
    cut_dlrm(model, "net", cutter)
    assert model.sparse_arch.sparse_feature_names == ["a", "c"]
    assert model.inter_arch.F == 2
    linear = model.over_arch.model[0]._mlp[0]._linear
    assert linear.in_features == DIM + 3
    cut = cutter.tensors["net.over_arch.model.0._mlp.0._linear.weight"]
    # The pairs without b, out of da, db, dc, ab, ac, bc.
    assert cut.columns is not None
    assert cut.columns.tolist() == [0, 1, 2, 3, DIM, DIM + 2, DIM + 4]
    assert cut.scale is None


@pytest.mark.parametrize("part", ["dense_arch", "sparse_arch", "inter_arch", "over_arch"])
def test_a_replaced_part_is_refused(part: str) -> None:
    model = dlrm()
    setattr(model, part, nn.Identity())
    with pytest.raises(TypeError, match=rf"net\.{part} is a Identity where DLRM has a "):
        cut_dlrm(model, "net", Cutter(select(b=0)))


def test_a_dlrm_without_sparse_features_computes_the_same_as_with_closed_gates() -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(3, 2, generator=generator)
    features = KeyedJaggedTensor(
        keys=["a", "b", "c"], values=torch.arange(3), lengths=torch.tensor([1, 0, 0] * 3)
    )
    model = dlrm(torch.device("cpu"))
    attach_gates(model)
    (gates,) = (module for _, module in feature_gates(model))
    gates.fix(dict.fromkeys("abc", 0.0))
    expected = model(dense, features)

    smaller = cut(blueprint(model), select(a=0, b=0, c=0))
    pruned = smaller.model.to_empty(device="cpu")
    old = {
        name.replace("._embedding_bag_collection", ""): t for name, t in model.state_dict().items()
    }
    pruned.load_state_dict(
        {name: c.apply(old[c.source]) for name, c in smaller.cut_map.tensors.items()}
    )
    torch.testing.assert_close(pruned(dense, features), expected, rtol=0, atol=1e-6)
    assert type(pruned.sparse_arch) is nn.Identity
    assert not any("torchrec_fmp" in type(module).__module__ for module in pruned.modules())
