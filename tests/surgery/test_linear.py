"""Cutting the layer that reads a gated dense input."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchrec.models.dlrm import DenseArch
from torchrec.modules.mlp import MLP

from tests.support.selections import select
from torchrec_fmp.surgery.linear import cut_dense, first_linear
from torchrec_fmp.surgery.rules import Cutter

FEATURES = ("x", "y", "z")
META = torch.device("meta")
READERS: dict[str, tuple[nn.Module, str]] = {
    "Linear": (nn.Linear(3, 4, device=META), ""),
    "Sequential": (nn.Sequential(nn.Linear(3, 4, device=META), nn.ReLU()), "0"),
    "MLP": (MLP(3, [4, 2], device=META), "_mlp.0._linear"),
    "DenseArch": (DenseArch(3, [4, 2], device=META), "model._mlp.0._linear"),
    "nested": (nn.Sequential(MLP(3, [4], device=META)), "0._mlp.0._linear"),
}


@pytest.mark.parametrize(("module", "name"), READERS.values(), ids=READERS.keys())
def test_the_first_linear_layer_is_found_and_shrinks(module: nn.Module, name: str) -> None:
    assert first_linear(module) == name
    cutter = Cutter(select(x=0, z=0.5))
    cut_dense(module, "bottom", FEATURES, cutter)
    linear = module.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    assert linear.in_features == 2
    assert linear.weight.shape == (4, 2)
    ((fqn, cut),) = cutter.tensors.items()
    assert fqn == ".".join(part for part in ("bottom", name, "weight") if part)
    assert cut.columns is not None and cut.columns.tolist() == [1, 2]
    assert cut.scale is not None and cut.scale.tolist() == [1, 0.5]


def test_open_gates_need_no_rule() -> None:
    cutter = Cutter(select(x=1, y=1))
    cut_dense(nn.Tanh(), "bottom", FEATURES, cutter)
    assert cutter.tensors == {}


class Scaled(nn.Linear):
    """A subclass may compute something else."""


@pytest.mark.parametrize(
    "module", [nn.Tanh(), Scaled(3, 4), nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4))]
)
@pytest.mark.parametrize("gate", [0.0, 0.5])
def test_a_first_layer_that_is_not_linear_is_refused(module: nn.Module, gate: float) -> None:
    with pytest.raises(TypeError, match=f"bottom is a {type(module).__name__} .*not known to be"):
        cut_dense(module, "bottom", FEATURES, Cutter(select(y=gate)))


def test_a_layer_may_be_left_without_inputs() -> None:
    linear = nn.Linear(3, 4, device=META)
    cut_dense(linear, "", FEATURES, Cutter(select(x=0, y=0, z=0)))
    assert linear.weight.shape == (4, 0)
    assert linear.in_features == 0
    assert linear.bias.shape == (4,)
