"""`prune`: from a running model to the smaller one, weights and optimizer state carried over.

A transaction: until every rank agrees that the new model computes what the old one does, the old
model and its optimizer are whole and usable.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchrec.distributed.embedding_types import ShardedEmbeddingModule
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_fmp.agreement import Lease, all_or_none, largest
from torchrec_fmp.manifest import Manifest
from torchrec_fmp.planning.choice import Planner
from torchrec_fmp.planning.replan import Replan
from torchrec_fmp.policies.selection import Selection
from torchrec_fmp.preparation import Work, prepare
from torchrec_fmp.reshard.data_parallel import crossing, with_dense_states
from torchrec_fmp.reshard.dense import fill_dense
from torchrec_fmp.reshard.dense_optimizer import carry_optimizer, check_optimizer
from torchrec_fmp.reshard.reshard import MoveConfig, check_layouts, reshard_tables
from torchrec_fmp.reshard.staging import HostStage, release
from torchrec_fmp.reshard.tables import Tables, tables
from torchrec_fmp.surgery.parity import Forward, compare, outputs_after, outputs_before

_logger = logging.getLogger(__name__)


class Pruned(NamedTuple):
    """The new model, the optimizer that belongs to it, and what was done."""

    model: DistributedModelParallel
    optimizer: Optimizer
    manifest: Manifest


class ParityError(RuntimeError):
    """The pruned model does not compute what the old model computes; nothing was changed."""


def call(model: nn.Module, batch: Any) -> Any:
    """`model(batch)`."""
    return model(batch)


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
) -> Pruned:
    """Drops the features that the selection drops, and everything that only they needed.

    Collective: every rank of the model's process group calls it. TorchRec's planner makes a new
    plan; tables, their fused optimizer state, dense parameters and the state of `optimizer` move to
    their new places. The new model holds plain TorchRec modules under the original fqns.

    Args:
        model: the sharded model, gated or not. Free it afterwards; until then it can be used,
            unless its tables were staged in host memory.
        optimizer: of the dense parameters, or TorchRec's `CombinedOptimizer` of all. The returned
            one belongs to the new model; schedulers that refer to it go on working. A table that
            comes to it from the fused optimizer joins its first param group that holds tables, or
            else its first that holds dense parameters; see docs/optimizer_state.md.
        selection: the same on every rank.
        planner: for the new plan, such as the one that planned the model.
        batch: an input of the old model, on each rank its own, to compare the two models on.
        forward: runs a model on the batch, where that is not `model(batch)`.
        tolerance: largest difference allowed, absolute where the outputs are below 1 and relative
            to the largest output above, as fp32 rounds.
        replan: `planner` takes the planner's new plan; `sticky` leaves the tables that survive
            where they are; `auto` decides by the planner's estimates, and the manifest says why.
        steps_left: that are to be trained, which `auto` holds against the time of the move; None
            if unknown, which counts as many.
        move: how tables move.

    Raises:
        ParityError: if the outputs differ by more than the tolerance on any rank.
        RuntimeError: if ranks were given different selections, or another rank failed.
        TypeError: if a module reads a dropped feature and has no cut rule, or the optimizer keeps
            parameters anywhere but in its param groups.
        ValueError: if the selection does not fit the model, or the optimizer does not, or the old
            model's output on the batch is not finite.
    """
    move = move or MoveConfig()
    work = prepare(
        model, selection, planner=planner, replan=replan, steps_left=steps_left, move=move
    )
    cut_map, sources = work.smaller.cut_map, work.blueprint.sources
    with all_or_none("checking the optimizer", work.group, move.timeout):
        check_optimizer(optimizer, model, cut_map, sources)
    current = with_dense_states(work.tables, optimizer, work.group, move.timeout)
    work = dataclasses.replace(work, tables=current)
    expected: list[Tensor] = []
    if batch is not None:
        expected = outputs_before(model, selection, batch, forward)
    with _Room(work, move) as room:
        new = _build(work)
        filled = tables(new, work.group)
        room.takes(filled)
        with all_or_none("matching the optimizers' states", work.group, move.timeout):
            cross = crossing(room.old, filled, cut_map, optimizer, model, sources)
        check_layouts(cross.old, cross.new, cut_map)
        reshard_tables(cross.old, cross.new, cut_map, work.group, model.device, move, room.lease)
        with all_or_none("preparing the optimizer", work.group, move.timeout):
            commit = carry_optimizer(optimizer, model, new, cut_map, sources, cross.finish())
        manifest = work.manifest
        if batch is not None:
            dense_features = work.blueprint.dense_features
            actual = outputs_after(new, selection, batch, forward, dense_features)
            max_abs = _check_parity(expected, actual, tolerance, work)
            manifest = dataclasses.replace(manifest, parity_max_abs=max_abs)
        new.train(model.training)
    _logger.info("pruned %d of %d features", len(selection.dropped), len(selection.features))
    return Pruned(new, commit(), manifest)


class _Room:
    """Where the old tables are while the new ones are built and filled.

    They stay in place, or are staged in host memory if the manifest says so. If anything fails,
    the new tables' memory is freed before the old ones are given back to the old model.
    """

    def __init__(self, work: Work, move: MoveConfig) -> None:
        self._work = work
        self._move = move
        self._stage: HostStage | None = None
        self._new: Tables | None = None
        self.lease: Lease | None = None
        self.old = work.tables

    def __enter__(self) -> _Room:
        if self._work.manifest.staging == "host":
            self.lease = Lease()
            try:
                with all_or_none(
                    "staging the tables in host memory", self._work.group, self._move.timeout
                ):
                    self._stage = HostStage(self._work.tables)
            except BaseException:
                self._give_back()
                raise
            self.old = self._stage.tables
        return self

    def takes(self, new: Tables) -> None:
        """The new model's tables, once there are some."""
        self._new = new

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._give_back()

    def _give_back(self) -> None:
        if self.lease is not None:
            self.lease.end()
        if self._stage is not None:
            if self._new is not None:
                release(self._new)
            self._stage.restore()


