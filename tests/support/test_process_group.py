"""The harness itself: a failing, dying or hanging rank must show up in the test."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.support.process_group import ProcessGroup, RankError


def sum_over_ranks(offset: int) -> tuple[int, int, torch.Tensor]:
    value = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(value)
    return dist.get_rank(), dist.get_world_size(), value


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("planted")
    dist.barrier()


def die_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def hang_on_rank_0() -> None:
    if dist.get_rank() == 0:
        time.sleep(600)


def test_results_come_back_by_rank(ranks_2: ProcessGroup) -> None:
    results = ranks_2.run(sum_over_ranks, 10)
    assert [(rank, world_size) for rank, world_size, _ in results] == [(0, 2), (1, 2)]
    assert all(value.item() == 21 for _, _, value in results)


def test_a_group_of_one_rank_is_initialised_outside_of_the_pytest_process(
    ranks_1: ProcessGroup,
) -> None:
    assert ranks_1.run(sum_over_ranks, 5) == [(0, 1, torch.tensor([5.0]))]
    assert not dist.is_initialized()


def test_a_failing_dying_or_hanging_rank_is_named_and_the_group_recovers() -> None:
    group = ProcessGroup(2, timeout_seconds=4)
    try:
        with pytest.raises(RankError, match=r"rank 1 of 2: Traceback[\s\S]*ValueError: planted"):
            group.run(fail_on_rank_1)
        with pytest.raises(RankError, match="rank 1 of 2: died with exit code 7"):
            group.run(die_on_rank_1)
        with pytest.raises(RankError, match=r"hang_on_rank_0 failed\nranks \[0\] of 2: no answer"):
            group.run(hang_on_rank_0)
        assert len(group.run(sum_over_ranks, 0)) == 2
    finally:
        group.close()
