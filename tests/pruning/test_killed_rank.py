"""A rank that dies, fails or hangs while tables move: the others name it, and nothing is lost."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from tests.support.dlrm_model import Piece, assemble, pieces, shard, trained
from tests.support.failing_moves import (
    CASE,
    CHUNK_BYTES,
    Attempt,
    disturbed,
    prune_with,
    train_around,
)
from tests.support.process_group import ProcessGroup
from tests.support.runs import assert_equal_runs, assert_equal_tables
from tests.support.separate_ranks import run_separately
from torchrec_fmp.reshard.reshard import MoveConfig

Pieces = list[tuple[str, Piece]]

HANG_SECONDS = 12.0
# Gloo and the store report errors at once; without them, the others would wait this long.
TIMEOUT_SECONDS = 60.0


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_out_of_memory() -> None:
    raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")


def hang() -> None:
    time.sleep(HANG_SECONDS)


def killed(victim: int, directory: str) -> Attempt:
    """Outcome of the prune on a surviving rank."""
    dmp, optimizer = trained(CASE)
    dcp.save(dmp.state_dict(), checkpoint_id=directory)
    torch.save(pieces(dmp), f"{directory}/held_by_{dist.get_rank()}.pt")
    move = MoveConfig(chunk_bytes=CHUNK_BYTES, timeout_seconds=TIMEOUT_SECONDS)
    with disturbed(die, victim, in_round=3):
        return prune_with(dmp, optimizer, move)[0]


def loaded(directory: str) -> tuple[Pieces, Pieces]:
    """This rank's pieces from the checkpoint, and its pieces when the checkpoint was written."""
    dmp = shard(CASE)
    state = dmp.state_dict()
    dcp.load(state, checkpoint_id=directory)
    dmp.load_state_dict(state)
    return pieces(dmp), torch.load(f"{directory}/held_by_{dist.get_rank()}.pt")


# Rank 0 serves the store that the ranks agree through.
@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_rank_is_killed_the_others_fail_and_name_it(tmp_path: Path, victim: int) -> None:
    attempts = run_separately(3, killed, victim, str(tmp_path))
    assert attempts.keys() == {0, 1, 2} - {victim}
    for attempt in attempts.values():
        assert f"rank {victim}" in attempt.error
        assert "moving the tables failed" in attempt.error or "broke off" in attempt.error
        assert attempt.seconds < TIMEOUT_SECONDS / 2
    if victim == 1:
        check_checkpoint(str(tmp_path))


def check_checkpoint(directory: str) -> None:
    """The checkpoint from before the prune loads in new processes, bit for bit."""
    results = run_separately(3, loaded, directory)
    now, then = (
        {
            table: {"weight": tensors["weight"]}
            for table, tensors in assemble(result[i] for result in results.values()).items()
        }
        for i in (0, 1)
    )
    assert len(now) == 4
    assert_equal_tables(now, then)


def test_when_a_rank_runs_out_of_memory_all_fail_and_continue_training_unpruned(
    ranks_4: ProcessGroup,
) -> None:
    # The time limit of a message does not matter: the others are told.
    move = MoveConfig(chunk_bytes=CHUNK_BYTES)
    results = ranks_4.run(train_around, run_out_of_memory, move)
    for rank, (attempt, _) in enumerate(results):
        if rank == 1:
            assert attempt.error == "OutOfMemoryError: tried to allocate 20.00 GiB"
        else:
            told = "RuntimeError: moving the tables failed on rank 1: OutOfMemoryError"
            assert attempt.error.startswith(told)
        assert attempt.seconds < move.timeout_seconds / 10
    untouched = ranks_4.run(train_around, None, move)
    assert_equal_runs([run for _, run in results], [run for _, run in untouched])


def test_when_a_rank_hangs_the_others_time_out_and_name_it(ranks_2: ProcessGroup) -> None:
    move = MoveConfig(chunk_bytes=CHUNK_BYTES, timeout_seconds=HANG_SECONDS / 3)
    results = ranks_2.run(train_around, hang, move)
    (waited, _), (hung, _) = results
    assert "rank 1" in waited.error
    assert "Timed out" in waited.error
    assert HANG_SECONDS / 3 <= waited.seconds < HANG_SECONDS
    assert hung.error.startswith("RuntimeError: moving the tables failed on rank 0")
    untouched = ranks_2.run(train_around, None, move)
    assert_equal_runs([run for _, run in results], [run for _, run in untouched])
