"""`prune`: from a running gated model to the smaller one, weights and optimizer state carried over.

A transaction: until every rank agrees that the new model computes what the gated one does, the old
model and its optimizer are untouched.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torchrec.distributed.embedding_types import ShardedEmbeddingModule
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ModuleSharder, ShardingPlan

from torchrec_fmp.agreement import all_or_none, check_equal, largest
from torchrec_fmp.gates.attach import feature_gates
from torchrec_fmp.planning import describe_plan
from torchrec_fmp.policies.selection import Selection
from torchrec_fmp.reshard.dense import carry_optimizer, fill_dense
from torchrec_fmp.reshard.reshard import reshard_tables
from torchrec_fmp.surgery.blueprint import Blueprint, blueprint
from torchrec_fmp.surgery.cut import Cut, cut, parameter_count, table_bytes
from torchrec_fmp.surgery.parity import parity

_logger = logging.getLogger(__name__)


class Planner(Protocol):
    """What `prune` needs of a planner; TorchRec's `EmbeddingShardingPlanner` is one."""

    def collective_plan(
        self,
        module: nn.Module,
        sharders: list[ModuleSharder[Any]],
        pg: dist.ProcessGroup,
    ) -> ShardingPlan:
        """A plan for the module, the same on every rank."""


@dataclass(frozen=True)
class Manifest:
    """What a prune did.

    Args:
        selection: the decisions.
        dense_columns: fqn of a module that reads gated dense columns -> the columns it reads now,
            in order; give the pruned model these.
        table_bytes: of all embedding tables, before and after.
        parameters: before and after, tables included.
        plans: TorchRec's plans, before and after.
        parity_max_abs: max abs difference of the outputs over all ranks; None without a batch.
    """

    selection: Selection
    dense_columns: Mapping[str, tuple[str, ...]]
    table_bytes: tuple[int, int]
    parameters: tuple[int, int]
    plans: tuple[ShardingPlan, ShardingPlan]
    parity_max_abs: float | None

    def describe(self) -> dict[str, Any]:
        """Plain data for reports: everything but the decisions, which have a file of their own."""
        when = ("before", "after")
        return {
            "dropped": self.selection.dropped,
            "dense_columns": {fqn: list(names) for fqn, names in self.dense_columns.items()},
            "table_bytes": dict(zip(when, self.table_bytes, strict=True)),
            "parameters": dict(zip(when, self.parameters, strict=True)),
            "plans": {w: describe_plan(p) for w, p in zip(when, self.plans, strict=True)},
            "parity_max_abs": self.parity_max_abs,
        }


class Pruned(NamedTuple):
    """The new model, the optimizer that belongs to it, and what was done."""

    model: DistributedModelParallel
    optimizer: Optimizer
    manifest: Manifest


class ParityError(RuntimeError):
    """The pruned model does not compute what the gated model computes; nothing was changed."""


