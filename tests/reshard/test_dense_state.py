"""A dense optimizer's state of a table, and each shard's part of the state."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchrec_fmp.embeddings.boxes import Box
from torchrec_fmp.embeddings.local_shards import LocalShard
from torchrec_fmp.reshard.dense_optimizer import ParamGroup as Place
from torchrec_fmp.reshard.dense_state import DenseState, sample_state

STATE: dict[str, Any] = {
    "step": torch.tensor(3.0),
    "product": 0.5,
    "element": torch.rand(5, 4, dtype=torch.float64),
    "row": torch.rand(5),
    "row_column": torch.rand(5, 1),
}


def test_a_new_state_has_the_old_layout_and_values_that_belong_to_no_row() -> None:
    form = DenseState.of(torch.Size([5, 4]), STATE)
    assert form.layout == {
        "element": (torch.float64, False),
        "row": (torch.float32, True),
        "row_column": (torch.float32, True),
    }
    new = form.zeros(torch.rand(7, 2))
    shapes = {name: tuple(value.shape) for name, value in new.items() if name in form.by_rows}
    assert shapes == {"element": (7, 2), "row": (7,), "row_column": (7, 1)}
    assert new["element"].dtype == torch.float64
    assert new["step"] == 3
    assert new["step"] is not STATE["step"]
    assert new["product"] == 0.5


@pytest.mark.parametrize("step", [torch.tensor(3.0), 3, 3.0])
def test_a_step_keeps_its_type(step: object) -> None:
    form = DenseState.of(torch.Size([5, 4]), {"step": step}).at(8)
    assert form.step == 8
    assert type(form.others["step"]) is type(step)


def test_a_state_without_rows_is_odd() -> None:
    form = DenseState.of(torch.Size([5, 4]), {"columns": torch.rand(1, 4)})
    assert form.odd == ("columns",)


def test_a_sample_state_is_made_with_the_settings_of_the_param_group() -> None:
    optimizer = torch.optim.Adam([nn.Parameter(torch.rand(3))], amsgrad=True)
    place = Place(optimizer, optimizer.param_groups[0])
    form = sample_state("table", place, torch.float32, torch.device("cpu"))
    assert form.names == {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    assert form.step == 1
    assert not optimizer.state


def column_shards(widths: list[int]) -> list[LocalShard]:
    """Shards (6, width) of one rank in TorchRec's layout: all have the first one's width."""
    weights = torch.rand(6 * sum(widths))
    parameter = nn.Parameter(weights[: len(widths) * 6 * widths[0]].view(-1, widths[0]))
    kernel = SimpleNamespace(named_parameters_by_table=lambda: [("t", parameter)])
    shards = []
    for i, width in enumerate(widths):
        start = 6 * sum(widths[:i])
        weight = weights[start : start + 6 * width].view(6, width)
        shards.append(LocalShard("t", Box(0, sum(widths[:i]), 6, width), weight, {}, kernel))
    return shards


@pytest.mark.parametrize("state", [torch.rand(12, 4), torch.rand(12, 1), torch.rand(12)])
def test_parts_of_a_ranks_column_shards_are_stacked_in_a_state(
    state: Tensor,
) -> None:
    parts = [shard.part_of(state) for shard in column_shards([4, 4])]
    assert torch.equal(torch.cat(parts), state if state.shape[1:] == (4,) else state.view(12))
    parts[1].zero_()
    assert not state[6:].any()


def test_column_shards_of_different_widths_on_a_rank_are_refused() -> None:
    _, wide = column_shards([4, 12])
    with pytest.raises(ValueError, match="column shards of different widths on one rank"):
        wide.part_of(torch.rand(12, 4))
