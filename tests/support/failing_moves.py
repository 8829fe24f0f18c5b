"""A prune that is disturbed while tables move, in the middle of training."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch.optim import Optimizer
from torchrec.distributed.model_parallel import DistributedModelParallel

from tests.support.dlrm_model import (
    Case,
    FixedPlanner,
    batch,
    dense_state,
    pieces,
    select,
    train,
    trained,
)
from tests.support.runs import Run
from torchrec_fmp.pruning.prune import prune
from torchrec_fmp.reshard import mover
from torchrec_fmp.reshard.reshard import MoveConfig

# Row-wise tables become table-wise ones in messages of a row or two: every rank has several rounds.
CASE = Case("row_wise", rows=40)
CHUNK_BYTES = 256
GATES = {"a": 0.0, "c": 0.0}
NOTHING = "nothing was raised"


class Attempt(NamedTuple):
    """The error that `prune` raised, and the seconds it took."""

    error: str
    seconds: float


def prune_with(
    dmp: DistributedModelParallel, optimizer: Optimizer, move: MoveConfig
) -> tuple[Attempt, Any]:
    """An attempt to prune, and its result if it succeeded."""
    planner = FixedPlanner("table_wise", first_rank=1)
    start = time.monotonic()
    try:
        done = prune(
            dmp, optimizer, select(GATES, CASE), planner=planner, batch=batch(7), move=move
        )
    except Exception as error:
        return Attempt(f"{type(error).__name__}: {error}", time.monotonic() - start), None
    return Attempt(NOTHING, time.monotonic() - start), done


def disturbed(disturb: Callable[[], None], victim: int, in_round: int) -> Any:
    """Context in which `disturb` happens on a rank before its n-th round of the exchange."""
    rounds = 0
    begin = mover._Round.__init__

    def interrupted(*args: Any) -> None:
        nonlocal rounds
        rounds += 1
        if rounds == in_round and dist.get_rank() == victim:
            disturb()
        begin(*args)

    return mock.patch.object(mover._Round, "__init__", interrupted)


def train_around(disturb: Callable[[], None] | None, move: MoveConfig) -> tuple[Attempt, Run]:
    """Training with a prune that is disturbed on rank 1 in the middle, or without one."""
    dmp, optimizer = trained(CASE)
    torch.manual_seed(5)
    attempt = Attempt(NOTHING, 0.0)
    if disturb is not None:
        with disturbed(disturb, victim=1, in_round=3):
            attempt, _ = prune_with(dmp, optimizer, move)
    losses = train(dmp, optimizer, range(3, 6))
    return attempt, (losses, pieces(dmp), dense_state(dmp, optimizer), torch.get_rng_state())
