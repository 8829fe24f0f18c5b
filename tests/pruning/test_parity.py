"""Comparing two models' outputs; tests/pruning/test_prune.py checks the parity of prunes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tests.support.gated_model import gated_model
from tests.support.selections import select
from torchrec_fmp.embeddings.evaluation import evaluation
from torchrec_fmp.gates.attach import feature_gates
from torchrec_fmp.pruning.outputs import gates_fixed, outputs_after, outputs_before
from torchrec_fmp.pruning.parity import Difference, compare


class Answers(nn.Module):
    """Returns the given values, and the batch, a tensor of integers."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = torch.tensor(values)

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        assert not self.training and not torch.is_grad_enabled()
        return {"logits": self.values, "labels": batch}


def call(model: nn.Module, batch: Tensor) -> object:
    return model(batch)


def difference(old: nn.Module, new: nn.Module) -> Difference:
    batch = torch.tensor([1, 2])
    expected = outputs_before(old, select(), batch, call)
    return compare(expected, outputs_after(new, select(), batch, call, {}))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ((1.0, 2.0), (1.0, 2.0), Difference(0, 0)),
        # Below 1 the difference is absolute, above it is relative to the largest output.
        ((0.25, 0.5), (0.25, 0.75), Difference(0.25, 0.25)),
        ((1.0, 4.0), (1.5, 4.0), Difference(0.5, 0.125)),
        ((1.0, 4.0), (1.0, math.nan), Difference(math.inf, math.inf)),
        ((1.0, 4.0), (1.0, -math.inf), Difference(math.inf, math.inf)),
        ((), (), Difference(0, 0)),
    ],
)
def test_the_largest_difference_is_found(
    old: tuple[float, ...], new: tuple[float, ...], expected: Difference
) -> None:
    assert difference(Answers(*old), Answers(*new)) == expected


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_old_output_gives_nan_instead_of_a_difference(value: float) -> None:
    found = difference(Answers(1.0, value), Answers(1.0, value))
    assert math.isnan(found.max_abs) and math.isnan(found.relative)


def test_outputs_of_different_shapes_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"old model returns shapes \[\(2,\)\], but the pruned .*\(3,\)"
    ):
        difference(Answers(1.0, 2.0), Answers(1.0, 2.0, 3.0))


class Narrow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bottom = nn.Identity()

    def forward(self, batch: Tensor) -> Tensor:
        return self.bottom(batch).sum(1)


def test_the_pruned_model_receives_only_the_kept_columns() -> None:
    batch = torch.tensor([[1.0, 0.0, 4.0]])
    names = {"bottom": ("x", "y", "z")}
    old, new = Narrow(), Narrow()
    for dropped, sum_of_rest in (("y", 5.0), ("z", 1.0)):
        selection = select(**{dropped: 0})
        assert outputs_before(old, selection, batch, call)[0].tolist() == [5.0]
        (after,) = outputs_after(new, selection, batch, call, names)
        assert after.tolist() == [sum_of_rest]
    assert not new.bottom._forward_pre_hooks


def test_an_error_in_the_pruned_model_leaves_no_hook_and_keeps_its_mode() -> None:
    new = Narrow()
    with pytest.raises(KeyError):
        outputs_after(new, select(y=0), torch.ones(1, 3), fail, {"bottom": ("x", "y", "z")})
    assert not new.bottom._forward_pre_hooks and new.training


def fail(model: nn.Module, batch: Tensor) -> object:
    raise KeyError(batch)


def test_the_comparison_runs_the_users_forward() -> None:
    def doubled(model: nn.Module, batch: Tensor) -> Tensor:
        return 2 * model(batch)

    (output,) = outputs_before(Narrow(), select(), torch.tensor([[1.0, 2.0]]), doubled)
    assert output.tolist() == [6.0]


def test_evaluation_restores_the_mode_of_every_module() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[1].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(KeyError), evaluation(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == modes


def test_gate_values_are_restored() -> None:
    model = gated_model()
    gates = [module for _, module in feature_gates(model)]
    gates[0].fix({name: 0.25 for name in gates[0].features})
    before = [module.values().tolist() for module in gates]
    selection = select(a=0, b=0.5, c=1, d=1, x=0, y=1, z=1)
    with pytest.raises(KeyError), gates_fixed(model, selection):
        found = {n: v for m in gates for n, v in zip(m.features, m.values().tolist(), strict=True)}
        assert found == selection.gates
        raise KeyError
    assert [module.values().tolist() for module in gates] == before
    assert gates[1].fixed is None
