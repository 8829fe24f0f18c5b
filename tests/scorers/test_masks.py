"""The masks of learned scorers are their papers' formulas."""

from __future__ import annotations

import math

import pytest
import torch

from torchrec_fmp.scorers.adafs import hard
from torchrec_fmp.scorers.concrete_dropout import concrete
from torchrec_fmp.scorers.lpfs import gate
from torchrec_fmp.scorers.probe import Block
from torchrec_fmp.scorers.shuffle_gate import shuffled


def test_the_gate_of_lpfs_is_odd_and_polarizes() -> None:
    x = torch.tensor([-2.0, 0.0, 0.5, 1.0])
    expected = [
        math.copysign(v * v / (v * v + 0.01), v) + 10 * math.sqrt(0.01) * math.atan(v)
        for v in x.tolist()
    ]
    assert gate(x, 0.01).tolist() == pytest.approx(expected, abs=1e-6)
    assert gate(-x, 0.01).tolist() == pytest.approx([-v for v in expected], abs=1e-6)


def test_a_closed_gate_of_lpfs_can_open_again() -> None:
    x = torch.zeros(1, requires_grad=True)
    gate(x, 0.01).sum().backward()
    assert x.grad is not None and x.grad.item() == pytest.approx(1.0)


def test_concrete_dropout_drops_with_its_learned_probability() -> None:
    logits = torch.tensor([-1.0, 0.0, 3.0])
    uniform = torch.rand(20_000, 3, generator=torch.Generator().manual_seed(0))
    dropped = concrete(logits, uniform)
    assert (dropped > 0.5).double().mean(0).tolist() == pytest.approx(
        logits.sigmoid().tolist(), abs=0.01
    )
    assert concrete(logits, torch.full((1, 3), 0.5))[0].tolist() == pytest.approx(
        (logits / 0.1).sigmoid().tolist(), abs=1e-6
    )


def test_hard_weights_keep_the_largest_of_each_example_and_sum_to_one() -> None:
    weights = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]])
    expected = [[0.0, 0.6 / 0.9, 0.3 / 0.9], [0.5 / 0.8, 0.0, 0.3 / 0.8]]
    for row, wanted in zip(hard(weights.log(), 2).tolist(), expected, strict=True):
        assert row == pytest.approx(wanted, abs=1e-6)


def test_each_feature_is_shuffled_as_a_whole_in_its_own_order() -> None:
    rows = torch.arange(50.0)
    # Two columns of the first feature, one of the second; each value identifies its row.
    values = torch.stack([rows, -rows, rows], dim=1).requires_grad_()
    block = Block("ebc", ("a", "b"), (2, 1), values)
    mixed = shuffled(block, torch.Generator().manual_seed(0)).values
    assert not mixed.requires_grad
    assert torch.equal(mixed[:, 0], -mixed[:, 1])
    assert not torch.equal(mixed[:, 0], mixed[:, 2])
    for column in (0, 2):
        assert torch.equal(mixed[:, column].sort().values, rows)