def _build(work: Work) -> DistributedModelParallel:
    """The smaller model with its dense weights, sharded by the new plan; tables are not filled."""
    model = work.model
    with all_or_none("cutting the dense parameters", work.group):
        fill_dense(
            work.smaller.model,
            _dense_tensors(model),
            work.smaller.cut_map,
            work.blueprint.sources,
        )
    # Building modules draws initial weights, which are overwritten: the job's own random numbers
    # go on as if nothing had happened.
    devices = [] if model.device.type == "cpu" else [model.device]
    with torch.random.fork_rng(devices, device_type=model.device.type):
        with all_or_none("building the smaller model", work.group):
            new = DistributedModelParallel(
                work.smaller.model,
                env=model._env,
                device=model.device,
                plan=work.manifest.plans[1],
                sharders=model.sharders,
                init_data_parallel=False,
                data_parallel_wrapper=model._data_parallel_wrapper,
            )
        new.init_data_parallel()
    return new


def _dense_tensors(model: DistributedModelParallel) -> dict[str, Tensor]:
    """Parameters and buffers outside of sharded collections."""
    sharded = tuple(
        f"{fqn}."
        for fqn, module in model.module.named_modules()
        if isinstance(module, ShardedEmbeddingModule)
    )
    tensors = [
        *model.module.named_parameters(remove_duplicate=False),
        *model.module.named_buffers(remove_duplicate=False),
    ]
    return {fqn: tensor for fqn, tensor in tensors if not fqn.startswith(sharded)}


def _check_parity(
    expected: list[Tensor], actual: list[Tensor], tolerance: float, work: Work
) -> float:
    """Max abs difference over all ranks."""
    with all_or_none("comparing the models", work.group):
        difference = compare(expected, actual)
    max_abs = largest(difference.max_abs, work.group, work.model.device)
    relative = largest(difference.relative, work.group, work.model.device)
    if math.isnan(max_abs):
        raise ValueError(
            "the old model's output is not finite on this batch, so the pruned model cannot be "
            "compared with it: nothing was changed"
        )
    if not relative <= tolerance:
        raise ParityError(
            f"pruned and old outputs differ by {max_abs:.3g} ({relative:.3g} relative to the "
            f"largest), more than {tolerance:.3g}: a cut rule does not do what its module "
            "computes. Nothing was changed"
        )
    return max_abs
