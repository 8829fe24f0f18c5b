"""The blueprint of unsharded models; tests/pruning covers sharded ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from tests.support.gated_model import BOTTOM, DENSE, EBC, gated_model, plain_model
from torchrec_fmp.embeddings.fqns import own_tensors
from torchrec_fmp.surgery.blueprint import blueprint


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("build", [plain_model, gated_model])
def test_the_blueprint_is_the_model_as_its_author_wrote_it(build: type) -> None:
    model = blueprint(build()).model
    assert shapes(model) == shapes(plain_model())
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any("torchrec_fmp" in type(module).__module__ for module in model.modules())


def test_taking_a_blueprint_changes_nothing() -> None:
    model = gated_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    blueprint(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_the_blueprint_has_every_tensor_except_the_gates_under_its_own_fqn() -> None:
    model = gated_model()
    taken = blueprint(model)
    own = {name for name, _ in own_tensors(model)}
    assert f"{EBC}.embedding_bags.t_c.weight" in own
    plain = {name for name, _ in own_tensors(taken.model)}
    assert plain == {name for name in own if ".gates." not in name}
    assert taken.dense_features == {BOTTOM: DENSE}


def test_a_frozen_parameter_stays_frozen_and_a_buffer_keeps_its_values() -> None:
    model = gated_model()
    weight = model.get_parameter("model.over_arch.model.1.weight")
    weight.requires_grad_(False)
    model.register_buffer("seen", torch.tensor(3))
    taken = blueprint(model).model
    assert not taken.get_parameter("model.over_arch.model.1.weight").requires_grad
    assert taken.get_buffer("seen") == 3


@pytest.mark.parametrize("build", [plain_model, gated_model])
def test_settings_of_apply_optimizer_in_backward_are_kept(build: type) -> None:
    model = build()
    parameter = dict(own_tensors(model))[f"{EBC}.embedding_bags.t_c.weight"]
    apply_optimizer_in_backward(RowWiseAdagrad, [parameter], {"lr": 0.3})
    weight = blueprint(model).model.get_parameter(f"{EBC}.embedding_bags.t_c.weight")
    assert weight._optimizer_classes == [RowWiseAdagrad]
    assert weight._optimizer_kwargs == [{"lr": 0.3}]
