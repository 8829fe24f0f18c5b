"""Tables staged in host memory while the new ones are built: same result, less memory."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
import torch.distributed as dist

from tests.support.dlrm_model import (
    Case,
    FixedPlanner,
    Piece,
    Tensors,
    assemble,
    batch,
    dense_state,
    kept_dense,
    pieces,
    select,
    train,
    trained,
)
from tests.support.failing_moves import CASE, CHUNK_BYTES, NOTHING, Attempt, disturbed, prune_with
from tests.support.process_group import ProcessGroup
from tests.support.runs import Run, assert_equal_runs, assert_equal_tables
from torchrec_fmp.pruning.prune import prune
from torchrec_fmp.reshard.reshard import MoveConfig
from torchrec_fmp.reshard.tables import storages, tables

GATES = {"e": 0.0, "c": 0.0, "x": 0.0}
PAIRS = [
    ("table_wise", "row_wise"),
    ("row_wise", "column_wise"),
    ("column_wise", "table_wise"),
    ("mixed", "mixed"),
    ("data_parallel", "data_parallel"),
]


def storage_bytes(dmp: torch.nn.Module) -> list[int]:
    """Bytes of every storage that holds this rank's tables."""
    assert dist.group.WORLD is not None
    return [
        tensor.untyped_storage().nbytes()
        for tensor in storages(tables(dmp, dist.group.WORLD, MoveConfig().timeout))
    ]


Outcome = tuple[list[float], list[tuple[str, Piece]], Tensors, str]


def pruned(case: Case, to: str, staging: Literal["none", "host"]) -> Outcome:
    """Losses of the steps after the prune, and this rank's pieces, dense state and staging."""
    dmp, optimizer = trained(case)
    selection = select(GATES, case)
    done = prune(
        dmp,
        optimizer,
        selection,
        planner=FixedPlanner(to, first_rank=1),
        batch=batch(7),
        move=MoveConfig(staging=staging, chunk_bytes=CHUNK_BYTES),
    )
    losses = train(done.model, done.optimizer, range(3, 6), kept_dense(selection))
    state = dense_state(done.model, done.optimizer)
    return losses, pieces(done.model), state, done.manifest.staging


@pytest.mark.parametrize(("old", "new"), PAIRS, ids=[f"{a} to {b}" for a, b in PAIRS])
def test_staging_in_host_memory_gives_the_same_model_bit_for_bit(
    ranks: ProcessGroup, old: str, new: str
) -> None:
    staged, direct = (ranks.run(pruned, Case(old), new, how) for how in ("host", "none"))
    assert {outcome[3] for outcome in staged} == {"host"}
    assert {outcome[3] for outcome in direct} == {"none"}
    assert_equal_tables(*(assemble(o[1] for o in outcomes) for outcomes in (staged, direct)))
    for (losses, _, state, _), (other_losses, _, other_state, _) in zip(
        staged, direct, strict=True
    ):
        assert losses == other_losses
        assert state.keys() == other_state.keys()
        for name, tensor in state.items():
            assert torch.equal(tensor, other_state[name]), name


def storages_around() -> tuple[list[int], list[int], str]:
    """Bytes of the old tables' storages before and after a staged prune, and its error."""
    dmp, optimizer = trained(CASE)
    assert dist.group.WORLD is not None
    held = storages(tables(dmp, dist.group.WORLD, MoveConfig().timeout))
    before = [tensor.untyped_storage().nbytes() for tensor in held]
    attempt, _ = prune_with(dmp, optimizer, MoveConfig(staging="host"))
    return before, [tensor.untyped_storage().nbytes() for tensor in held], attempt.error


def test_the_old_tables_take_no_memory_after_a_staged_prune(ranks: ProcessGroup) -> None:
    for before, after, error in ranks.run(storages_around):
        assert error == NOTHING
        assert sum(before) > 0
        assert sum(after) == 0


def fail() -> None:
    raise OSError("the link is down")


def train_around(prunes: bool) -> tuple[list[int], list[int], Attempt | None, Run]:
    """Training with a staged prune that fails in the middle, or without one."""
    dmp, optimizer = trained(CASE)
    torch.manual_seed(5)
    before, attempt = storage_bytes(dmp), None
    if prunes:
        move = MoveConfig(staging="host", chunk_bytes=CHUNK_BYTES)
        with disturbed(fail, victim=1, in_round=3):
            attempt, _ = prune_with(dmp, optimizer, move)
    after = storage_bytes(dmp)
    losses = train(dmp, optimizer, range(3, 6))
    run = (losses, pieces(dmp), dense_state(dmp, optimizer), torch.get_rng_state())
    return before, after, attempt, run


def test_the_old_tables_are_restored_after_a_failed_staged_prune(ranks_2: ProcessGroup) -> None:
    results = ranks_2.run(train_around, True)
    for rank, (before, after, attempt, _) in enumerate(results):
        assert attempt is not None
        assert ("OSError: the link is down" if rank == 1 else "failed on rank 1") in attempt.error
        assert before == after
        assert sum(before) > 0
    untouched = ranks_2.run(train_around, False)
    assert_equal_runs([result[3] for result in results], [result[3] for result in untouched])
