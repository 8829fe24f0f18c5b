"""The rule for TorchRec's DeepFM, against its own forward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchrec.models.deepfm import FMInteractionArch, SimpleDeepFMNN
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.mlp import MLP
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.support.selections import select
from tests.support.unsharded import DENSE, DIM, gated_output, pruned, pruned_output, shared_tables
from torchrec_fmp.embeddings.collections import feature_widths
from torchrec_fmp.embeddings.fqns import join_fqn
from torchrec_fmp.gates.attach import attach_gates
from torchrec_fmp.surgery.blueprint import blueprint
from torchrec_fmp.surgery.cut import cut
from torchrec_fmp.surgery.cut_tables import cut_tables
from torchrec_fmp.surgery.families.deepfm import cut_fm_interaction
from torchrec_fmp.surgery.rules import Cutter, cut_rule

GATES = st.sampled_from([0.0, 0.25, 0.5, 1.0])


def gated_deepfm() -> nn.Module:
    """TorchRec's DeepFM with its sigmoid, inside a user's own model."""
    torch.manual_seed(0)
    model = SimpleDeepFMNN(len(DENSE), shared_tables(), hidden_layer_size=3, deep_fm_dimension=5)
    return attach_gates(Scorer(model), dense={"net.dense_arch": DENSE})


class Scorer(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, dense: Tensor, features: KeyedJaggedTensor) -> Tensor:
        return 10 * self.net(dense, features)


def refusal(gates: dict[str, float]) -> str | None:
    if not any(gates[name] for name in "abcd"):
        return "net has no sparse feature left"
    shared = {gates[name] for name in "ab"} - {0.0}
    return "net.inter_arch multiplies the features" if len(shared) > 1 else None


@settings(max_examples=60, deadline=None)
@given(st.fixed_dictionaries({name: GATES for name in ("a", "b", "c", "d", *DENSE)}))
def test_the_pruned_model_computes_the_same_as_the_gated_one_or_is_refused(
    gates: dict[str, float],
) -> None:
    model, selection = gated_deepfm(), select(**gates)
    message = refusal(gates)
    if message is None:
        actual = pruned_output(model, selection)
        torch.testing.assert_close(actual, gated_output(model, selection), rtol=0, atol=1e-6)
    else:
        with pytest.raises(ValueError, match=message):
            cut(blueprint(model), selection)


def test_different_gates_of_one_table_are_refused_with_their_values_and_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"\{'a': 0.25, 'b': 0.5\} do not, .* the same gate"):
        cut(blueprint(gated_deepfm()), select(a=0.25, b=0.5))


def test_the_tables_and_the_deep_layer_shrink() -> None:
    smaller = pruned(gated_deepfm(), select(a=0, c=0, x=0)).net
    assert type(smaller) is SimpleDeepFMNN
    assert smaller.inter_arch.sparse_feature_names == ["b", "d"]
    assert smaller.inter_arch.deep_fm.dense_module[0].weight.shape == (5, 3 * DIM)
    assert smaller.dense_arch.model[0].weight.shape == (3, 1)
    tables = smaller.sparse_arch.embedding_bag_collection.embedding_bags
    assert tables.keys() == {"t_ab", "t_d"}


@pytest.mark.parametrize(
    ("part", "where"),
    [("sparse_arch", "net"), ("inter_arch", "net"), ("deep_fm", "net.inter_arch")],
)
def test_a_replaced_part_is_refused(part: str, where: str) -> None:
    model = gated_deepfm()
    setattr(model.get_submodule(where), part, nn.Identity())
    with pytest.raises(TypeError, match=f"{where}.{part} is a Identity where .* has a "):
        cut(blueprint(model), select())


def test_a_deep_module_of_unknown_type_is_refused() -> None:
    model = gated_deepfm()
    model.get_submodule("net.inter_arch.deep_fm").dense_module = nn.Bilinear(2, 2, 2)
    with pytest.raises(TypeError, match="dense_module is a Bilinear, whose first layer"):
        cut(blueprint(model), select(c=0))


class Ranker(nn.Module):
    """A user's model: tables of several dimensions, and TorchRec's interaction with an MLP."""

    def __init__(self) -> None:
        super().__init__()
        tables = [
            EmbeddingBagConfig(
                name=f"t_{name}", embedding_dim=dim, num_embeddings=5, feature_names=[name]
            )
            for name, dim in zip("abcd", (4, 8, 4, 12), strict=True)
        ]
        self.ebc = EmbeddingBagCollection(tables=tables, device=torch.device("cpu"))
        self.interaction = FMInteractionArch(28 + len(DENSE), ["d", "a", "c", "b"], 1)
        self.interaction.deep_fm.dense_module = MLP(28 + len(DENSE), [6, 5])

    def forward(self, dense: Tensor, features: KeyedJaggedTensor) -> Tensor:
        return self.interaction(dense, self.ebc(features))


@cut_rule(Ranker)
def cut_ranker(model: Ranker, fqn: str, cutter: Cutter) -> None:
    widths = feature_widths(model.ebc)
    smaller, gates = cut_tables(model.ebc, join_fqn(fqn, "ebc"), cutter)
    assert smaller is not None
    model.ebc = smaller
    cut_fm_interaction(model.interaction, join_fqn(fqn, "interaction"), cutter, widths, gates)


def test_a_users_model_with_the_interaction_needs_only_a_short_rule() -> None:
    torch.manual_seed(0)
    model, selection = attach_gates(Ranker()), select(b=0, c=0.5, d=0.25)
    actual = pruned_output(model, selection)
    torch.testing.assert_close(actual, gated_output(model, selection), rtol=0, atol=1e-6)
