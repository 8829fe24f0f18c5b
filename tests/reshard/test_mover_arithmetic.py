"""What becomes of weights and states on one rank; tests/distributed moves them between ranks."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchrec_fmp.reshard.boxes import Box, Shard
from torchrec_fmp.reshard.local_shards import LocalShard
from torchrec_fmp.reshard.mover import move_table

ROWS, COLUMNS = 6, 12
GROUP = mock.Mock(spec=dist.ProcessGroup)


@pytest.fixture(scope="module", autouse=True)
def only_rank() -> Iterator[None]:
    with mock.patch.object(dist, "get_rank", return_value=0):
        yield


def split(ends: list[int], by_column: bool) -> list[Box]:
    size = COLUMNS if by_column else ROWS
    bounds = sorted({0, size, *ends})
    parts = [(low, high - low) for low, high in zip(bounds, bounds[1:], strict=False)]
    if by_column:
        return [Box(0, low, ROWS, length) for low, length in parts]
    return [Box(low, 0, length, COLUMNS) for low, length in parts]


def local(box: Box, weight: Tensor, state: Tensor) -> LocalShard:
    """A shard; the state is (rows,) or (rows, columns)."""
    return LocalShard("t", box, weight, {"sum": state}, mock.Mock())


def cut_out(whole: Tensor, box: Box) -> Tensor:
    rows = whole[box.row : box.row + box.rows]
    return rows[:, box.column : box.column + box.columns].clone()


def shards(boxes: list[Box]) -> list[Shard]:
    return [Shard(0, box) for box in boxes]


def empty(box: Box, row_wise: bool) -> LocalShard:
    shape = (box.rows,) if row_wise else (box.rows, box.columns)
    # What a new table holds before it is filled must not show.
    return local(box, torch.full((box.rows, box.columns), 7.0), torch.full(shape, 7.0))


ends = st.lists(st.integers(1, ROWS - 1), max_size=4)
layouts = st.builds(split, ends, st.booleans())


@settings(deadline=None)
@given(layouts, layouts)
def test_weights_and_element_wise_states_arrive_bit_equal(old: list[Box], new: list[Box]) -> None:
    weight, state = torch.rand(ROWS, COLUMNS), torch.rand(ROWS, COLUMNS)
    before = [local(box, cut_out(weight, box), cut_out(state, box)) for box in old]
    after = [empty(box, row_wise=False) for box in new]
    move_table(before, after, shards(old), shards(new), GROUP)
    for shard in after:
        assert torch.equal(shard.weight, cut_out(weight, shard.box))
        assert torch.equal(shard.states["sum"], cut_out(state, shard.box))


@settings(deadline=None)
@given(layouts, layouts)
def test_a_row_wise_state_becomes_the_mean_weighted_by_width(
    old: list[Box], new: list[Box]
) -> None:
    weight = torch.rand(ROWS, COLUMNS)
    states = [torch.rand(box.rows) for box in old]
    # The state that each element of the table has.
    expanded = torch.empty(ROWS, COLUMNS)
    for box, state in zip(old, states, strict=True):
        part = expanded[box.row : box.row + box.rows, box.column : box.column + box.columns]
        part.copy_(state.unsqueeze(1))
    before = [
        local(box, cut_out(weight, box), state) for box, state in zip(old, states, strict=True)
    ]
    after = [empty(box, row_wise=True) for box in new]
    move_table(before, after, shards(old), shards(new), GROUP)
    for shard in after:
        expected = cut_out(expanded, shard.box)
        torch.testing.assert_close(shard.states["sum"], expected.mean(1))
        if any(box.intersect(shard.box) == shard.box for box in old):
            assert torch.equal(shard.states["sum"], expected[:, 0]), "a part is copied"


def test_the_old_shards_are_not_changed() -> None:
    (whole,) = split([], by_column=True)
    halves = split([6], by_column=True)
    old = local(whole, torch.rand(ROWS, COLUMNS), torch.rand(ROWS))
    weight, state = old.weight.clone(), old.states["sum"].clone()
    new = [empty(box, row_wise=True) for box in halves]
    move_table([old], new, shards([whole]), shards(halves), GROUP)
    new[0].weight.zero_()
    new[0].states["sum"].zero_()
    assert torch.equal(old.weight, weight)
    assert torch.equal(old.states["sum"], state)


def test_another_optimizer_is_refused() -> None:
    (whole,) = split([], by_column=True)
    old = local(whole, torch.rand(ROWS, COLUMNS), torch.rand(ROWS))
    new = LocalShard("t", whole, torch.rand(ROWS, COLUMNS), {"momentum": torch.rand(ROWS)}, GROUP)
    with pytest.raises(ValueError, match=r"\['momentum', 'weight'\] where .* \['sum', 'weight'\]"):
        move_table([old], [new], shards([whole]), shards([whole]), GROUP)