def prune(
    model: DistributedModelParallel,
    optimizer: Optimizer,
    selection: Selection,
    *,
    planner: Planner,
    batch: Any = None,
    tolerance: float = 1e-6,
) -> Pruned:
    """Drops the features that the selection drops, and everything that only they needed.

    Collective: every rank of the model's process group calls it. TorchRec's planner makes a new
    plan; tables, their fused optimizer state, dense parameters and the state of `optimizer` move to
    their new places. The new model holds plain TorchRec modules under the original fqns.

    Args:
        model: the sharded model, gated or not; not changed, free it afterwards.
        optimizer: of the dense parameters, or TorchRec's `CombinedOptimizer` of all. The returned
            one belongs to the new model; schedulers that refer to it go on working.
        selection: the same on every rank.
        planner: for the new plan.
        batch: an input of the gated model, on each rank its own, to compare the two models on.
            Needs gates on every feature that the selection changes.
        tolerance: largest difference allowed, absolute where the outputs are below 1 and relative
            to the largest output above, as fp32 rounds.

    Raises:
        ParityError: if the outputs differ by more than the tolerance on any rank.
        RuntimeError: if ranks were given different selections.
        TypeError: if a module reads a dropped feature and has no cut rule.
        ValueError: if the selection does not fit the model, or the optimizer does not, or the gated
            model's output on the batch is not finite.
    """
    group = model._env.process_group
    if group is None:
        raise ValueError("the model was sharded without a process group; prune needs one")
    check_equal(selection.digest(), "the selection", group)
    _check_decided(model, selection)
    old = blueprint(model)
    smaller = cut(old, selection)
    # Sharding replaces the tables of the smaller model in place.
    bytes_after, parameters_after = table_bytes(smaller.model), parameter_count(smaller.model)
    check_equal(smaller.cut_map.digest(), "the cut", group)
    # Building modules draws initial weights, which are overwritten: the job's own random numbers
    # go on as if nothing had happened.
    devices = [] if model.device.type == "cpu" else [model.device]
    with torch.random.fork_rng(devices, device_type=model.device.type):
        new = _shard(smaller, model, old, planner, group)
    reshard_tables(model, new, smaller.cut_map)
    with all_or_none("preparing the optimizer", group):
        commit = carry_optimizer(optimizer, model, new, smaller.cut_map, old.sources)
    max_abs = None
    if batch is not None:
        _check_gated(model, selection)
        difference = parity(model, new, selection, batch, old.dense_features)
        max_abs = largest(difference.max_abs, group, model.device)
        relative = largest(difference.relative, group, model.device)
        if math.isnan(max_abs):
            raise ValueError(
                "the gated model's output is not finite on this batch, so the pruned model cannot "
                "be compared with it: nothing was changed"
            )
        if not relative <= tolerance:
            raise ParityError(
                f"pruned and gated outputs differ by {max_abs:.3g} ({relative:.3g} relative to the "
                f"largest), more than {tolerance:.3g}: a cut rule does not do what its module "
                "computes. Nothing was changed"
            )
    new.train(model.training)
    manifest = Manifest(
        selection=selection,
        dense_columns={
            fqn: tuple(name for name in names if name not in selection.dropped)
            for fqn, names in old.dense_features.items()
        },
        table_bytes=(table_bytes(old.model), bytes_after),
        parameters=(parameter_count(old.model), parameters_after),
        plans=(model.plan, new.plan),
        parity_max_abs=max_abs,
    )
    _logger.info("pruned %d of %d features", len(selection.dropped), len(selection.features))
    return Pruned(new, commit(), manifest)


def _shard(
    smaller: Cut,
    model: DistributedModelParallel,
    old: Blueprint,
    planner: Planner,
    group: dist.ProcessGroup,
) -> DistributedModelParallel:
    """The smaller model with its dense weights, sharded by a new plan; tables are not filled."""
    with all_or_none("cutting the dense parameters", group):
        fill_dense(smaller.model, _dense_tensors(model), smaller.cut_map, old.sources)
    plan = planner.collective_plan(smaller.model, model.sharders, group)
    return DistributedModelParallel(
        smaller.model,
        env=model._env,
        device=model.device,
        plan=plan,
        sharders=model.sharders,
        data_parallel_wrapper=model._data_parallel_wrapper,
    )


def _dense_tensors(model: DistributedModelParallel) -> dict[str, torch.Tensor]:
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


def _check_decided(model: nn.Module, selection: Selection) -> None:
    """A gate without a decision would be lost: its feature would stay, unscaled."""
    gated = [name for _, module in feature_gates(model) for name in module.features]
    undecided = [name for name in gated if name not in selection.features]
    if undecided:
        raise ValueError(f"the selection has no decision for the gated features {undecided}")


def _check_gated(model: nn.Module, selection: Selection) -> None:
    gated = {name for _, module in feature_gates(model) for name in module.features}
    changed = [name for name, gate in selection.gates.items() if gate != 1 and name not in gated]
    if changed:
        raise ValueError(
            f"the features {changed} are dropped or scaled and have no gate, so the model cannot "
            "be compared with the pruned one: attach gates, or pass no batch"
        )
