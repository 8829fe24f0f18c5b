"""Tables that move between up to 8 simulated ranks; test_reshard.py uses real ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.placements import Shards, array, box_of, placements
from tests.support.simulated_ranks import Network, cut_out, rank_tables, run_ranks
from torchrec_fmp.embeddings.boxes import Box
from torchrec_fmp.reshard.itinerary import copy_local, itinerary
from torchrec_fmp.reshard.mover import CorruptionError, exchange
from torchrec_fmp.reshard.tables import Tables

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Table:
    """A table before and after.

    Args:
        weight: weight (rows, columns).
        momentum: element-wise state (rows, columns).
        sums: row-wise state, expanded to (rows, columns): each element has its shard's value.
        seen: row-wise state of whole numbers, expanded in the same way.
        sources: old shards.
        targets: new shards.
    """

    weight: Tensor
    momentum: Tensor
    sums: Tensor
    seen: Tensor
    sources: Shards
    targets: Shards

    def held(self, box: Box) -> tuple[Tensor, dict[str, Tensor]]:
        """Weight and states of an old shard."""
        states = {
            "momentum": cut_out(self.momentum, box),
            "sum": cut_out(self.sums, box)[:, 0].clone(),
            "prev_iter": cut_out(self.seen, box)[:, 0].clone(),
        }
        return cut_out(self.weight, box), states

    def unfilled(self, box: Box) -> tuple[Tensor, dict[str, Tensor]]:
        """Weight and states of a new shard; its values before it is filled must not show."""
        shape = (box.rows, box.columns)
        states = {
            "momentum": torch.full(shape, 7.0),
            "sum": torch.full((box.rows,), 7.0),
            "prev_iter": torch.full((box.rows,), 10**6),
        }
        return torch.full(shape, 7.0, dtype=self.weight.dtype), states


@st.composite
def tables(draw: st.DrawFn, ranks: int) -> Table:
    rows, columns = draw(st.integers(1, 12)), draw(st.integers(1, 8))
    sources = draw(placements(rows, columns, ranks))
    sums, seen = torch.empty(rows, columns), torch.empty(rows, columns, dtype=torch.int64)
    for box in dict.fromkeys(map(box_of, sources)):
        rows_of, columns_of = (
            slice(box.row, box.row + box.rows),
            slice(box.column, box.column + box.columns),
        )
        sums[rows_of, columns_of] = torch.rand(box.rows, 1)
        # The same in all column shards of a row.
        seen[rows_of, columns_of] = torch.arange(box.row, box.row + box.rows).unsqueeze(1)
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    return Table(
        torch.rand(rows, columns).to(dtype),
        torch.rand(rows, columns),
        sums,
        seen,
        sources,
        draw(placements(rows, columns, ranks)),
    )


@st.composite
def models(draw: st.DrawFn) -> tuple[int, dict[str, Table], list[tuple[str, str]]]:
    """Number of ranks, tables, and which of them survive under which fqn."""
    ranks = draw(st.integers(1, 8))
    model = {f"t{i}": draw(tables(ranks)) for i in range(draw(st.integers(1, 3)))}
    survivors = draw(st.permutations([name for name in model if draw(st.booleans())]))
    return ranks, model, [(name, f"new.{name}") for name in survivors]


def hold(ranks: int, model: dict[str, Table], moved: list[tuple[str, str]]) -> Any:
    """Every rank's tables before and after."""
    source = {after: model[before] for before, after in moved}
    old = {name: table.sources for name, table in model.items()}
    new = {name: table.targets for name, table in source.items()}
    return [
        (
            rank_tables(old, lambda name, box: model[name].held(box), rank),
            rank_tables(new, lambda name, box: source[name].unfilled(box), rank),
        )
        for rank in range(ranks)
    ]


def move(
    held: list[tuple[Tables, Tables]],
    moved: list[tuple[str, str]],
    chunk_bytes: int = 64,
    checksums: bool = False,
    network: Network | None = None,
) -> None:
    def of_rank(group: Any) -> None:
        todo = itinerary(*held[group.rank], moved, group.rank)
        copy_local(todo)
        exchange(todo, group, CPU, chunk_bytes, checksums, lambda: None)

    run_ranks(network or Network(), len(held), of_rank)


@settings(deadline=None)
@given(models(), st.integers(1, 300), st.booleans())
def test_weights_and_element_wise_states_arrive_bit_equal(
    given_model: tuple[int, dict[str, Table], list[tuple[str, str]]], size: int, checksums: bool
) -> None:
    ranks, model, moved = given_model
    held = hold(ranks, model, moved)
    move(held, moved, size, checksums)
    for before, after in moved:
        shards = [shard for _, new in held for shard in new.local[after]]
        assert len(shards) == len(model[before].targets)
        for shard in shards:
            assert torch.equal(shard.weight, cut_out(model[before].weight, shard.box))
            assert torch.equal(shard.states["momentum"], cut_out(model[before].momentum, shard.box))


