"""`cut` on an unsharded model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.support.gated_model import BOTTOM, EBC, gated_model, plain_model
from tests.support.selections import select
from torchrec_fmp.gates.attach import attach_gates
from torchrec_fmp.gates.feature_gates import GateConfig
from torchrec_fmp.surgery.blueprint import blueprint
from torchrec_fmp.surgery.cut import cut, parameter_count, table_bytes
from torchrec_fmp.surgery.rules import Cutter, cut_rule

USUAL = select(a=0, c=0, d=0.5, x=0, y=0.7)


def described(model: nn.Module) -> dict[str, object]:
    modules = {name: repr(module) for name, module in model.named_modules()}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return {"modules": modules, "shapes": shapes}


def test_a_cut_is_pure() -> None:
    taken = blueprint(gated_model())
    before = described(taken.model)
    first, second = cut(taken, USUAL), cut(taken, USUAL)
    assert described(taken.model) == before
    assert described(first.model) == described(second.model) != before
    assert first.cut_map.digest() == second.cut_map.digest()
    assert first.cut_map.digest() != cut(taken, select(a=0, c=0)).cut_map.digest()


def test_every_tensor_of_the_smaller_model_is_recorded_with_its_shape() -> None:
    smaller = cut(blueprint(gated_model()), USUAL)
    tensors = smaller.model.state_dict()
    assert smaller.cut_map.tensors.keys() == tensors.keys()
    old = plain_model().state_dict()
    for fqn, tensor_cut in smaller.cut_map.tensors.items():
        assert tensor_cut.shape == tensors[fqn].shape
        assert tensor_cut.source_shape == old[tensor_cut.source].shape


def test_a_selection_that_keeps_everything_changes_nothing() -> None:
    taken = blueprint(gated_model())
    same = cut(taken, select(a=1, b=1, c=1, d=1, x=1, y=1, z=1))
    assert described(same.model) == described(taken.model)
    for fqn, tensor_cut in same.cut_map.tensors.items():
        assert tensor_cut.source == fqn
        assert tensor_cut.columns is None and tensor_cut.scale is None


def test_bytes_and_parameters_are_counted() -> None:
    smaller = cut(blueprint(gated_model()), USUAL).model
    assert table_bytes(smaller) == 2 * 5 * 4 * 4
    assert parameter_count(smaller) == sum(p.numel() for p in smaller.parameters())
    assert parameter_count(smaller) < parameter_count(plain_model())


def test_features_the_model_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match=r"features the model does not have: \['nobody', 'w'\]"):
        cut(blueprint(gated_model()), select(a=0, nobody=0, w=1))


def test_a_collection_whose_features_are_all_dropped_leaves_no_trace() -> None:
    smaller = cut(blueprint(gated_model()), select(a=0, b=0, c=0, d=0, x=0))
    assert table_bytes(smaller.model) == 0
    assert not any(isinstance(m, EmbeddingBagCollection) for m in smaller.model.modules())
    assert not any("torchrec_fmp" in type(m).__module__ for m in smaller.model.modules())
    assert not any(EBC in fqn for fqn in smaller.cut_map.tensors)
    again = cut(blueprint(smaller.model), select())
    assert described(again.model) == described(smaller.model)


class SequenceMean(nn.Module):
    """Reads a sequence feature, without a cut rule."""

    def __init__(self) -> None:
        super().__init__()
        tables = [
            EmbeddingConfig(
                name=f"t_{feature}", embedding_dim=4, num_embeddings=5, feature_names=[feature]
            )
            for feature in "st"
        ]
        self.ec = EmbeddingCollection(tables=tables)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        return torch.cat([jagged.values() for jagged in self.ec(features).values()])


def test_sequence_features_fold_without_a_rule_but_need_one_to_be_dropped() -> None:
    model = nn.ModuleDict({"history": SequenceMean()})
    attach_gates(model)
    taken = blueprint(model)
    smaller = cut(taken, select(s=0.5, t=1))
    assert smaller.cut_map.tensors["history.ec.embeddings.t_s.weight"].scale == 0.5
    assert smaller.cut_map.tensors["history.ec.embeddings.t_t.weight"].is_whole
    with pytest.raises(TypeError, match=r"history is a SequenceMean that reads .* \['s'\]"):
        cut(taken, select(s=0, t=1))
    with pytest.raises(ValueError, match=r"does not have: \['u'\]"):
        cut(taken, select(u=0))


def test_a_collection_read_in_two_places_stays_a_single_module() -> None:
    first, second = SequenceMean(), SequenceMean()
    second.ec = first.ec
    model = nn.ModuleDict({"first": first, "second": second})
    attach_gates(model)
    assert first.ec is second.ec
    smaller = cut(blueprint(model), select(s=0.5, t=1)).model
    assert smaller.get_submodule("first.ec") is smaller.get_submodule("second.ec")
    assert table_bytes(smaller) == table_bytes(blueprint(model).model) == 2 * 5 * 4 * 4


def test_settings_of_apply_optimizer_in_backward_are_kept() -> None:
    model = plain_model()
    tables = model.get_submodule(EBC).parameters()
    apply_optimizer_in_backward(RowWiseAdagrad, tables, {"lr": 0.3})
    for selection in (select(), select(a=0, c=0)):
        smaller = cut(blueprint(model), selection).model
        weight = smaller.get_parameter(f"{EBC}.embedding_bags.t_d.weight")
        assert weight._optimizer_kwargs == [{"lr": 0.3}]


class OtherDLRM(DLRM):
    """A subclass, which may compute something else."""


def test_a_rule_applies_to_exactly_its_type() -> None:
    model = gated_model()
    model.model.__class__ = OtherDLRM
    taken = blueprint(model)
    with pytest.raises(TypeError) as error:
        cut(taken, USUAL)
    assert "model.sparse_arch is a SparseArch that reads the dropped features ['a', 'c']" in str(
        error.value
    )
    assert "register one with @torchrec_fmp.cut_rule" in str(error.value)


def test_a_second_rule_for_a_type_is_refused() -> None:
    with pytest.raises(ValueError, match="DLRM already has a cut rule"):

        @cut_rule(DLRM)
        def again(model: DLRM, fqn: str, cutter: Cutter) -> None:
            """Never runs."""


class Tower(nn.Module):
    """Has only dense columns, read by a module that is cut without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom = nn.Linear(3, 2)

    def forward(self, dense_BF: Tensor) -> Tensor:
        return self.bottom(dense_BF)


def test_dense_columns_are_cut_in_any_model() -> None:
    model = nn.Module()
    model.add_module("tower", Tower())
    model.add_module("rest", plain_model())
    attach_gates(model, GateConfig(), {"tower.bottom": ("p", "q", "r")})
    smaller = cut(blueprint(model), select(q=0)).model
    assert smaller.get_parameter("tower.bottom.weight").shape == (2, 2)
    assert f"rest.{BOTTOM}.model._mlp.0._linear.weight" in smaller.state_dict()
