"""Dense parameters and optimizer states, without a process group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from torchrec_fmp.reshard.dense import carry_optimizer, fill_dense
from torchrec_fmp.surgery.cut_map import CutMap, TensorCut

COLUMNS = torch.tensor([0, 2])
SOURCES = {"layer.weight": "gated.layer.weight", "layer.bias": "gated.layer.bias", "seen": "seen"}
CUT_MAP = CutMap(
    {
        "layer.weight": TensorCut(
            "layer.weight", torch.Size([2, 3]), COLUMNS, torch.tensor([1.0, 0.5])
        ),
        "layer.bias": TensorCut("layer.bias", torch.Size([2])),
        "seen": TensorCut("seen", torch.Size([])),
    }
)


class Model(nn.Module):
    """Stands in for a sharded model: named parameters, and no tables."""

    def __init__(self, inputs: int, device: str = "cpu") -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, 2, device=device)
        self.register_buffer("seen", torch.tensor(0))
        self.fused_optimizer = object()


class Gated(nn.Module):
    """The model before, with a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gated = Model(3)
        self.log_alpha = nn.Parameter(torch.ones(3))
        self.register_buffer("seen", torch.tensor(5))
        self.fused_optimizer = object()


def test_parameters_and_buffers_are_filled_and_tables_left_alone() -> None:
    old, new = Gated(), Model(2, "meta")
    old.gated.layer.bias.requires_grad_(False)
    new.layer.bias.requires_grad_(False)
    new.register_parameter("table", nn.Parameter(torch.empty(2, 2, device="meta")))
    tensors = dict([*old.named_parameters(), *old.named_buffers()])
    table = TensorCut("table", torch.Size([2, 2]))
    fill_dense(
        new, tensors, CutMap({**CUT_MAP.tensors, "table": table}), {**SOURCES, "table": "table"}
    )
    weight = old.gated.layer.weight
    assert torch.equal(new.layer.weight, weight[:, COLUMNS] * torch.tensor([1.0, 0.5]))
    assert new.layer.weight.requires_grad and new.layer.weight.is_leaf
    assert torch.equal(new.layer.bias, old.gated.layer.bias)
    assert not new.layer.bias.requires_grad
    assert new.seen == 5
    assert new.get_parameter("table").is_meta
    new.layer.bias.data.zero_()
    assert old.gated.layer.bias.any(), "the two models share memory"


def stepped(old: Gated, optimizer_class: type[Optimizer] = Adam, **settings: Any) -> Optimizer:
    optimizer = optimizer_class(old.parameters(), **settings)
    for parameter in old.parameters():
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    return optimizer


def test_until_the_commit_the_optimizer_is_the_old_models() -> None:
    old, new = Gated(), Model(2)
    optimizer = stepped(old)
    groups = [list(group["params"]) for group in optimizer.param_groups]
    states = dict(optimizer.state)
    commit = carry_optimizer(optimizer, old, new, CUT_MAP, SOURCES)  # type: ignore[arg-type]
    assert [group["params"] for group in optimizer.param_groups] == groups
    assert dict(optimizer.state) == states
    assert commit() is optimizer
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in new.parameters()]
    assert {id(p) for p in optimizer.state} == {id(p) for p in new.parameters()}


def test_states_are_cut_and_not_scaled() -> None:
    old, new = Gated(), Model(2)
    optimizer = stepped(old)
    before = optimizer.state[old.gated.layer.weight]
    carry_optimizer(optimizer, old, new, CUT_MAP, SOURCES)()  # type: ignore[arg-type]
    after = optimizer.state[new.layer.weight]
    assert torch.equal(after["exp_avg"], before["exp_avg"][:, COLUMNS])
    assert after["step"] == 1
    assert after["step"] is not before["step"]


def test_an_optimizer_that_has_not_stepped_stays_without_state() -> None:
    old, new = Gated(), Model(2)
    optimizer = SGD(old.parameters(), lr=0.5)
    carry_optimizer(optimizer, old, new, CUT_MAP, SOURCES)()  # type: ignore[arg-type]
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_state_of_another_shape_is_refused() -> None:
    old, new = Gated(), Model(2)
    optimizer = stepped(old)
    optimizer.state[old.gated.layer.weight]["factor"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"state 'factor': layer\.weight has the shape \(2,\)"):
        carry_optimizer(optimizer, old, new, CUT_MAP, SOURCES)  # type: ignore[arg-type]


def test_a_foreign_parameter_is_refused() -> None:
    old, new = Gated(), Model(2)
    optimizer = SGD([*old.parameters(), nn.Parameter(torch.ones(4, 5))], lr=0.1)
    with pytest.raises(ValueError, match=r"parameter of shape \(4, 5\) that the model does not"):
        carry_optimizer(optimizer, old, new, CUT_MAP, SOURCES)  # type: ignore[arg-type]


def test_the_fused_optimizer_is_replaced_by_the_new_models() -> None:
    old, new = Gated(), Model(2)
    commit = carry_optimizer(old.fused_optimizer, old, new, CUT_MAP, SOURCES)  # type: ignore[arg-type]
    assert commit() is new.fused_optimizer


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.a = nn.Linear(3, 3, bias=False, device=device)
        self.b = nn.Linear(3, 3, bias=False, device=device)
        self.b.weight = self.a.weight


def fill_tied(columns_of_b: torch.Tensor | None, columns_of_a: torch.Tensor | None = None) -> Tied:
    old, new = Tied(), Tied("meta")
    shape = torch.Size([3, 3])
    cuts = {
        "a.weight": TensorCut("a.weight", shape, columns_of_a),
        "b.weight": TensorCut("b.weight", shape, columns_of_b),
    }
    tensors = dict(old.named_parameters(remove_duplicate=False))
    fill_dense(new, tensors, CutMap(cuts), {name: name for name in cuts})
    return new


def test_layers_that_share_a_parameter_go_on_sharing_it() -> None:
    new = fill_tied(None)
    assert new.a.weight is new.b.weight and not new.a.weight.is_meta


def test_a_shared_parameter_is_not_cut_for_one_layer_only() -> None:
    with pytest.raises(ValueError, match="a.weight and b.weight share a parameter"):
        fill_tied(COLUMNS)


def test_a_shared_parameter_is_not_cut_differently_to_the_same_shape() -> None:
    with pytest.raises(ValueError, match="a.weight and b.weight share a parameter"):
        fill_tied(COLUMNS, torch.tensor([1, 2]))
