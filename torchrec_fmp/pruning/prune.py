"""`prune`: drops features from a running model, with its plan and its optimizer.

A transaction: until the new model is whole on every rank, the old one and its optimizer are as they
were, or can be put back; the optimizer is changed in the last step.
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
    """The new model, the optimizer that belongs to it, and what was done."""

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
    plan; tables, their fused optimizer state, dense parameters and the state of `optimizer` move to
    their new places. The new model holds plain TorchRec modules under the original fqns, or gated
    ones where `gates` are given. What `torch.compile` wraps is wrapped again with the same backend
    and options and compiles anew; modules compiled in place by `module.compile()` are plain
    afterwards, with a warning.

    Args:
        model: the sharded model, gated or not. Free it afterwards; until then it can be used,
            unless its tables were staged in host memory.
        optimizer: of the dense parameters, or TorchRec's `CombinedOptimizer` of all. The returned
            one belongs to the new model; schedulers that refer to it go on working, but one that
            refers to `model.fused_optimizer`, which is replaced, is to be made anew. A table that
            comes to it from the fused optimizer joins its first param group that holds tables, or
            else its first that holds dense parameters; see docs/optimizer_state.md.
        selection: the same on every rank.
        planner: for the new plan, such as the one that planned the model.
        batch: an input of the old model, on each rank its own, to compare the two models on.
        forward: runs a model on the batch, where that is not `model(batch)`.
        tolerance: largest difference allowed, absolute where the outputs are below 1 and relative
            to the largest output above, as fp32 rounds.
        replan: `planner` takes the planner's new plan; `sticky` leaves the tables that survive
            where they are; `auto` decides by the planner's estimates, and the manifest says why. It
            takes no table from the fused to the dense optimizer or back; `planner` does, where the
            two keep the same states.
        steps_left: that are to be trained, which `auto` holds against the time of the move; None
            if unknown, which counts as many.
        move: how tables move.
        gates: of the new model, which is to be pruned again; None for none. They are new, exactly
            open, on every sparse feature and on the dense columns that had gates, and not in the
            optimizer. Their noise goes on where that of the old gates ended.

    Raises:
        ParityError: if the outputs differ by more than the tolerance on any rank.
        RuntimeError: if ranks were given different arguments, or another rank failed or did not
            answer. If that was in a forward pass, the process group is of no use afterwards.
        PlannerError: if the planner finds no plan, and `replan` is `planner`.
        CorruptionError: if a message arrives changed; with `MoveConfig.checksums`.
        TypeError: if a module reads a dropped feature and has no cut rule, or the optimizer keeps
            parameters anywhere but in its param groups.
        ValueError: if the selection does not fit the model, or the optimizer does not, or the
            planner is for other ranks, or TorchRec would pool a table differently under its plan,
            or the old model's output on the batch is not finite, or the model was sharded without
            `torchrec_fmp.sharders` and the new one is to have gates.
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
