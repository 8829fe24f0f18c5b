"""Arguments, errors and modules that differ on one rank, and unusual modules."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import nn
from torch.optim import Optimizer
from torchrec.distributed.model_parallel import DistributedModelParallel

from tests.support.dlrm_model import (
    Case,
    FixedPlanner,
    adam,
    batch,
    build,
    forward,
    select,
    shard,
    train,
    trained,
)
from tests.support.process_group import ProcessGroup
from torchrec_fmp import MoveConfig
from torchrec_fmp.embeddings.local_shards import LocalShard
from torchrec_fmp.pruning import building
from torchrec_fmp.pruning.prune import Pruned, prune
from torchrec_fmp.reshard import tables as tables_module
from torchrec_fmp.reshard.staging import HostStage

CASE = Case("row_wise", rows=40)
GATES = {"a": 0.0, "c": 0.0}
NOTHING = "nothing was raised"
SECONDS = 5.0


def pruned(dmp: DistributedModelParallel, optimizer: Optimizer, **arguments: Any) -> Pruned:
    arguments.setdefault("batch", batch(7))
    arguments.setdefault("move", MoveConfig(timeout_seconds=SECONDS))
    planner = FixedPlanner("table_wise", first_rank=1)
    return prune(dmp, optimizer, select(GATES, CASE), planner=planner, **arguments)


def refused(dmp: DistributedModelParallel, optimizer: Optimizer, **arguments: Any) -> str:
    try:
        pruned(dmp, optimizer, **arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return NOTHING


# Argument -> its value on rank 0 and on rank 1.
DIFFERENT: dict[str, Callable[[], tuple[Any, Any]]] = {
    "tolerance": lambda: (1e-15, 1.0),
    "replan": lambda: ("sticky", "planner"),
    "steps_left": lambda: (None, 10),
    "chunks": lambda: (MoveConfig(chunk_bytes=256), MoveConfig(chunk_bytes=4096)),
    "staging": lambda: (MoveConfig(staging="host"), MoveConfig(staging="none")),
    "batch": lambda: (batch(7), None),
}


def with_different(what: str) -> tuple[str, str]:
    dmp, optimizer = trained(CASE)
    name = what if what not in ("chunks", "staging") else "move"
    error = refused(dmp, optimizer, **{name: DIFFERENT[what]()[dist.get_rank()]})
    return error, refused(dmp, optimizer)


@pytest.mark.parametrize("what", DIFFERENT)
def test_arguments_that_differ_between_ranks_are_refused_on_all(
    ranks_2: ProcessGroup, what: str
) -> None:
    for error, afterwards in ranks_2.run(with_different, what):
        assert error.startswith("RuntimeError: an argument other than the batch")
        assert "ranks [1] disagree with rank 0" in error
        assert afterwards == NOTHING


def with_a_kernel_that_one_rank_does_not_know() -> tuple[str, str]:
    dmp, optimizer = trained(CASE)
    known = tables_module.local_shards

    def unknown(collection: Any) -> Iterator[LocalShard]:
        if dist.get_rank() == 1:
            raise TypeError("kernel X")
        yield from known(collection)

    with mock.patch.object(tables_module, "local_shards", unknown):
        error = refused(dmp, optimizer)
    return error, refused(dmp, optimizer)


def test_tables_that_one_rank_cannot_read_are_refused_on_all(ranks_2: ProcessGroup) -> None:
    first, second = ranks_2.run(with_a_kernel_that_one_rank_does_not_know)
    assert "taking stock of the tables failed on rank 1: TypeError('kernel X')" in first[0]
    assert second[0] == "TypeError: kernel X"
    assert first[1] == second[1] == NOTHING


def with_a_forward_that_fails_on_rank_1() -> str:
    dmp, optimizer = trained(CASE)

    def failing(model: nn.Module, some: Any) -> Any:
        if dist.get_rank() == 1:
            raise KeyError("no such feature")
        return model(some)

    return refused(dmp, optimizer, forward=failing)


def test_a_forward_that_fails_on_one_rank_fails_on_all_without_a_hang() -> None:
    # A separate group, because the failed forward leaves an unfinished collective in it.
    group = ProcessGroup(2, timeout_seconds=60)
    try:
        first, second = group.run(with_a_forward_that_fails_on_rank_1)
    finally:
        group.close()
    assert first.startswith("RuntimeError: the old model's forward failed on rank 1: KeyError")
    assert second.startswith("KeyError")


def with_modules_of_their_own_modes() -> tuple[dict[str, bool], dict[str, bool]]:
    dmp, optimizer = trained(CASE)
    dmp.module.get_submodule("model.over_arch").eval()
    dmp.module.get_submodule("model.dense_arch._module").eval()
    new = pruned(dmp, optimizer).model
    return modes(dmp), modes(new)


def modes(dmp: DistributedModelParallel) -> dict[str, bool]:
    return {
        fqn.replace("._module", ""): module.training
        for fqn, module in dmp.module.named_modules()
        if isinstance(module, nn.Linear)
    }


def test_every_module_keeps_its_train_or_eval_mode(ranks: ProcessGroup) -> None:
    for before, after in ranks.run(with_modules_of_their_own_modes):
        assert after == before
        assert not any(after.values())
    ((_, after), *_) = ranks.run(with_modules_of_their_own_modes)
    assert after


class WithExtraState(nn.Module):
    """Extra state that is not a tensor, and a non-persistent buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = {"batches": 3}
        self.register_buffer("scale", torch.tensor([2.0]), persistent=False)

    def get_extra_state(self) -> dict[str, int]:
        return self.seen

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.seen = state


