"""`prune`: drops features from a running model, with its plan and its optimizer.

A transaction: until the new model is complete on every rank, the old model and its optimizer are
unchanged, or can be restored. The optimizer is changed in the last step.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, NamedTuple

from torch.optim import Optimizer
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_fmp.distributed.agreement import all_or_none
from torchrec_fmp.gates.feature_gates import GateConfig
from torchrec_fmp.planning.choice import Planner
from torchrec_fmp.planning.replan import Replan
from torchrec_fmp.pruning.building import build, restore_modes
from torchrec_fmp.pruning.manifest import Manifest
from torchrec_fmp.pruning.outputs import Forward, call
from torchrec_fmp.pruning.parity import Parity
from torchrec_fmp.pruning.proposal import propose
from torchrec_fmp.pruning.room import Room
from torchrec_fmp.reshard.crossing import crossing, with_dense_states
from torchrec_fmp.reshard.dense_optimizer import carry_optimizer, check_optimizer
from torchrec_fmp.reshard.reshard import MoveConfig, check_layouts, reshard_tables
from torchrec_fmp.reshard.tables import tables
from torchrec_fmp.selection.selection import Selection

_logger = logging.getLogger(__name__)


class Pruned(NamedTuple):
    """The new model, its optimizer, and the manifest of the prune."""

    model: DistributedModelParallel
    optimizer: Optimizer
    manifest: Manifest


def prune(
    model: DistributedModelParallel,
    optimizer: Optimizer,
    selection: Selection,
    *,
    planner: Planner,
    batch: Any = None,
    forward: Forward = call,
    tolerance: float = 1e-6,
    replan: Replan = "auto",
    steps_left: int | None = None,
    move: MoveConfig | None = None,
    gates: GateConfig | None = None,
) -> Pruned:
    """Drops the features that the selection drops, and everything that only they needed.

    Collective: every rank of the model's process group calls it. TorchRec's planner makes a new
    plan; tables, their fused optimizer states, dense parameters and the state of `optimizer` move
    to their new places. The new model holds plain TorchRec modules under the original fqns, or
    gated modules if `gates` is given. Modules that `torch.compile` wraps are wrapped again with the
    same backend and options, and compile again. Modules compiled in place by `module.compile()`
    are not compiled afterwards; a warning names them.

    Args:
        model: sharded model, gated or not. Free it afterwards. Until then it can be used, unless
            its tables were staged in host memory.
        optimizer: optimizer of the dense parameters, or TorchRec's `CombinedOptimizer` of all. The
            returned optimizer belongs to the new model. Schedulers that refer to it continue to
            work; create a scheduler again if it refers to `model.fused_optimizer`, which is
            replaced. A table that comes from the fused optimizer joins the first param group that
            holds tables, or else the first that holds dense parameters; see
            docs/optimizer_state.md.
        selection: selection to apply, the same on every rank.
        planner: planner for the new plan, such as the one that planned the model.
        batch: input of the old model, different on each rank, to compare the two models on.
        forward: function that runs a model on the batch; by default `model(batch)`.
        tolerance: largest allowed difference: absolute for outputs below 1, relative to the largest
            output above, because fp32 rounds relatively.
        replan: choice of the plan. `planner` takes the planner's new plan; `sticky` leaves
            surviving tables where they are; `auto` decides by the planner's estimates, and the
            manifest says why. `auto` moves no table between the fused and the dense optimizer;
            `planner` does, if the two keep the same states.
        steps_left: training steps remaining, which `auto` weighs against the time of the move; None
            is treated as unlimited.
        move: settings for moving tables.
        gates: configuration of the new model's gates, for another prune; None for no gates. The
            gates are new and exactly open, on every sparse feature and on the dense columns that
            had gates, and are not in the optimizer. Their noise continues where the noise of the
            old gates ended.

    Raises:
        ParityError: if the outputs differ by more than the tolerance on any rank.
        RuntimeError: if ranks got different arguments, or another rank failed or did not answer. If
            that happened in a forward pass, the process group is unusable afterwards.
        PlannerError: if the planner finds no plan, and the tables cannot stay where they are
            either; see `replan`.
        CorruptionError: if a message arrives changed; with `MoveConfig.checksums`.
        TypeError: if a module reads a dropped feature and has no cut rule, or if the optimizer
            keeps parameters anywhere except in its param groups.
        ValueError: if the selection or the optimizer does not fit the model; if the planner is for
            other ranks; if TorchRec would pool a table differently under the new plan; if the old
            model's output on the batch is not finite; or if `gates` is given, but the model was
            sharded without `torchrec_fmp.sharders`.
    """
    move = move or MoveConfig()
    proposal = propose(
        model,
        selection,
        planner=planner,
        replan=replan,
        steps_left=steps_left,
        move=move,
        also=(tolerance, batch is None, gates),
    )
    cut_map, group = proposal.smaller.cut_map, proposal.group
    with all_or_none("checking the optimizer", group, move.timeout):
        check_optimizer(optimizer, model, cut_map)
    current = with_dense_states(proposal.tables, optimizer, group, move.timeout)
    proposal = dataclasses.replace(proposal, tables=current)
    parity = None if batch is None else Parity(proposal, batch, forward, tolerance)
    manifest = proposal.manifest
    with Room(proposal, move) as room:
        new = build(proposal, move, gates)
        filled = tables(new, group, move.timeout)
        with all_or_none("matching the optimizers' states", group, move.timeout):
            cross = crossing(room.old, filled, cut_map, optimizer, model)
        check_layouts(cross.old, cross.new, cut_map)
        reshard_tables(cross.old, cross.new, cut_map, group, model.device, move, room.lease)
        with all_or_none("preparing the optimizer", group, move.timeout):
            commit = carry_optimizer(optimizer, model, new, cut_map, cross.finish())
        if parity is not None:
            manifest = dataclasses.replace(manifest, parity_max_abs=parity.check(new))
        restore_modes(model, new)
    _logger.info("pruned %d of %d features", len(selection.dropped), len(selection.features))
    return Pruned(new, commit(), manifest)
