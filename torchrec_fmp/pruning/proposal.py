"""`propose`: everything that a prune decides before anything moves; `dry_run` stops there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel, DMPCollection
from torchrec.distributed.train_pipeline.runtime_forwards import BaseForward
from torchrec.distributed.types import ShardingPlan

from torchrec_fmp.distributed.agreement import all_or_none, check_equal
from torchrec_fmp.embeddings.fqns import own_plan
from torchrec_fmp.embeddings.seams import sharding_env
from torchrec_fmp.gates.attach import feature_gates
from torchrec_fmp.planning.choice import Choice, Planner, PlanRequest, choose_plan
from torchrec_fmp.planning.estimates import PlanEstimate
from torchrec_fmp.planning.planner import PlannedModel
from torchrec_fmp.planning.replan import Replan
from torchrec_fmp.pruning.manifest import BeforeAfter, Manifest
from torchrec_fmp.reshard.reshard import MoveConfig
from torchrec_fmp.reshard.tables import Tables, planned_moves, table_shapes, tables
from torchrec_fmp.reshard.transfer_plan import link_bytes
from torchrec_fmp.selection.selection import Selection
from torchrec_fmp.surgery.blueprint import Blueprint, blueprint
from torchrec_fmp.surgery.cut import Cut, cut, parameter_count, table_bytes


@dataclass(frozen=True)
class Proposal:
    """The decisions of a prune, before anything has moved.

    Args:
        model: model to prune.
        group: process group of the model.
        tables: tables of the model.
        blueprint: unsharded copy of the model on the meta device.
        smaller: pruned model, unsharded, and its `CutMap`.
        manifest: manifest without the parity figure.
    """

    model: DistributedModelParallel
    group: dist.ProcessGroup
    tables: Tables
    blueprint: Blueprint
    smaller: Cut
    manifest: Manifest


def dry_run(
    model: DistributedModelParallel,
    selection: Selection,
    *,
    planner: Planner,
    replan: Replan = "auto",
    steps_left: int | None = None,
    move: MoveConfig | None = None,
) -> Manifest:
    """The manifest of a prune, without changing anything.

    Collective. Arguments and errors are the same as for `prune`.
    """
    proposal = propose(
        model,
        selection,
        planner=planner,
        replan=replan,
        steps_left=steps_left,
        move=move or MoveConfig(),
    )
    return proposal.manifest


def propose(
    model: DistributedModelParallel,
    selection: Selection,
    *,
    planner: Planner,
    replan: Replan,
    steps_left: int | None,
    move: MoveConfig,
    also: object = None,
) -> Proposal:
    """Cuts the blueprint and plans the smaller model, the same on every rank. See `prune`.

    Args:
        model: model to prune; for all arguments see `prune`.
        selection: selection to apply.
        planner: planner for the new plan.
        replan: whether surviving tables move.
        steps_left: training steps remaining; None is treated as unlimited.
        move: settings for moving tables.
        also: extra values that must match on every rank.
    """
    if not isinstance(model, DistributedModelParallel):
        raise TypeError(
            f"the model is a {type(model).__name__}: pass the DistributedModelParallel itself"
        )
    group = sharding_env(model).process_group
    if group is None:
        raise ValueError("the model was sharded without a process group; prune needs one")
    if isinstance(model, DMPCollection):
        raise TypeError(
            "the model is a DMPCollection, whose table replicas would not stay in sync after a "
            "prune; pass a plain DistributedModelParallel"
        )
    check_equal(selection.digest(), "the selection", group)
    arguments = repr((replan, steps_left, move, also))
    check_equal(arguments, "an argument other than the batch (or whether there is a batch)", group)
    with all_or_none("cutting the model", group, move.timeout):
        _check_detached(model)
        _check_decided(model, selection)
        old = blueprint(model)
        smaller = cut(old, selection)
    check_equal(smaller.cut_map.digest(), "the cut", group)
    planned = PlannedModel(own_plan(model.plan), old.model)
    current = tables(model, group, move.timeout)
    link_bytes_of = partial(_link_bytes, current, smaller, group.size())
    request = PlanRequest(
        old=planned,
        smaller=smaller.model,
        sharders=model.sharders,
        link_bytes=link_bytes_of,
        world_size=group.size(),
        steps_left=steps_left,
        chunk_bytes=move.chunk_bytes,
    )
    choice = _on_rank_0(partial(choose_plan, planner, replan, request), smaller.model, model, group)
    manifest = Manifest(
        selection=selection,
        dense_columns={
            fqn: tuple(name for name in names if name not in selection.dropped)
            for fqn, names in old.dense_features.items()
        },
        tables=BeforeAfter((len(current.shards), len(table_shapes(smaller.model)))),
        table_bytes=BeforeAfter((table_bytes(old.model), table_bytes(smaller.model))),
        parameters=BeforeAfter((parameter_count(old.model), parameter_count(smaller.model))),
        plans=BeforeAfter((planned.plan, choice.plan)),
        estimates=_estimates(choice),
        comparison=choice.comparison,
        link_bytes=link_bytes_of(choice.plan),
        staging="host" if move.staging == "host" or _must_stage(move, choice) else "none",
    )
    return Proposal(model, group, current, old, smaller, manifest)


def _estimates(choice: Choice) -> BeforeAfter[PlanEstimate] | None:
    if choice.before is None or choice.after is None:
        return None
    return BeforeAfter((choice.before, choice.after))


def _link_bytes(
    current: Tables, smaller: Cut, world_size: int, plan: ShardingPlan
) -> NDArray[np.int64]:
    moves = planned_moves(current, plan, smaller.model, smaller.cut_map, world_size)
    return link_bytes(moves, world_size)


def _must_stage(move: MoveConfig, choice: Choice) -> bool:
    return move.staging == "auto" and not choice.fits


def _on_rank_0(
    choose: Callable[[], Choice],
    smaller: nn.Module,
    model: DistributedModelParallel,
    group: dist.ProcessGroup,
) -> Choice:
    """Rank 0's choice, on every rank. A model without tables needs no planner."""
    if not table_shapes(smaller):
        return Choice(ShardingPlan({}))
    choices: list[Choice] = [Choice(ShardingPlan({}))]
    # The user's planner may take however long it needs.
    with all_or_none("planning", group, timedelta(days=1)):
        if dist.get_rank(group) == 0:
            choices = [choose()]
    dist.broadcast_object_list(choices, dist.get_global_rank(group, 0), group, model.device)
    return choices[0]


def _check_detached(model: nn.Module) -> None:
    """Refuses a model in a pipeline, which holds batches distributed by the old plan."""
    for fqn, module in model.named_modules():
        if isinstance(module.__dict__.get("forward"), BaseForward):
            raise ValueError(
                f"{fqn} is attached to a train pipeline: call pipeline.detach() before the prune, "
                "and make a new pipeline for the new model"
            )


def _check_decided(model: nn.Module, selection: Selection) -> None:
    """Refuses a gate without a decision: it would be lost, and its feature would stay, unscaled."""
    gated = [name for _, module in feature_gates(model) for name in module.features]
    undecided = [name for name in gated if name not in selection.features]
    if undecided:
        raise ValueError(
            f"the selection has no decision for the gated features {undecided}: add one for each"
        )
