"""Checksums detect a byte that changes on its way between two ranks."""

from __future__ import annotations

import re
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.support.dlrm_model import Piece, assemble, dense_state, pieces, train, trained
from tests.support.failing_moves import CASE, CHUNK_BYTES, NOTHING, Attempt, prune_with
from tests.support.process_group import ProcessGroup
from tests.support.runs import Run, assert_equal_runs, assert_equal_tables
from torchrec_fmp.reshard.reshard import MoveConfig

SENDER = 1
CHECKED = MoveConfig(chunk_bytes=CHUNK_BYTES, checksums=True)
UNCHECKED = MoveConfig(chunk_bytes=CHUNK_BYTES)


def flips_a_byte(in_round: int) -> mock._patch[object]:
    """Context in which a byte of the sender's n-th outgoing message is flipped."""
    exchange = dist.batch_isend_irecv
    sent = 0

    def corrupted(operations: list[dist.P2POp]) -> list[dist.Work]:
        nonlocal sent
        for operation in operations:
            if operation.op is dist.isend and operation.tensor.dtype == torch.uint8:
                sent += 1
                if sent == in_round and dist.get_rank() == SENDER:
                    # Not in place, because the tensor may be the table itself.
                    operation.tensor = operation.tensor.clone()
                    operation.tensor[5] ^= 16
        return exchange(operations)

    return mock.patch.object(dist, "batch_isend_irecv", corrupted)


def train_around(in_round: int | None) -> tuple[Attempt, Run]:
    """Training with a corrupted prune in the middle, or without one."""
    dmp, optimizer = trained(CASE)
    torch.manual_seed(5)
    attempt = Attempt(NOTHING, 0.0)
    if in_round is not None:
        with flips_a_byte(in_round):
            attempt, _ = prune_with(dmp, optimizer, CHECKED)
    losses = train(dmp, optimizer, range(3, 6))
    return attempt, (losses, pieces(dmp), dense_state(dmp, optimizer), torch.get_rng_state())


@pytest.mark.parametrize("in_round", [1, 4])
def test_a_flipped_byte_fails_the_prune_on_all_ranks_and_keeps_the_old_model(
    ranks_2: ProcessGroup, in_round: int
) -> None:
    results = ranks_2.run(train_around, in_round)
    receiver, sender = (attempt.error for attempt, _ in results)
    assert re.match(
        "CorruptionError: the message from rank 1 to rank 0 does not match its checksum: "
        r"(weight|sum) of table t_\w+, Box\(row=\d+, column=0, rows=\d+, columns=16\)",
        receiver,
    )
    assert sender.startswith("RuntimeError: moving the tables failed on rank 0: CorruptionError")
    untouched = ranks_2.run(train_around, None)
    assert_equal_runs([run for _, run in results], [run for _, run in untouched])


def pruned(move: MoveConfig, corrupt: bool) -> tuple[str, list[tuple[str, Piece]]]:
    dmp, optimizer = trained(CASE)
    with flips_a_byte(1 if corrupt else 0):
        attempt, done = prune_with(dmp, optimizer, move)
    return attempt.error, pieces(done.model) if done else []


def test_checksums_do_not_change_an_uncorrupted_move(ranks_2: ProcessGroup) -> None:
    checked, unchecked = (ranks_2.run(pruned, move, False) for move in (CHECKED, UNCHECKED))
    assert {error for error, _ in [*checked, *unchecked]} == {NOTHING}
    tables = [assemble(held for _, held in results) for results in (checked, unchecked)]
    assert tables[0].keys() == {"t_one", "t_shared", "t_last"}
    assert_equal_tables(*tables)
