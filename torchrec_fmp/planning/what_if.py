"""Predicts, without ranks or weights, what a prune would do to plans, memory and step time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import ShardingPlan
from tqdm import tqdm

from torchrec_fmp.embeddings.boxes import shards_of
from torchrec_fmp.embeddings.seams import topology_of
from torchrec_fmp.planning.estimates import PlanEstimate, device_memory, estimate_as, sharding_of
from torchrec_fmp.planning.replan import Comparison, PlanCost, compare, sticky_plan
from torchrec_fmp.planning.shardable import ShardableTable, Sharders, shardable_tables
from torchrec_fmp.reshard.transfer_plan import TableMove, link_bytes


@dataclass(frozen=True)
class Size:
    """The size of a model's tables.

    Args:
        features: number of features that have a table.
        tables: number of tables.
        parameters: number of parameters in the tables' weights.
        bytes: bytes of the tables' weights, without optimizer state.
    """

    features: int
    tables: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class PlanFigures:
    """The cost of a plan, and of the move to it.

    Args:
        rank_bytes: minimum, median and maximum bytes in a rank's device memory: tables, optimizer
            state, inputs and outputs.
        step_ms: estimated step time of the slowest rank.
        planner_seconds: time that TorchRec's planner took; None for a plan that it did not make.
        moved_bytes: bytes of weights and optimizer state sent from one rank to another.
        busiest_rank_bytes: most bytes that one rank sends or receives.
        busiest_link_bytes: most bytes that one rank sends to another.
    """

    rank_bytes: tuple[int, int, int]
    step_ms: float
    planner_seconds: float | None = None
    moved_bytes: int = 0
    busiest_rank_bytes: int = 0
    busiest_link_bytes: int = 0


@dataclass(frozen=True)
class WhatIf:
    """A prune, before and after; `planner` is None if TorchRec finds none for the smaller model."""

    world_size: int
    memory: str
    size_before: Size
    size_after: Size
    before: PlanFigures
    sticky: PlanFigures
    planner: PlanFigures | None
    comparison: Comparison

    def describe(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def what_if(
    model: nn.Module,
    smaller_model: nn.Module,
    planner: EmbeddingShardingPlanner,
    smaller_planner: EmbeddingShardingPlanner,
    sharders: Sharders,
    steps_left: int | None = None,
) -> WhatIf:
    """Plans a model and its pruned version, and compares staying with moving.

    Shows a progress bar on stderr if it is a terminal.

    Args:
        model: unsharded model, may be on meta.
        smaller_model: same model after the prune, under the same fqns.
        planner: planner for `model`.
        smaller_planner: planner for `smaller_model`, on the same topology.
        sharders: sharders, as for `DistributedModelParallel`.
        steps_left: training steps remaining after the prune; None is treated as unlimited.

    Raises:
        ValueError: if TorchRec's planner finds no plan for `model`.
    """
    topology = topology_of(planner)
    tables = shardable_tables(smaller_model, sharders)
    with tqdm(total=4, disable=None, leave=False) as progress:
        with _stage(progress, "planning the model"):
            old_plan, seconds = _planned(planner, model, sharders)
            old = estimate_as(planner, old_plan, model, sharders)
        with _stage(progress, "planning the smaller model"):
            try:
                new_plan, new_seconds = _planned(smaller_planner, smaller_model, sharders)
            except ValueError:
                new_plan, new_seconds = None, None
        with _stage(progress, "estimating the sticky plan"):
            sticky = sticky_plan(old_plan, smaller_model)
            sticky_links = _link_bytes(old_plan, sticky, tables, topology)
            staying = _figures(
                estimate_as(smaller_planner, sticky, smaller_model, sharders), topology
            )
        moving, planned = None, None
        with _stage(progress, "estimating the planner's plan"):
            if new_plan is not None:
                links = _link_bytes(old_plan, new_plan, tables, topology)
                new = estimate_as(smaller_planner, new_plan, smaller_model, sharders)
                moving = _figures(new, topology, new_seconds, links)
                planned = PlanCost(new.step_ms, links)
    return WhatIf(
        world_size=topology.world_size,
        memory=device_memory(topology),
        size_before=_size(shardable_tables(model, sharders)),
        size_after=_size(tables),
        before=_figures(old, topology, seconds),
        sticky=staying,
        planner=moving,
        comparison=compare(PlanCost(staying.step_ms, sticky_links), planned, topology, steps_left),
    )


def _planned(
    planner: EmbeddingShardingPlanner, model: nn.Module, sharders: Sharders
) -> tuple[ShardingPlan, float]:
    start = time.perf_counter()
    try:
        plan = planner.plan(model, list(sharders))
    except PlannerError as error:
        raise ValueError(f"TorchRec's planner finds no plan: {error}") from error
    return plan, time.perf_counter() - start


def _link_bytes(
    old: ShardingPlan, new: ShardingPlan, tables: Sequence[ShardableTable], topology: Topology
) -> NDArray[np.int64]:
    def moves() -> Iterator[TableMove]:
        for table in tables:
            rows, columns = table.weight.shape
            sources, targets = (
                shards_of(sharding_of(plan, table), rows, columns, topology.world_size)
                for plan in (old, new)
            )
            yield TableMove(
                table.name, sources, targets, table.bytes_per_element, table.bytes_per_row
            )

    return link_bytes(moves(), topology.world_size)


def _figures(
    estimated: PlanEstimate,
    topology: Topology,
    planner_seconds: float | None = None,
    links: NDArray[np.int64] | None = None,
) -> PlanFigures:
    held = estimated.device_bytes(topology)
    between = np.zeros((1, 1), np.int64) if links is None else links - np.diag(np.diag(links))
    return PlanFigures(
        rank_bytes=(int(held.min()), int(np.median(held)), int(held.max())),
        step_ms=estimated.step_ms,
        planner_seconds=planner_seconds,
        moved_bytes=int(between.sum()),
        busiest_rank_bytes=int(max(between.sum(0).max(), between.sum(1).max())),
        busiest_link_bytes=int(between.max()),
    )


def _size(tables: Sequence[ShardableTable]) -> Size:
    return Size(
        features=len({feature for table in tables for feature in table.features}),
        tables=len(tables),
        parameters=sum(table.weight.numel() for table in tables),
        bytes=sum(table.parameter_bytes for table in tables),
    )


@contextmanager
def _stage(progress: tqdm[NoReturn], description: str) -> Iterator[None]:
    progress.set_description(description)
    yield
    progress.update()
