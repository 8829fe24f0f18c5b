"""Results of a stretch of training, and their bit-for-bit comparison."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tests.support.dlrm_model import Piece, Tensors, assemble

# Losses, this rank's pieces of the tables, dense state, and the global random state.
Run = tuple[list[float], list[tuple[str, Piece]], Tensors, Tensor]


def assert_equal_runs(runs: list[Run], others: list[Run]) -> None:
    assert_equal_tables(assemble(run[1] for run in runs), assemble(run[1] for run in others))
    for (losses, _, state, rng), (other_losses, _, other_state, other_rng) in zip(
        runs, others, strict=True
    ):
        assert losses == other_losses
        assert state.keys() == other_state.keys()
        for name, tensor in state.items():
            assert torch.equal(tensor, other_state[name]), name
        assert torch.equal(rng, other_rng)


def assert_equal_tables(tables: Mapping[str, Tensors], others: Mapping[str, Tensors]) -> None:
    assert tables.keys() == others.keys()
    for table, tensors in tables.items():
        assert tensors.keys() == others[table].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, others[table][name]), f"{table}/{name}"