@settings(deadline=None)
@given(models(), st.integers(1, 300))
def test_row_wise_states_become_the_mean_weighted_by_width_and_counters_stay(
    given_model: tuple[int, dict[str, Table], list[tuple[str, str]]], size: int
) -> None:
    ranks, model, moved = given_model
    held = hold(ranks, model, moved)
    move(held, moved, size)
    for before, after in moved:
        for shard in (shard for _, new in held for shard in new.local[after]):
            sums = cut_out(model[before].sums, shard.box)
            torch.testing.assert_close(shard.states["sum"], sums.mean(1))
            seen = cut_out(model[before].seen, shard.box)
            assert torch.equal(shard.states["prev_iter"], seen[:, 0])
            is_part = (sums == sums[:, :1]).all(1)
            if is_part.all():
                assert torch.equal(shard.states["sum"], sums[:, 0]), "a part is copied exactly"


@settings(deadline=None, max_examples=30)
@given(models())
def test_the_old_tables_are_neither_changed_nor_shared(
    given_model: tuple[int, dict[str, Table], list[tuple[str, str]]],
) -> None:
    ranks, model, moved = given_model
    held = hold(ranks, model, moved)
    move(held, moved)
    for _, new in held:
        for shard in new:
            for tensor in shard.tensors.values():
                tensor.zero_()
    for old, _ in held:
        for shard in old:
            weight, states = model[shard.table].held(shard.box)
            for name, tensor in {"weight": weight, **states}.items():
                assert torch.equal(shard.tensors[name], tensor)


@settings(deadline=None, max_examples=50)
@given(models(), st.integers(1, 300))
def test_each_rank_receives_only_missing_parts_in_bounded_messages(
    given_model: tuple[int, dict[str, Table], list[tuple[str, str]]], size: int
) -> None:
    ranks, model, moved = given_model
    network = Network()
    held = hold(ranks, model, moved)
    lacking = 0
    for rank, (old, new) in enumerate(held):
        todo = itinerary(old, new, moved, rank)
        lacking += sum(part.view.nbytes for parts in todo.incoming.values() for part in parts)
        assert rank not in todo.incoming and rank not in todo.outgoing
    move(held, moved, size, network=network)
    assert all(origin != rank for origin, rank, _ in network.received)
    row = 4 * 8  # The widest row of a momentum.
    assert all(received <= max(size // 4, row) for _, _, received in network.received)
    if size < 128:
        # Less than the padded bytes of two parts: nothing is padded.
        assert lacking == sum(received for _, _, received in network.received)


@settings(deadline=None, max_examples=50)
@given(models())
def test_both_ends_expect_the_same_parts_in_the_same_order(
    given_model: tuple[int, dict[str, Table], list[tuple[str, str]]],
) -> None:
    ranks, model, moved = given_model
    todo = [
        itinerary(old, new, moved, rank)
        for rank, (old, new) in enumerate(hold(ranks, model, moved))
    ]

    def described(parts: list[Any]) -> list[Any]:
        # The name without the table, whose fqn has changed.
        return [(p.name.split(" of ")[0], p.view.shape, p.view.dtype, p.share) for p in parts]

    for origin in range(ranks):
        for to in range(ranks):
            leaving = todo[origin].outgoing.get(to, [])
            assert described(leaving) == described(todo[to].incoming.get(origin, []))


def halves() -> tuple[list[tuple[Tables, Tables]], list[tuple[str, str]]]:
    """A table of 40 rows that goes from rank 0 to rank 1."""
    zeros = torch.zeros(40, 4)
    sources, targets = array((0, 0, 0, 40, 4)), array((1, 0, 0, 40, 4))
    table = Table(torch.rand(40, 4), zeros, zeros, zeros.long(), sources, targets)
    moved = [("t", "t")]
    return hold(2, {"t": table}, moved), moved


def flip_a_bit(message: Tensor) -> None:
    message[-1] ^= 1


def test_a_checksum_detects_a_bit_flipped_on_the_way() -> None:
    held, moved = halves()
    with pytest.raises(CorruptionError, match="from rank 0 to rank 1 .* of table t, Box"):
        move(held, moved, 2**16, checksums=True, network=Network(damage=flip_a_bit))


def test_a_failed_check_ends_the_exchange_between_two_rounds() -> None:
    held, moved = halves()
    network = Network()
    calls: list[int] = []

    def of_rank(group: Any) -> None:
        def check() -> None:
            calls.append(group.rank)
            if calls.count(group.rank) == 4:
                raise RuntimeError(f"rank {group.rank} gives up")

        todo = itinerary(*held[group.rank], moved, group.rank)
        exchange(todo, group, CPU, 64, False, check)

    with pytest.raises(RuntimeError, match="gives up"):
        run_ranks(network, 2, of_rank)
    assert 0 < len(network.received) < 40
