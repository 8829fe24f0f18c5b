"""Conversion of a shard's state between per-element and per-row form, on plain tensors."""

from __future__ import annotations

import torch

from torchrec_fmp.reshard.crossing import converted


def test_one_value_per_element_stays_or_becomes_the_mean_over_the_shards_columns() -> None:
    state = torch.rand(6, 4)
    assert torch.equal(converted(state, 4, by_row=False), state)
    assert torch.equal(converted(state, 4, by_row=True), state.mean(1))


def test_one_value_per_row_stays_or_is_repeated_in_every_column() -> None:
    state = torch.rand(6)
    assert torch.equal(converted(state, 4, by_row=True), state)
    assert torch.equal(converted(state, 4, by_row=False), state[:, None].expand(6, 4))


def test_the_mean_equals_the_row_wise_state_of_adagrad_and_adam() -> None:
    gradients = torch.rand(5, 6, 4, dtype=torch.float64)
    by_element, by_row = torch.zeros(2, 6, 4).double(), torch.zeros(2, 6).double()
    for gradient in gradients:
        square = gradient.square()
        by_element[0] += square
        by_row[0] += square.mean(1)
        by_element[1].lerp_(square, 0.1)
        by_row[1].lerp_(square.mean(1), 0.1)
    for element, row in zip(by_element, by_row, strict=True):
        torch.testing.assert_close(converted(element, 4, True).double(), row)
