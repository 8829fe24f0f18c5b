"""How a whole table's state becomes a shard's, on plain tensors."""

from __future__ import annotations

import pytest
import torch

from torchrec_fmp.reshard.boxes import Box
from torchrec_fmp.reshard.data_parallel import converted

WHOLE = Box(0, 0, 6, 4)
PART = Box(2, 1, 3, 2)


@pytest.mark.parametrize("box", [WHOLE, PART])
def test_a_value_an_element_is_copied(box: Box) -> None:
    state = torch.rand(6, 4)
    expected = state[box.row : box.row + box.rows, box.column : box.column + box.columns]
    assert torch.equal(converted(state, box, by_row=False), expected)


def test_a_value_a_row_is_the_mean_over_the_shards_own_columns() -> None:
    state = torch.rand(6, 4)
    assert torch.equal(converted(state, PART, by_row=True), state[2:5, 1:3].mean(1))


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_a_value_a_row_is_copied_or_repeated_in_every_column(shape: tuple[int, ...]) -> None:
    state = torch.rand(shape)
    rows = state.view(6)[2:5]
    assert torch.equal(converted(state, PART, by_row=True), rows)
    assert torch.equal(converted(state, PART, by_row=False), rows[:, None].expand(3, 2))


def test_the_mean_is_what_row_wise_adagrad_and_adam_accumulate_from_the_same_gradients() -> None:
    gradients = torch.rand(5, 6, 4, dtype=torch.float64)
    by_element, by_row = torch.zeros(2, 6, 4).double(), torch.zeros(2, 6).double()
    for gradient in gradients:
        square = gradient.square()
        by_element[0] += square
        by_row[0] += square.mean(1)
        by_element[1].lerp_(square, 0.1)
        by_row[1].lerp_(square.mean(1), 0.1)
    for element, row in zip(by_element, by_row, strict=True):
        torch.testing.assert_close(converted(element, WHOLE, True).double(), row)