def with_extra_state() -> tuple[dict[str, int], float]:
    model = build(CASE)
    model.extra = WithExtraState()
    dmp = shard(CASE, model)
    optimizer = adam(dmp)
    train(dmp, optimizer, range(2))
    extra = pruned(dmp, optimizer).model.module.extra
    return extra.seen, float(extra.scale)


def test_extra_state_and_non_persistent_buffers_survive(
    ranks: ProcessGroup,
) -> None:
    for found in ranks.run(with_extra_state):
        assert found == ({"batches": 3}, 2.0)


def alive(but: set[int]) -> int:
    """Weight bytes of all live FBGEMM tables, except the modules with the ids `but`."""
    found = [
        module
        for module in gc.get_objects()
        if isinstance(module, SplitTableBatchedEmbeddingBagsCodegen) and id(module) not in but
    ]
    return sum(
        weights.untyped_storage().nbytes()
        for module in found
        for weights in (module.weights_host, module.weights_dev)
    )


def with_a_staged_build_that_fails() -> tuple[str, list[int], str]:
    dmp, optimizer = trained(CASE)
    gc.collect()
    before = {id(module) for module in gc.get_objects()}
    held: list[int] = []
    restore = HostStage.restore

    def watched(self: HostStage) -> None:
        held.append(alive(before))
        restore(self)

    class TooLarge(DistributedModelParallel):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if dist.get_rank() == 1:
                raise torch.OutOfMemoryError("out of memory")

    move = MoveConfig(staging="host", timeout_seconds=SECONDS)
    with (
        mock.patch.object(HostStage, "restore", watched),
        mock.patch.object(building, "DistributedModelParallel", TooLarge),
    ):
        error = refused(dmp, optimizer, move=move)
    forward(dmp, batch(3))
    return error, held, refused(dmp, optimizer, move=move)


def test_the_new_tables_are_freed_before_the_old_ones_are_restored(
    ranks_2: ProcessGroup,
) -> None:
    first, second = ranks_2.run(with_a_staged_build_that_fails)
    assert "building the smaller model failed on rank 1" in first[0]
    assert second[0] == "OutOfMemoryError: out of memory"
    assert first[1] == second[1] == [0]
    assert first[2] == second[2] == NOTHING
