"""`prune`: from a running model to the smaller one, weights and optimizer state carried over.

A transaction: until every rank agrees that the new model computes what the old one does, the old
model and its optimizer are whole and usable.
"""

from __future__ import annotations

import dataclasses
import logging
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchrec.distributed.embedding_types import ShardedEmbeddingModule
from torchrec.distributed.model_parallel import DistributedModelParallel, get_unwrapped_module

from torchrec_fmp.agreement import Lease, all_or_none, largest, watched
from torchrec_fmp.gates.attach import attach_gates, feature_gates
from torchrec_fmp.gates.feature_gates import GateConfig
from torchrec_fmp.gates.gated import GatedCollection
from torchrec_fmp.gates.names import ungated_fqn, wrapped_modules
from torchrec_fmp.gates.step_counter import StepCounter
from torchrec_fmp.manifest import Manifest
from torchrec_fmp.planning.choice import Planner
from torchrec_fmp.planning.replan import Replan
from torchrec_fmp.policies.selection import Selection
from torchrec_fmp.preparation import Work, prepare
from torchrec_fmp.reshard.crossing import crossing, with_dense_states
from torchrec_fmp.reshard.dense import fill_dense
from torchrec_fmp.reshard.dense_optimizer import carry_optimizer, check_optimizer
from torchrec_fmp.reshard.local_shards import local_shards, sharded_collections
from torchrec_fmp.reshard.reshard import MoveConfig, check_layouts, reshard_tables
from torchrec_fmp.reshard.staging import HostStage, release
from torchrec_fmp.reshard.tables import tables
from torchrec_fmp.surgery.compiled import bare_fqn, compiled, uncompiled
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
    work = prepare(
        model,
        selection,
        planner=planner,
        replan=replan,
        steps_left=steps_left,
        move=move,
        also=(tolerance, batch is None, gates),
    )
    cut_map, sources = work.smaller.cut_map, work.blueprint.sources
    with all_or_none("checking the optimizer", work.group, move.timeout):
        check_optimizer(optimizer, model, cut_map, sources)
    current = with_dense_states(work.tables, optimizer, work.group, move.timeout)
    work = dataclasses.replace(work, tables=current)
    expected: list[Tensor] = []
    if batch is not None:
        expected = _outputs_before(work, selection, batch, forward)
    with _Room(work, move) as room:
        new = _build(work, move, gates)
        filled = tables(new, work.group, move.timeout)
        with all_or_none("matching the optimizers' states", work.group, move.timeout):
            cross = crossing(room.old, filled, cut_map, optimizer, model, sources)
        check_layouts(cross.old, cross.new, cut_map)
        reshard_tables(cross.old, cross.new, cut_map, work.group, model.device, move, room.lease)
        with all_or_none("preparing the optimizer", work.group, move.timeout):
            commit = carry_optimizer(optimizer, model, new, cut_map, sources, cross.finish())
        manifest = work.manifest
        if batch is not None:
            max_abs = _check_parity(work, new, expected, batch, forward, tolerance)
            manifest = dataclasses.replace(manifest, parity_max_abs=max_abs)
        _restore_modes(model, new)
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
            except BaseException as error:
                self._give_back(error)
                raise
            self.old = self._stage.tables
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._give_back(error)

    def _give_back(self, error: BaseException) -> None:
        if self.lease is None:
            return
        self.lease.end()
        if self._stage is not None:
            # A collection that failed half way is held by the frames that built it alone.
            traceback.clear_frames(error.__traceback__)
            # Sharding replaces the smaller model's collections in place, one after the other.
            for collection in sharded_collections(self._work.smaller.model).values():
                release(local_shards(collection))
            self._stage.restore()


def _build(work: Work, move: MoveConfig, gates: GateConfig | None) -> DistributedModelParallel:
    """The smaller model with its dense weights, sharded by the new plan; tables are not filled."""
    model = work.model
    with all_or_none("cutting the dense parameters", work.group, move.timeout):
        fill_dense(
            work.smaller.model,
            dense_tensors(model),
            work.smaller.cut_map,
            work.blueprint.sources,
        )
    # Building modules draws initial weights, which are overwritten: the job's own random numbers
    # go on as if nothing had happened.
    devices = [] if model.device.type == "cpu" else [model.device]
    with torch.random.fork_rng(devices, device_type=model.device.type):
        with all_or_none("building the smaller model", work.group, move.timeout):
            new = DistributedModelParallel(
                work.smaller.model if gates is None else _gated(work, gates),
                env=model._env,
                device=model.device,
                plan=work.manifest.plans[1],
                sharders=model.sharders,
                init_data_parallel=False,
                data_parallel_wrapper=model._data_parallel_wrapper,
            )
        new.init_data_parallel()
    return new


