"""Tables on their way from one plan to another: every surviving row and its optimizer state."""

from __future__ import annotations

import pickle
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torchrec.optim
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch.optim import Optimizer

from tests.support.dlrm_model import (
    DIM,
    SHARDINGS,
    Case,
    FixedPlanner,
    Piece,
    adam,
    assemble,
    dense_parameters,
    pieces,
    select,
    set_open,
    shard,
    train,
    trained,
)
from tests.support.process_group import ProcessGroup
from torchrec_fmp.embeddings.local_shards import local_shards, sharded_collections
from torchrec_fmp.pruning.prune import prune
from torchrec_fmp.reshard.reshard import MoveConfig
from torchrec_fmp.surgery.blueprint import blueprint

ROW_WISE_ADAGRAD = EmbOptimType.EXACT_ROWWISE_ADAGRAD
OPTIMIZERS = {
    ROW_WISE_ADAGRAD: {"weight", "sum"},
    EmbOptimType.EXACT_ADAGRAD: {"weight", "sum"},
    EmbOptimType.EXACT_SGD: {"weight"},
}
# Drops one table, and one feature of the shared table.
GATES = {"e": 0.0, "c": 0.0}
SURVIVORS = {"t_seven", "t_one", "t_shared"}
Pieces = list[tuple[str, Piece]]


def resharded(
    case: Case, to: list[str], move: MoveConfig | None = None
) -> tuple[Pieces, list[Pieces]]:
    """This rank's pieces before, and after a prune to each of the shardings."""
    dmp, _ = trained(case)
    before = pieces(dmp)
    after = []
    for sharding in to:
        planner = FixedPlanner(sharding, first_rank=1)
        pruned = prune(dmp, adam(dmp), select(GATES), planner=planner, move=move)
        after.append(pieces(pruned.model))
    return before, after