def _gated(work: Work, config: GateConfig) -> nn.Module:
    """The smaller model with open gates, whose noise goes on where the old ones' has ended."""
    if not any(issubclass(s.module_type, GatedCollection) for s in work.model.sharders):
        raise ValueError(
            "the model was sharded without sharders of gated collections, which the new gates "
            "need: shard it with torchrec_fmp.sharders()"
        )
    # What compiles a module is bound to it, whatever takes its place.
    model, wrappers = uncompiled(work.smaller.model)
    dense = {bare_fqn(fqn): names for fqn, names in work.manifest.dense_columns.items()}
    model = compiled(attach_gates(model, config, dense), wrappers)
    for _, module in feature_gates(model):
        module.set_open(True)
    old_steps = _step_counters(work.model)
    for fqn, counter in _step_counters(model).items():
        if fqn in old_steps:
            counter.value = old_steps[fqn].value
    return model


def _step_counters(model: nn.Module) -> dict[str, StepCounter]:
    """Those of the gated modules, by fqn."""
    modules = get_unwrapped_module(model).named_modules()
    return {fqn: module for fqn, module in modules if isinstance(module, StepCounter)}


def dense_tensors(model: DistributedModelParallel) -> dict[str, Tensor]:
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


def _outputs_before(work: Work, selection: Selection, batch: Any, forward: Forward) -> list[Tensor]:
    """What the pruned model will have to compute."""
    expected = _together(
        "the old model's forward",
        work,
        partial(outputs_before, work.model, selection, batch, forward),
    )
    finite = all(bool(tensor.isfinite().all()) for tensor in expected)
    if largest(float(not finite), work.group, work.model.device):
        raise ValueError(
            "the old model's output is not finite on this batch, on this rank or another, so the "
            "pruned model could not be compared with it: nothing was changed"
        )
    return expected


def _check_parity(
    work: Work,
    new: DistributedModelParallel,
    expected: list[Tensor],
    batch: Any,
    forward: Forward,
    tolerance: float,
) -> float:
    """Max abs difference over all ranks."""
    selection, dense_features = work.manifest.selection, work.blueprint.dense_features
    actual = _together(
        "the new model's forward",
        work,
        partial(outputs_after, new, selection, batch, forward, dense_features),
    )
    with all_or_none("comparing the models", work.group):
        difference = compare(expected, actual)
    max_abs = largest(difference.max_abs, work.group, work.model.device)
    relative = largest(difference.relative, work.group, work.model.device)
    if not relative <= tolerance:
        raise ParityError(
            f"pruned and old outputs differ by {max_abs:.3g} ({relative:.3g} relative to the "
            f"largest), more than {tolerance:.3g}: a cut rule does not do what its module "
            "computes, or a gate was folded into a table of low precision, which needs a larger "
            "tolerance. Nothing was changed"
        )
    return max_abs


def _together(what: str, work: Work, outputs: Callable[[], list[Tensor]]) -> list[Tensor]:
    """A forward pass that ends on all ranks if it fails on one.

    The others wait for that rank in a collective, which only the group's timeout ends: it is left
    behind in its thread, and the group is of no use afterwards.
    """
    if work.group.size() == 1:
        return outputs()

    def run(_: Callable[[], None]) -> list[Tensor]:
        if work.model.device.type == "cuda":
            torch.cuda.set_device(work.model.device)
        return outputs()

    with all_or_none(what, work.group) as check:
        return watched(run, check)


def _restore_modes(old: nn.Module, new: nn.Module) -> None:
    """Each module trains or evaluates as the old one of its fqn, and a new one as the model."""
    wrapped = wrapped_modules(old)
    modes = {
        ungated_fqn(fqn, wrapped): module.training
        for fqn, module in get_unwrapped_module(old).named_modules()
    }
    new.train(old.training)
    wrapped = wrapped_modules(new)
    for fqn, module in get_unwrapped_module(new).named_modules():
        module.training = modes.get(ungated_fqn(fqn, wrapped), old.training)