def check_survivors(
    results: list[tuple[Pieces, list[Pieces]]], optimizer: EmbOptimType, new: int
) -> None:
    old_tables = assemble(before for before, _ in results)
    new_pieces = [piece for _, after in results for piece in after[new]]
    assert assemble([new_pieces]).keys() == SURVIVORS
    for table, ((row, column, rows, columns), name, value) in new_pieces:
        assert old_tables[table].keys() == OPTIMIZERS[optimizer]
        old = old_tables[table][name][row : row + rows, column : column + columns]
        if name == "sum" and optimizer is ROW_WISE_ADAGRAD and (old != old[:, :1]).any():
            # Several column shards, each with its own mean of squares, were merged into one.
            torch.testing.assert_close(value, old.mean(1, keepdim=True).expand_as(value))
        else:
            assert torch.equal(value, old), f"{table}/{name}"


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: optimizer.name)
@pytest.mark.parametrize("old", [*SHARDINGS, "mixed"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_surviving_rows_and_their_state_are_bit_equal_under_any_new_sharding(
    request: pytest.FixtureRequest, world_size: int, old: str, optimizer: EmbOptimType
) -> None:
    group: ProcessGroup = request.getfixturevalue(f"ranks_{world_size}")
    to = [*SHARDINGS, "mixed"]
    results = group.run(resharded, Case(old, optimizer=optimizer), to)
    for new in range(len(to)):
        check_survivors(results, optimizer, new)


@pytest.mark.parametrize(
    ("move", "to"),
    [
        (MoveConfig(chunk_bytes=1), SHARDINGS),
        # A message of this size ends within a part, and not at a multiple of the padding.
        (MoveConfig(chunk_bytes=200, checksums=True), SHARDINGS),
        # Staging takes the old model's tables, so there is only one prune.
        (MoveConfig("host", chunk_bytes=200), ["column_wise"]),
    ],
    ids=["rows one by one", "small messages with checksums", "staged in host memory"],
)
def test_surviving_rows_are_bit_equal_however_they_move(
    ranks_4: ProcessGroup, move: MoveConfig, to: list[str]
) -> None:
    results = ranks_4.run(resharded, Case("mixed"), list(to), move)
    for new in range(len(to)):
        check_survivors(results, ROW_WISE_ADAGRAD, new)


def test_the_cases_include_uneven_empty_and_unequal_shards(ranks_4: ProcessGroup) -> None:
    results = ranks_4.run(resharded, Case("row_wise"), ["table_wise", "column_wise"])
    rows = [{piece[0][2] for table, piece in before if table == "t_seven"} for before, _ in results]
    assert rows == [{2}, {2}, {2}, {1}]
    one = [piece[0][2] for before, _ in results for table, piece in before if table == "t_one"]
    assert sorted(one)[-2:] == [1, 1], "the weight and the sum of the one row lie on one rank"
    # Four ranks, three tables: one holds nothing.
    assert [len(after[0]) == 0 for _, after in results].count(True) == 1
    narrow = assemble(before for before, _ in ranks_4.run(resharded, Case("column_wise"), []))
    state = narrow["t_shared"]["sum"]
    assert (state[:, : DIM // 4] != state[:, -DIM // 4 :]).any()


def moved(case: Case, to: str, move: MoveConfig | None = None) -> tuple[list[int], list[int]]:
    """Bytes of each message that this rank receives in a prune, and of each object it pickles."""
    dmp, optimizer = trained(case)
    received: list[int] = []
    pickled: list[int] = []
    exchange, gather = dist.batch_isend_irecv, dist.all_gather_object

    def record(operations: list[dist.P2POp]) -> list[dist.Work]:
        received.extend(op.tensor.nbytes for op in operations if op.op is dist.irecv)
        return exchange(operations)

    def weigh(objects: list[Any], own: Any, group: dist.ProcessGroup | None = None) -> None:
        pickled.append(len(pickle.dumps(own)))
        gather(objects, own, group=group)

    with (
        mock.patch.object(dist, "batch_isend_irecv", record),
        mock.patch.object(dist, "all_gather_object", weigh),
        mock.patch.object(dist, "all_gather", forbidden),
        mock.patch.object(dist, "all_gather_into_tensor", forbidden),
        mock.patch.object(dist, "gather", forbidden),
    ):
        planner = FixedPlanner(to, first_rank=1)
        prune(dmp, optimizer, select(GATES), planner=planner, move=move)
    return received, pickled


def forbidden(*_: Any, **__: Any) -> None:
    raise AssertionError("a prune gathers no tensors")


ROWS = 402


HALF = ROWS // 2


def message(tables: int, columns: int) -> int:
    """Bytes of weights and row-wise sums of half of the rows of some tables, as one message.

    Between two parts there is padding to a multiple of 16 bytes.
    """
    weight, sums = 4 * HALF * columns, 4 * HALF
    assert weight % 16 == 0
    return tables * weight + (tables - 1) * -(-sums // 16) * 16 + sums


def test_ranks_receive_only_what_their_new_shards_lack(ranks_2: ProcessGroup) -> None:
    # Where the plan stays, nothing moves.
    for received, _ in ranks_2.run(moved, Case("row_wise", rows=ROWS), "row_wise"):
        assert received == []
    # Tables 1, 2, 3 (the first to the third survivor) go to ranks 1, 0, 1: half of each was there.
    first, second = ranks_2.run(moved, Case("row_wise", rows=ROWS), "table_wise")
    assert first[0] == [message(1, DIM)]
    assert second[0] == [message(2, DIM)]
    # Every rank lacks a quarter of each of the three tables.
    for received, _ in ranks_2.run(moved, Case("row_wise", rows=ROWS), "column_wise"):
        assert received == [message(3, DIM // 2)]


def test_messages_fill_the_configured_chunk_without_exceeding_it(
    ranks_2: ProcessGroup,
) -> None:
    size = 4096
    move = MoveConfig(chunk_bytes=size)
    for received, _ in ranks_2.run(moved, Case("row_wise", rows=ROWS), "column_wise", move):
        # Two messages each way are under way at once.
        assert max(received) == size // 4
        lacking = 3 * HALF * (4 * DIM // 2 + 4)
        assert lacking <= sum(received) < lacking + 16 * (len(received) + 6)


@pytest.mark.parametrize("to", SHARDINGS)
def test_no_tensor_is_pickled(ranks_2: ProcessGroup, to: str) -> None:
    for _, pickled in ranks_2.run(moved, Case("row_wise", rows=ROWS), to):
        assert 0 < len(pickled)
        assert max(pickled) < 4 * ROWS


def progressed(schedules: bool) -> dict[str, tuple[int, float, float]]:
    """Table -> step counter and learning rate of the kernel, and rate of the parameter group."""
    dmp, optimizer = trained(Case("row_wise"))
    for param_group in dmp.fused_optimizer.param_groups:
        param_group["lr"] = 0.03
    dmp.fused_optimizer.zero_grad()
    if schedules:
        # As a scheduler does after the optimizer's step.
        for param_group in dmp.fused_optimizer.param_groups:
            param_group["lr"] = 0.02
    pruned = prune(dmp, optimizer, select(GATES), planner=FixedPlanner("table_wise", 1)).model
    found = {}
    for collection in sharded_collections(pruned).values():
        for local in local_shards(collection):
            kernel: Any = local.kernel
            (param_group,) = kernel.fused_optimizer.param_groups
            found[local.table] = (
                int(kernel.emb_module.iter.item()),
                round(kernel.emb_module.get_learning_rate(), 6),
                param_group["lr"],
            )
    return found


def test_step_counter_and_learning_rate_survive(ranks: ProcessGroup) -> None:
    for schedules, rate in ((False, 0.03), (True, 0.02)):
        results = ranks.run(progressed, schedules)
        found = {table: value for result in results for table, value in result.items()}
        assert found == dict.fromkeys(SURVIVORS, (3, 0.03, rate))


def in_backward(optimizer: type[Optimizer]) -> tuple[Any, ...]:
    """Pieces before and after, and the settings on the tables' parameters before and after."""
    case = Case(in_backward=optimizer)
    dmp, dense = trained(case)
    before, settings = pieces(dmp), settings_of(dmp)
    pruned = prune(dmp, dense, select(GATES), planner=FixedPlanner("row_wise"))
    after, kept = pieces(pruned.model), settings_of(pruned.model)
    train(pruned.model, pruned.optimizer, range(3, 5))
    assert any(
        not torch.equal(piece[2], trained_on[2])
        for (_, piece), (_, trained_on) in zip(after, pieces(pruned.model), strict=True)
    )
    return before, [after], settings, kept


def settings_of(dmp: Any) -> dict[str, tuple[Any, Any]]:
    return {
        name: (parameter._optimizer_classes, parameter._optimizer_kwargs)
        for name, parameter in blueprint(dmp).model.named_parameters()
        if "embedding_bags" in name
    }


@pytest.mark.parametrize(
    ("optimizer", "fused"),
    [
        (torchrec.optim.RowWiseAdagrad, ROW_WISE_ADAGRAD),
        (torch.optim.Adagrad, EmbOptimType.EXACT_ADAGRAD),
        (torch.optim.SGD, EmbOptimType.EXACT_SGD),
    ],
)
def test_settings_of_apply_optimizer_in_backward_survive(
    ranks: ProcessGroup, optimizer: type[Optimizer], fused: EmbOptimType
) -> None:
    results = ranks.run(in_backward, optimizer)
    check_survivors([(before, after) for before, after, _, _ in results], fused, 0)
    for _, _, settings, kept in results:
        assert len(kept) == len(SURVIVORS)
        for name, value in kept.items():
            assert value == settings[name]
            assert value[0] == [optimizer]
            assert 0.1 in value[1][0].values()


def data_parallel(case: Case, prunes: bool) -> tuple[list[float], Pieces, dict[str, Any]]:
    dmp = shard(case)
    set_open(dmp)
    optimizer: Optimizer = torch.optim.Adagrad(dense_parameters(dmp).values(), lr=0.05)
    losses = train(dmp, optimizer, range(3))
    if prunes:
        planner = FixedPlanner("data_parallel")
        dmp, optimizer, _ = prune(dmp, optimizer, select({}), planner=planner)
    losses += train(dmp, optimizer, range(3, 6))
    sums = {
        name.replace("._embedding_bag_collection", ""): optimizer.state[parameter]["sum"].clone()
        for name, parameter in dmp.named_parameters()
        if "embedding_bags" in name
    }
    return losses, pieces(dmp), sums


def test_data_parallel_tables_keep_their_dense_optimizers_state(ranks: ProcessGroup) -> None:
    pruned = ranks.run(data_parallel, Case("data_parallel"), True)
    untouched = ranks.run(data_parallel, Case("data_parallel"), False)
    for (losses, tables, sums), (other_losses, other_tables, other_sums) in zip(
        pruned, untouched, strict=True
    ):
        assert losses == other_losses
        assert len(sums) == len(tables) == 4
        for (table, (box, _, value)), (_, (_, _, other)) in zip(tables, other_tables, strict=True):
            assert torch.equal(value, other), (table, box)
        for name, value in sums.items():
            assert value.any()
            assert torch.equal(value, other_sums[name]), name
